"""Masks by themselves: from weights, to files and back, as the start of a method."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk


def params() -> Any:
    return {
        "one": {"kernel": jax.random.normal(jax.random.key(0), (6, 8))},
        "bias": jnp.zeros(8),
    }


def trained() -> tuple[Any, Any]:
    """Weights of a sparse network, and its masks."""
    tx = tk.sparse(optax.sgd(0.1), tk.static(0.75, init="magnitude"))
    state = tx.init(params())
    return tk.export(params(), state), tk.dense_masks(state).forward


def test_masks_are_recovered_from_plain_weights():
    weights, masks = trained()
    found = tk.from_zeros(weights)
    assert found["bias"] is None
    np.testing.assert_array_equal(found["one"]["kernel"], masks["one"]["kernel"])


@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_training_goes_on_from_recovered_masks(layout):
    weights, masks = trained()
    found = tk.from_zeros(weights)
    method = tk.set_(0.0, init=found, distribution=tk.of_masks(found))
    tx = tk.sparse(optax.sgd(0.1), method, layout=layout)
    if layout == "masked":
        theta, state = weights, tx.init(weights)
    else:
        theta, state, _ = tk.start(tx, weights)
    again = tk.export(theta, state)
    jax.tree.map(np.testing.assert_array_equal, again, weights)
    kept = tk.dense_masks(state).forward["one"]["kernel"]
    np.testing.assert_array_equal(kept, masks["one"]["kernel"])


def test_saved_masks_come_back(tmp_path: pathlib.Path):
    _, masks = trained()
    tk.save_masks(tmp_path / "masks.npz", masks)
    found = tk.load_masks(tmp_path / "masks.npz")
    assert list(found) == ["one/kernel"]
    np.testing.assert_array_equal(found["one/kernel"], masks["one"]["kernel"])
    # By path, which is how a method takes them.
    state = tk.sparse(optax.sgd(0.1), tk.static(0.75, init=found)).init(params())
    np.testing.assert_array_equal(
        tk.masks(state).forward["one"]["kernel"], masks["one"]["kernel"]
    )


def test_what_holds_no_masks_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match="holds no masks"):
        tk.load_masks(tmp_path / "nothing.npz")
    np.savez(tmp_path / "other.npz", kernel=np.ones(3))
    with pytest.raises(ValueError, match="was not written by save_masks"):
        tk.load_masks(tmp_path / "other.npz")
    whole = (tmp_path / "other.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="holds no masks"):
        tk.load_masks(tmp_path / "cut.npz")
    with pytest.raises(ValueError, match="'kernel' holds float"):
        tk.save_masks(tmp_path / "masks.npz", {"kernel": jnp.ones(3)})


def test_weights_that_are_all_zero_have_no_mask():
    with pytest.raises(ValueError, match="'one/kernel' is all zero"):
        tk.from_zeros({"one": {"kernel": jnp.zeros((2, 2))}})


@pytest.mark.parametrize(
    ("masks", "copies", "message"),
    [
        ({"other": np.ones((2, 2), bool)}, 1, "no mask for 'kernel'"),
        ({"kernel": np.eye(3, dtype=bool)}, 2, "every slice must have the same"),
    ],
)
def test_masks_that_give_no_counts(masks, copies, message):
    with pytest.raises(ValueError, match=message):
        tk.of_masks(masks)({"kernel": (2, 2)}, 0.5, {"kernel": copies})
