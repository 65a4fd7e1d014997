"""Whole numbers in proportion, against exact fractions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles.loop import apportion as exact

from topkast_jax.apportion import apportion, whole_sum


def both(total, weights, room):
    names = [str(i) for i in range(len(room))]
    theirs = exact(
        total,
        dict(zip(names, map(float, weights), strict=True)),
        dict(zip(names, map(int, room), strict=True)),
    )
    ours = jax.jit(apportion)(total, jnp.asarray(weights), jnp.asarray(room))
    return ours.tolist(), list(theirs.values())


@pytest.mark.parametrize("seed", range(20))
def test_by_largest_remainders_within_the_room(seed):
    draw = np.random.default_rng(seed)
    room = draw.integers(0, 40, 7)
    weights = draw.integers(0, 9, 7).astype(np.int32) * draw.integers(0, 2, 7)
    total = int(draw.integers(0, room.sum() + 1))
    ours, theirs = both(total, weights.astype(np.int32), room)
    assert ours == theirs
    assert sum(ours) == total


def test_of_floats():
    weights = np.float32([0.3, 0.0, 1.7e-3, 12.5])
    ours, theirs = both(1000, weights, [500, 500, 500, 700])
    assert ours == theirs


def test_equal_remainders_go_to_the_first():
    # A third over for each of three: in floats 2.3333 and 5.3333 are not equally so.
    assert both(7, np.int32([1, 1, 1]), [9, 9, 9])[0] == [3, 2, 2]
    assert both(8, np.int32([4, 1, 1]), [9, 9, 9]) == ([6, 1, 1], [6, 1, 1])
    assert both(2, np.int32([0, 0, 0]), [1, 0, 5])[0] == [1, 0, 1]


def test_numbers_beyond_the_digits_of_a_float():
    weights, room = np.int32([10**9, 10**9 + 1]), [2**31 - 1] * 2
    ours, theirs = both(2_000_000_001, weights, room)
    assert ours == theirs == [1_000_000_000, 1_000_000_001]


def test_less_room_than_asked_for():
    assert apportion(9, jnp.array([1, 1]), jnp.array([2, 3])).tolist() == [2, 3]


@pytest.mark.parametrize("shape", [(300, 7), (5, 3000)])
def test_whole_sum_in_any_order(shape):
    x = np.abs(np.random.default_rng(0).normal(size=shape)).astype(np.float32)
    found = whole_sum(jnp.asarray(x), (0,))
    # Each is cut off after 24 digits of the largest.
    cut = shape[0] * 2.0**-23 * x.max()
    np.testing.assert_allclose(found[0], x.astype(np.float64).sum(0), 1e-7, cut)
    order = np.random.default_rng(1).permutation(shape[0])
    np.testing.assert_array_equal(found, whole_sum(jnp.asarray(x[order]), (0,)))
    assert not whole_sum(jnp.zeros((2, 3)), (0, 1)).any()
