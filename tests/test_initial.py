"""Where methods start: at random, from the largest weights, from masks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk

SHAPE = (8, 12)
METHODS: dict[str, Any] = {"static": tk.static, "set": tk.set_, "rigl": tk.rigl}


def params() -> Any:
    return {"kernel": jax.random.normal(jax.random.key(1), SHAPE), "bias": jnp.ones(12)}


def first(method: tk.Method, layout: str, axes: Any = None) -> np.ndarray:
    """A of step 0."""
    tx = tk.sparse(optax.sgd(0.1), method, layout=layout, axes=axes)
    if layout == "masked":
        state = tx.init(params())
    else:
        _, state, _ = tk.start(tx, params())
    return np.asarray(tk.dense_masks(state).forward["kernel"])


def largest(k: int) -> np.ndarray:
    size = np.abs(np.asarray(params()["kernel"])).reshape(-1)
    mask = np.zeros(size.size, bool)
    mask[np.argsort(-size, kind="stable")[:k]] = True
    return mask.reshape(SHAPE)


@pytest.mark.parametrize("layout", ["masked", "packed"])
@pytest.mark.parametrize("name", METHODS)
def test_from_the_largest_weights(name, layout):
    found = first(METHODS[name](0.75, init="magnitude"), layout)
    np.testing.assert_array_equal(found, largest(24))


def test_magnitude_keeps_the_weights_that_were_trained():
    tx = tk.sparse(optax.sgd(0.1), tk.set_(0.75, init="magnitude"), layout="packed")
    theta, state, _ = tk.start(tx, params())
    kept = np.asarray(tk.export(theta, state)["kernel"])
    np.testing.assert_array_equal(kept, np.where(largest(24), params()["kernel"], 0))


@pytest.mark.parametrize("layout", ["masked", "packed"])
@pytest.mark.parametrize("structure", [tk.unstructured, tk.blocks(2, 3), tk.fan_in()])
def test_a_mask_is_kept_and_extended(layout, structure):
    given = np.zeros(SHAPE, bool)
    given[:2, :3] = True
    if structure.scope == "column":
        given[:2] = True
    masks = {"kernel": given, "bias": None}
    found = first(tk.static(0.5, init=masks, structure=structure), layout)
    assert found[given].all() and found.sum() == 48
    other = first(tk.static(0.5, init=masks, structure=structure), "masked")
    np.testing.assert_array_equal(found, other)


def test_a_mask_of_the_right_size_is_the_mask():
    masks = {"kernel": largest(24)}
    for layout in ("masked", "packed"):
        np.testing.assert_array_equal(
            first(tk.rigl(0.75, init=masks), layout), largest(24)
        )


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("largest", "is not 'random', 'magnitude' or masks"),
        ({"kernel": np.ones(SHAPE)}, "'kernel' holds float64, not bool"),
    ],
)
def test_what_is_no_start(init, message):
    with pytest.raises(ValueError, match=message):
        tk.static(0.5, init=init)


@pytest.mark.parametrize(
    ("init", "structure", "message"),
    [
        ({"other": np.ones(SHAPE, bool)}, tk.unstructured, "no mask for 'kernel'"),
        ({"kernel": np.ones((2, 2), bool)}, tk.unstructured, "its mask .2, 2."),
        (
            {"kernel": np.ones(SHAPE, bool)},
            tk.unstructured,
            "96 units in one selection",
        ),
        ({"kernel": largest(9)}, tk.blocks(2, 3), "not made of whole units"),
    ],
)
@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_a_mask_that_does_not_fit(init, structure, message, layout):
    with pytest.raises(ValueError, match=message):
        first(tk.static(0.5, init=init, structure=structure), layout)


def test_members_are_drawn_in_the_same_order_in_every_layout():
    """`draw(among=...)` on lists and on masks, seen through a method of a user's own."""

    def refresh(leaf: tk.Leaf, memory: Any, step: Any) -> Any:
        chosen = leaf.draw(10, outside=leaf.draw(5), among=leaf.draw(40))
        return leaf.masks(chosen, chosen), memory

    base = tk.static(1 - 10 / 96)
    method = base._replace(name="own", init=lambda leaf: refresh(leaf, (), 0))
    masked, packed = (first(method, layout) for layout in ("masked", "packed"))
    assert masked.sum() == 10
    np.testing.assert_array_equal(masked, packed)
