"""Drawn candidates in the packed layouts: one pass, and few entries.

Nothing dense where units are multiplied; elsewhere a layer's gradient at a time.
"""

import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import sizes_in
from lockstep import EVERY, PLAIN, STACKED, assert_same, loss, run

import topkast_jax as tk

IN, OUT, ROWS = 384, 640, 7


def method(**options: Any) -> tk.Method:
    words = dict(subset=1.5, drop_fraction=0.5, refresh=tk.every(EVERY)) | options
    return tk.gse(0.8, distribution=tk.uniform, **words)


def start(layout: str, shape: tuple[int, ...] = PLAIN, **options: Any) -> Any:
    axes = tk.axes({"*/kernel": "s i o"}) if len(shape) == 3 else None
    tx = tk.sparse(
        optax.adam(0.05), method(**options), layout=layout, axes=axes, seed=7
    )
    kernel = jax.random.normal(jax.random.key(0), shape)
    return tx, *tk.start(tx, {"one": {"kernel": kernel, "bias": jnp.zeros(shape[-1])}})


BLOCKS, COLUMNS = tk.blocks(32, 64), tk.fan_in(32, 64)


@pytest.mark.parametrize(
    ("name", "structure", "more"),
    [
        ("gse", BLOCKS, dict(candidates="grabo")),
        pytest.param(
            "gse", COLUMNS, dict(candidates="uniform"), marks=pytest.mark.slow
        ),
        ("gse", tk.unstructured, dict(candidates="grabo")),
        ("set", tk.unstructured, {}),
        ("set", BLOCKS, {}),
        ("static", COLUMNS, {}),
        pytest.param("gse", BLOCKS, dict(candidates="uniform"), marks=pytest.mark.slow),
        pytest.param("gse", COLUMNS, dict(candidates="grabo"), marks=pytest.mark.slow),
        pytest.param("static", tk.unstructured, {}, marks=pytest.mark.slow),
    ],
)
def test_nothing_dense_in_the_block_layout(name, structure, more):
    """Neither in the step, nor in the probe, nor on the way to a refresh."""
    plain = structure == tk.unstructured
    options: dict[str, Any] = dict(structure=structure, distribution=tk.uniform)
    if name != "static":
        options |= dict(drop_fraction=0.5, refresh=tk.every(EVERY))
    made = tk.METHODS[name](0.99 if plain else 0.8, **options, **more)
    tx = tk.sparse(optax.adam(0.05), made, layout="block")
    shape = jax.ShapeDtypeStruct((IN, OUT), jnp.float32)
    theta, state, store = tk.start(tx, {"kernel": shape})
    x, y = jnp.ones((ROWS, IN)), jnp.ones((ROWS, OUT))

    def objective(theta: Any, state: Any, x: Any, y: Any, zeros: Any = None) -> Any:
        matrix = tk.sparsify(theta, tk.masks(state))["kernel"]
        found = tk.ops.sparse_matmul(x, matrix)
        if zeros is not None and zeros["kernel"] is not None:
            tapped = tk.Tapped(matrix, zeros["kernel"], None)
            found = tk.observe(x, found, tapped)
        return jnp.mean((found - y) ** 2)

    def step(theta: Any, state: Any) -> Any:
        zeros, stats = tk.taps(tx, theta, state) if name == "gse" else None, {}
        grads = jax.grad(objective, argnums=0 if zeros is None else (0, 4))(
            theta, state, x, y, zeros
        )
        if zeros is not None:
            grads, stats["stats"] = grads
        updates, state = tx.update(grads, state, theta, **stats)
        return optax.apply_updates(theta, updates), state

    programs = [jax.jit(step).lower(theta, state)]
    if name == "gse":
        programs.append(tk.probe_candidates.lower(objective, theta, state, (x, y)))
    # A, the activations and what was drawn are all smaller than half of the weight.
    for program in programs:
        sizes = sizes_in(program.compile().as_text())
        assert len(sizes) > 5
        assert max(sizes) < IN * OUT / 2, max(sizes)
    jitted, most = jax.jit(step), []
    for t in range(0 if name == "static" else 3 * EVERY):
        found = None
        due = bool(tk.due(tx, t + 1))
        if due and name == "gse":
            found = tk.probe(objective, theta, state, x, y)
        theta, state = jitted(theta, state)
        if not due:
            continue
        before = np.asarray(tk.masks(state).forward["kernel"].index)
        tracemalloc.start()
        theta, state, store = tk.refresh(tx, theta, state, store, found)
        most.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        after = np.asarray(tk.masks(state).forward["kernel"].index)
        assert after.shape == before.shape
        assert len(np.setdiff1d(after, before)) > 0
    if name != "static":
        assert jitted._cache_size() == 1 and len(most) == 3
        # A refresh takes some copies of B, once compiled; where B is small, that is
        # less than half of the weight.
        few = 4 * IN * OUT / 2 if plain else 64 * theta["kernel"].size
        assert most[-1] < few, most


