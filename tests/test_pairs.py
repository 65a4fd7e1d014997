"""Draws of rows and columns: exact integers, the right shares, the same in every layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import gse

import topkast_jax as tk
from topkast_jax import pairs
from topkast_jax._trees import axes
from topkast_jax.forward import listed
from topkast_jax.grid import grid as grid_of
from topkast_jax.layouts.host import HostLeaf
from topkast_jax.layouts.masked import MaskedLeaf
from topkast_jax.layouts.packed import Index, PackedLeaf
from topkast_jax.layouts.selections import set_of
from topkast_jax.portion import ceiling

KEY = jax.random.key(3)


def test_integers_are_in_proportion_and_never_overflow():
    assert pairs.integers(jnp.array([[1.0, 3.0, 0.0]])).tolist() == [
        [2**28, 3 * 2**28, 0]
    ]
    assert pairs.integers(jnp.zeros((1, 3))).tolist() == [[1, 1, 1]]
    # Of a 2^-b-th of the largest nothing is left; of subnormal numbers neither.
    small = pairs.integers(jnp.array([[1.0, 2.0**-40, 1e-40]]))[0]
    assert small.tolist()[1:] == [0, 0]
    for m in (1, 2, 5, 64, 1000):
        weights = np.random.default_rng(m).exponential(size=(1, m)).astype(np.float32)
        for same in (weights, np.ones_like(weights)):
            found = np.asarray(pairs.integers(jnp.asarray(same)))[0].astype(np.uint64)
            spare = (m - 1).bit_length()
            assert 2 ** (31 - spare) <= found.max() and found.sum() < 2**32
            share = found / found.sum()
            np.testing.assert_allclose(share, (same / same.sum())[0], atol=1e-6)


@pytest.mark.parametrize("weights", [[3.0, 3.0, 0.0, 2.0], [1.0, 0.0, 0.0, 7.0, 8.0]])
def test_draws_are_those_of_the_inverse_cdf(weights):
    words = np.asarray(jax.random.bits(KEY, (1, 4000), jnp.uint32))
    edges = np.array([[0, 2**31 - 1, 2**31, 2**32 - 1]], np.uint32)
    words = np.concatenate([words, edges], axis=1)
    found = pairs._pick(jnp.array([weights]), jnp.asarray(words))[0]
    expected = gse.inverse_cdf(weights, words[0] / 2**32)
    np.testing.assert_array_equal(found, expected)


def site(structure, shape, letters):
    roles = axes({"w": letters}).resolve({"w": shape})["w"]
    return grid_of(structure, "w", shape, roles)


def test_pairs_come_in_proportion_to_the_product():
    f, g = np.array([1.0, 2.0, 5.0]), np.array([4.0, 0.0, 3.0, 1.0])
    grid = site(tk.unstructured, (3, 4), "i o")
    n = 20_000
    _, rows, columns = pairs.draw(KEY, n, grid, f[:, None], g[None])
    counts = np.zeros((3, 4))
    np.add.at(counts, (np.asarray(rows)[0], np.asarray(columns)[0]), 1)
    share = np.outer(f / f.sum(), g / g.sum())
    # Twelve binomial counts within 4.5 deviations: one failure in ten thousand keys.
    assert (abs(counts - n * share) <= 4.5 * np.sqrt(n * share * (1 - share))).all()
    assert (counts[:, 1] == 0).all()


CELLS = [
    (tk.unstructured, (12, 8), "i o"),
    (tk.unstructured, (8, 12), "o i"),
    (tk.unstructured, (3, 4, 2, 8), "i i s o"),
    (tk.blocks(4, 2), (2, 12, 8), "s i o"),
    (tk.blocks(4, 2), (8, 3, 4), "o i i"),
    (tk.fan_in(), (8, 2, 12), "o s i"),
    (tk.fan_in(2, 4), (2, 12, 8), "s i o"),
    (tk.n_of_m(4), (2, 12, 8), "s i o"),
    (tk.groups_of(2), (12, 8), "i o"),
    (tk.groups_of(2, tk.blocks(2, 2), along="inputs"), (12, 2, 8), "i s o"),
    (tk.groups_of(2, tk.n_of_m(3)), (12, 2, 8), "i s o"),
]


@pytest.mark.parametrize(
    ("structure", "shape", "letters"),
    [
        pytest.param(*cell, marks=[pytest.mark.slow] if i % 3 else [])
        for i, cell in enumerate(CELLS)
    ],
)
def test_every_layout_draws_the_same_units(structure, shape, letters):
    grid = site(structure, shape, letters)
    rng = np.random.default_rng(0)
    kinds = letters.split()
    sides = [
        rng.exponential(size=[1 if k in gone else n for k, n in zip(kinds, shape, strict=True)])
        .astype(np.float32)
        for gone in (("o",), ("i",))
    ]  # fmt: skip
    counts = tk.Counts(1, 1)
    off = jnp.zeros(shape, bool)
    masked = MaskedLeaf(jnp.zeros(shape), off, off, off, "w", grid, counts, KEY)
    mask = np.asarray(masked.pairs(5, *sides))
    rows = grid.whole[0] * grid.selections
    empty = np.zeros((rows, 0))
    every = np.arange(rows)
    host = HostLeaf(grid, counts, "w", KEY, every, empty, empty, empty, empty, empty)
    found = host.pairs(5, *sides)
    np.testing.assert_array_equal(found, set_of(grid, mask))
    index = Index(jnp.zeros((*grid.stack, grid.selections), jnp.int32), grid, 1)
    packed = PackedLeaf(None, None, index, "w", KEY).pairs(5, *sides)
    assert packed.shape == (*grid.stack, 5 * grid.selections)
    np.testing.assert_array_equal(listed(index, packed), mask)
    held = masked.count(jnp.asarray(mask))
    assert (held >= 1).all() and (held <= 5).all()
    # Fewer draws of a longer row are its first ones.
    fewer = masked.pairs(jnp.int32(3), *sides, most=5)
    assert not (fewer & ~mask).any() and (masked.count(fewer) <= 3).all()
    # By selection, and back.
    numbers = packed.reshape(grid.whole[0], grid.selections, -1)
    again = grid.of_selections(grid.within_selections(numbers))
    np.testing.assert_array_equal(again, numbers)


def test_statistics_of_blocks_are_sums():
    grid = site(tk.blocks(2, 2), (4, 4), "i o")
    f = jnp.array([1.0, 2.0, 0.0, 0.0])[:, None]
    g = jnp.array([0.0, 0.0, 3.0, 4.0])[None]
    rows, columns = grid.sides(f, g)
    assert (rows.tolist(), columns.tolist()) == ([[3.0, 0.0]], [[0.0, 7.0]])
    _, i, j = pairs.draw(KEY, 50, grid, f, g)
    assert set(i.ravel().tolist()) == {0} and set(j.ravel().tolist()) == {1}


@pytest.mark.parametrize(
    ("share", "k", "expected"),
    [(0.07, 100, 7), (0.2, 11, 3), (0.0, 5, 0), (1.0, 5, 5), (0.001, 5, 1)],
)
def test_ceilings_forgive_rounding(share, k, expected):
    assert ceiling(share, k) == expected
    assert int(ceiling(jnp.float32(share), k)) == expected
