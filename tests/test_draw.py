"""A random order that dense and packed layouts can both follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import topkast_jax as tk
from topkast_jax._types import Axes
from topkast_jax.draw import bits_for, position_of, random_order, rank_of


@pytest.mark.parametrize("size", [1, 2, 3, 8, 100, 1000])
def test_ranks_are_distinct_and_invert(size):
    key = jax.random.key(size)
    ranks = rank_of(key, jnp.arange(size), size)
    assert len(set(np.asarray(ranks).tolist())) == size
    assert int(ranks.max()) < 2 ** bits_for(size)
    np.testing.assert_array_equal(position_of(key, ranks, size), np.arange(size))


@pytest.mark.parametrize(("size", "k"), [(3, 1), (8, 3), (60, 20), (500, 50)])
def test_draws_are_uniform(size, k):
    """Each entry, and each pair of entries, as often as chance has it."""
    draws = 3000
    keys = jax.random.split(jax.random.key(0), draws)
    masks = np.asarray(jax.vmap(lambda key: tk.random_k(key, k, (size,)))(keys))
    assert (masks.sum(1) == k).all()
    share = k / size
    deviation = np.sqrt(share * (1 - share) / draws)
    assert np.abs(masks.mean(0) - share).max() < 5 * deviation
    pair = k * (k - 1) / size / (size - 1)
    together = masks.T.astype(np.float64) @ masks / draws
    off = together[~np.eye(size, dtype=bool)]
    assert np.abs(off - pair).max() < 6 * np.sqrt(max(pair, 1 / draws) / draws)


def test_among_and_slices():
    roles = Axes(stack=(0,), window=(), inputs=(1,), outputs=(2,))
    among = jnp.arange(5 * 8 * 6).reshape(5, 8, 6) % 3 > 0
    got = tk.random_k(jax.random.key(2), 9, (5, 8, 6), roles, among)
    np.testing.assert_array_equal(got.sum((1, 2)), [9] * 5)
    assert not bool((got & ~among).any())
    assert len({np.asarray(one).tobytes() for one in got}) == 5  # drawn apart


def test_order_is_that_of_each_slice_alone():
    """A packed layout that holds one slice draws what the dense one draws there."""
    roles = Axes(stack=(1,), window=(), inputs=(0,), outputs=(2,))
    key = jax.random.key(4)
    order = random_order(key, (6, 3, 7), roles)
    for i in range(3):
        alone = rank_of(jax.random.fold_in(key, i), jnp.arange(42), 42)
        np.testing.assert_array_equal(order[:, i].ravel(), alone)