STRUCTURES = {
    "blocks": tk.blocks(4, 2),
    "fan_in_blocks": tk.fan_in(2, 4),
    "groups_of_blocks": tk.groups_of(2, tk.blocks(4, 2)),
    "entries": tk.unstructured,
}
CELLS = [("grabo", "blocks", STACKED)]
REST = [
    (candidates, structure, shape)
    for candidates in ("uniform", "grabo")
    for structure in STRUCTURES
    for shape in (PLAIN, STACKED)
    if (candidates, structure, shape) not in CELLS
]


@pytest.mark.parametrize(
    ("candidates", "structure", "shape"),
    [*CELLS, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in REST)],
)
def test_every_layout_has_the_masks_of_the_masked_one(candidates, structure, shape):
    """To the bit, over six refreshes, statistics out of each layout's own product."""
    made = method(structure=STRUCTURES[structure], candidates=candidates)
    masked, packed, block = (run(x, made, shape) for x in ("masked", "packed", "block"))
    assert_same(masked, packed)
    assert_same(masked, block)
    refreshed = [t for t in range(1, len(masked)) if t % EVERY == EVERY - 1]
    moved = [(masked[t].forward != masked[t - 1].forward).any() for t in refreshed]
    assert len(moved) == 6 and sum(moved) >= 4


@pytest.mark.parametrize(
    ("structure", "shape"),
    [
        (tk.unstructured, PLAIN),
        (tk.fan_in(2, 4), STACKED),
        (tk.n_of_m(4), PLAIN),
    ],
)
def test_the_probe_sees_what_was_drawn(structure, shape):
    """Distinct units outside A, filled up with others, each with its own gradient."""
    tx, theta, state, _ = start("packed", shape, structure=structure)
    for t in range(EVERY - 1):
        updates, state = tx.update(jax.grad(loss)(theta, state, t), state, theta)
        theta = optax.apply_updates(theta, updates)
        drawn = np.asarray(tk.masks(state).probe["one"]["kernel"])
        assert (drawn >= 0).all() == (t == EVERY - 2)
        assert (drawn < 0).all() == (t != EVERY - 2)
    found = tk.probe(loss, theta, state, EVERY - 1)["one"]["kernel"]
    index = tk.masks(state).forward["one"]["kernel"]
    grid, slices = index.grid, index.grid.whole[0]
    kept = np.asarray(index.index).reshape(slices, -1)
    drawn = drawn.reshape(slices, -1)

    def dense(alpha: Any) -> Any:
        wave = jnp.arange(alpha.size).reshape(alpha.shape)
        return alpha - ((37 * wave + 11 * (EVERY - 1)) % 128 - 64) / 64.0

    units = grid.to_units(np.asarray(dense(tk.export(theta, state)["one"]["kernel"])))
    for s in range(slices):
        numbers, seen = np.asarray(found.index[s]), np.asarray(found.seen[s])
        assert len(set(numbers)) == len(numbers)
        assert not set(numbers) & set(kept[s].tolist())
        assert set(numbers[seen]) == set(drawn[s].tolist()) - set(kept[s].tolist())
        np.testing.assert_allclose(found.candidates[s], units[s][numbers], rtol=1e-6)
        assert 0 < seen.sum() < len(seen) + (structure.scope == "column")
    assert found.grad.shape == theta["one"]["kernel"].shape


@pytest.mark.parametrize(
    "structure", [tk.unstructured, tk.groups_of(2, tk.fan_in(2, 4))]
)
def test_what_was_drawn_goes_from_layout_to_layout(structure):
    """And so do the shapes, without computing anything."""
    tx, theta, state, store = start("packed", structure=structure, refresh=tk.every(1))
    masked, block = (
        tk.sparse(optax.adam(0.05), method(structure=structure, refresh=tk.every(1)), layout=layout, seed=7)
        for layout in ("masked", "block")
    )  # fmt: skip
    dense, there, _ = tk.convert(masked, theta, state, store)
    drawn = np.asarray(there.sparse_masks.probe["one"]["kernel"])
    assert drawn.any()
    np.testing.assert_array_equal(
        drawn, np.asarray(masked.init(dense).sparse_masks.probe["one"]["kernel"])
    )
    _, back, _ = tk.convert(block, dense, there)
    np.testing.assert_array_equal(tk.dense_masks(back).probe["one"]["kernel"], drawn)
    want = jax.tree.map(lambda x: (x.shape, x.dtype), (theta, state))
    found = tk.shapes(tx, dense)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == want
