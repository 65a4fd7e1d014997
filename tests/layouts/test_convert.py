"""A run that changes its layout on the way is the run that did not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lockstep import loss

import topkast_jax as tk

METHODS: dict[str, Any] = {
    "top_kast": lambda s: tk.top_kast(0.8, 0.6, refresh=tk.every(3), structure=s),
    "rigl": lambda s: tk.rigl(0.8, refresh=tk.every(3), structure=s),
}
STRUCTURES = {
    "entries": tk.unstructured,
    "blocks": tk.blocks(4, 2),
    "fan_in": tk.fan_in(),
    "n_of_m": tk.n_of_m(8),
    "groups": tk.groups_of(2, tk.fan_in(2, 2)),
}
SHAPE = (2, 16, 8)


class Run:
    """A run that can be moved between layouts."""

    def __init__(self, method: tk.Method, layout: Any) -> None:
        self.method, self.store = method, tk.Store()
        kernel = jax.random.normal(jax.random.key(0), SHAPE)
        self.params: Any = {"one": {"kernel": kernel, "bias": jnp.zeros(8)}}
        self._enter(layout)
        if layout == "masked":
            self.state = self.tx.init(self.params)
        else:
            self.params, self.state, self.store = tk.start(self.tx, self.params)

    def _enter(self, layout: Any) -> None:
        self.packed = layout != "masked"
        inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05))
        axes = tk.axes({"*/kernel": "s i o"})
        self.tx = tk.sparse(inner, self.method, layout=layout, seed=7, axes=axes)

    def move(self, layout: Any) -> None:
        self._enter(layout)
        self.params, self.state, self.store = tk.convert(
            self.tx, self.params, self.state, self.store
        )

    def steps(self, first: int, last: int) -> None:
        for t in range(first, last):
            due, found = self.packed and tk.due(self.tx, t + 1), None
            if due and self.method.probe:
                found = tk.probe(loss, self.params, self.state, t)
            grads = jax.grad(loss)(self.params, self.state, t)
            updates, self.state = self.tx.update(grads, self.state, self.params)
            self.params = optax.apply_updates(self.params, updates)
            if due:
                self.params, self.state, self.store = tk.refresh(
                    self.tx, self.params, self.state, self.store, found
                )


def assert_equal(one: Run, two: Run) -> None:
    """Same masks, weights, step and, in B, moments."""
    masks = [tk.dense_masks(run.state) for run in (one, two)]
    jax.tree.map(np.testing.assert_array_equal, masks[0][:2], masks[1][:2])
    weights = [tk.export(run.params, run.state) for run in (one, two)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *weights
    )
    assert int(one.state.sparse_step) == int(two.state.sparse_step)


@pytest.mark.parametrize(
    "name", ["top_kast", pytest.param("rigl", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "structure",
    [
        "groups",
        *(
            pytest.param(s, marks=pytest.mark.slow)
            for s in ("entries", "blocks", "fan_in", "n_of_m")
        ),
    ],
)
def test_a_run_moves_between_layouts(name, structure):
    """Between refreshes and just before a probe; masked, packed, block, masked."""
    method = METHODS[name](STRUCTURES[structure])
    stays, moves = Run(method, "masked"), Run(method, "masked")
    for layout, first, last in (
        ("packed", 0, 4), ("block", 4, 5), ("masked", 5, 8), ("packed", 8, 10),
    ):  # fmt: skip
        stays.steps(first, last)
        moves.steps(first, last)
        assert_equal(stays, moves)
        moves.move(layout)
        assert_equal(stays, moves)
        expected = (
            jax.eval_shape(moves.tx.init, stays.params) if layout == "masked" else None
        )
        if expected is not None:
            assert jax.tree.structure(expected) == jax.tree.structure(moves.state)
    stays.steps(10, 14)
    moves.steps(10, 14)
    assert_equal(stays, moves)


def test_what_is_kept_off_b_is_kept():
    run = Run(METHODS["top_kast"](tk.unstructured), "masked")
    run.steps(0, 4)
    before, state = run.params, run.state
    run.move("block")
    run.move("masked")
    jax.tree.map(np.testing.assert_array_equal, before, run.params)
    inside = np.asarray(tk.masks(state).backward["one"]["kernel"])
    for one, two in zip(
        jax.tree.leaves(state.sparse_inner),
        jax.tree.leaves(run.state.sparse_inner),
        strict=True,
    ):
        mark = inside if one.shape == inside.shape else ...
        np.testing.assert_array_equal(np.asarray(one)[mark], np.asarray(two)[mark])


def test_refusals():
    params = {"kernel": jnp.ones((4, 6))}
    one = tk.sparse(optax.sgd(0.1), tk.static(0.5))
    two = tk.sparse(optax.sgd(0.1), tk.top_kast(0.5, 0.5), layout="packed")
    with pytest.raises(ValueError, match="top_kast is not the method that trained"):
        tk.convert(two, params, one.init(params))
    method = tk.top_kast(0.5, 0.5, refresh=tk.every(3))
    late = tk.sparse(optax.sgd(0.1), method, refresh_delay=1)
    params = {"kernel": jax.random.normal(jax.random.key(0), (4, 6))}
    state = late.init(params)
    flipped = jax.tree.map(jnp.logical_not, state.sparse_next)
    packed = tk.sparse(optax.sgd(0.1), method, layout="packed")
    tk.convert(packed, params, state)
    with pytest.raises(ValueError, match="not yet in force"):
        tk.convert(packed, params, state._replace(sparse_next=flipped))
