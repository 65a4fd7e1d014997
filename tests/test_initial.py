"""Where methods start: at random, from the largest weights, from masks."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk

SHAPE = (8, 12)
HALFWAY = dict(initial_sparsity=0.75, start=5, stop=9)
ARGUMENTS: dict[str, dict[str, Any]] = {
    "top_kast": dict(forward_sparsity=0.75, backward_sparsity=0.5),
    **dict.fromkeys(("magnitude", "saliency", "random_pruning", "granet"), HALFWAY),
}
DENSE_AT_FIRST = ("acdc", "one_shot", "snip")
METHODS = sorted(tk.METHODS.keys() - set(DENSE_AT_FIRST))
PACKED = ("static", "set", "rigl", "top_kast", "straight_through")


def made(name: str, init: Any, **more: Any) -> tk.Method:
    arguments = {"sparsity": 0.875 if name in ARGUMENTS else 0.75}
    if name == "top_kast":
        arguments = {}
    return tk.METHODS[name](**arguments, **ARGUMENTS.get(name, {}), init=init, **more)


def params() -> Any:
    return {"kernel": jax.random.normal(jax.random.key(1), SHAPE), "bias": jnp.ones(12)}


def first(method: tk.Method, layout: str, axes: Any = None) -> np.ndarray:
    """A of step 0."""
    rate = 0.1 if method.needs_learning_rate else None
    tx = tk.sparse(optax.sgd(0.1), method, layout=layout, axes=axes, learning_rate=rate)
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


@pytest.mark.parametrize(
    ("name", "layout"),
    [(n, "masked") for n in METHODS] + [(n, "packed") for n in PACKED],
)
def test_every_method_starts_from_what_it_is_told(name, layout):
    fan_in = name == "srigl"  # two of eight inputs for every output
    size = np.abs(np.asarray(params()["kernel"]))
    order = np.argsort(-size, axis=0) if fan_in else np.argsort(-size, axis=None)
    top, last = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    for mask, chosen in ((top, order[: len(order) // 4]), (last, order[-2:])):
        np.put_along_axis(mask, chosen, True, axis=0 if fan_in else None)
    found = first(made(name, "magnitude"), layout)
    np.testing.assert_array_equal(found, top)
    found = first(made(name, {"kernel": last, "bias": None}), layout)
    assert found[last].all() and found.sum() == 24  # kept, and extended at random
    found = first(made(name, {"kernel": top, "bias": None}), layout)
    np.testing.assert_array_equal(found, top)
    at_random = first(made(name, "random"), layout)
    assert at_random.sum() == 24 and (at_random != top).any()


@pytest.mark.parametrize("name", DENSE_AT_FIRST)
def test_what_begins_dense_takes_no_start(name):
    assert "init" not in inspect.signature(tk.METHODS[name]).parameters
    arguments = dict(
        acdc=dict(warmup=2, compressed=3, dense=2, last=9), one_shot=dict(at=2)
    )
    method = tk.METHODS[name](0.75, **arguments.get(name, {}))
    assert first(method, "masked").all()


@pytest.mark.parametrize("explore", ["top", "random"])
@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_top_kast_explores_around_a_given_mask(explore, layout):
    """B holds the mask, and beside it the largest or random weights."""
    given = ~largest(72)
    method = tk.top_kast(0.75, 0.5, init={"kernel": given}, explore=explore)
    tx = tk.sparse(optax.sgd(0.1), method, layout=layout)
    state = tx.init(params()) if layout == "masked" else tk.start(tx, params())[1]
    backward = np.asarray(tk.dense_masks(state).backward["kernel"])
    assert backward[given].all() and backward.sum() == 48
    assert (backward == given | largest(24)).all() == (explore == "top")


def test_a_soft_threshold_starts_from_the_largest():
    with pytest.raises(ValueError, match="A must be the largest weights"):
        tk.straight_through(0.5, soft=True, init="random")


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
