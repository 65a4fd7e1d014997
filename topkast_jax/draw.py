"""Random order of positions that every layout can follow, entry by entry.

A draw without replacement is the start of a random permutation. Here the permutation is
a keyed bijection of integers, so that a dense layout asks for the rank of each position
(elementwise, hence sharded like the weight and equal on any mesh), and a packed layout
asks for the position of each rank (as many as it needs, no dense array): both draw the
same entries from the same key.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt

from topkast_jax._types import Axes

_ROUNDS = 4
LARGEST_SLICE = 2**31 - 1


def bits_for(size: int) -> int:
    """Width of the bijection: ranks of `size` positions lie in [0, 2**bits)."""
    if size > LARGEST_SLICE:
        raise ValueError(
            f"a slice of {size} entries: positions are int32, at most {LARGEST_SLICE}; "
            "declare a stack axis (tk.axes) or split the parameter"
        )
    return max(1, (size - 1).bit_length())


def _constants(key: jax.Array) -> tuple[Array, Array]:
    """Odd multipliers and addends of the rounds, uint32 [rounds] each."""
    words = jax.random.bits(key, (2, _ROUNDS), jnp.uint32)
    return words[0] | jnp.uint32(1), words[1]


def rank_of(key: jax.Array, position: Array, size: int) -> Array:
    """Rank of each position in the random order of `key`; distinct, in [0, 2**bits).

    Args:
      key: typed PRNG key.
      position: integers in [0, size), any shape.
      size: number of positions.
    Returns:
      uint32 of the shape of `position`. Gaps are possible: only the order counts.
    """
    return _scramble(_constants(key), position, bits_for(size))


def _scramble(constants: tuple[Array, Array], position: Array, bits: int) -> Array:
    multiplier, addend = constants
    low = jnp.uint32(2**bits - 1)
    x = position.astype(jnp.uint32)
    for r in range(_ROUNDS):
        x = (x * multiplier[..., r] + addend[..., r]) & low
        x = x ^ (x >> ((bits + 1) // 2))
    return x


def position_of(key: jax.Array, rank: Array, size: int) -> Array:
    """Inverse of `rank_of`: the position of each rank; `>= size` means there is none.

    Args:
      key: typed PRNG key.
      rank: integers in [0, 2**bits_for(size)), any shape.
      size: number of positions.
    Returns:
      uint32 of the shape of `rank`.
    """
    multiplier, addend = _constants(key)
    bits = bits_for(size)
    low = jnp.uint32(2**bits - 1)
    x = rank.astype(jnp.uint32)
    for r in reversed(range(_ROUNDS)):
        x = x ^ (x >> ((bits + 1) // 2))  # its own inverse: the shift is half the width
        x = ((x - addend[r]) * _odd_inverse(multiplier[r])) & low
    return x


def _odd_inverse(odd: Array) -> Array:
    """Inverse of an odd uint32 modulo 2**32, by Newton's iteration."""
    x = odd
    for _ in range(5):
        x = x * (jnp.uint32(2) - odd * x)
    return x


def linear_index(shape: tuple[int, ...], within: tuple[int, ...]) -> UInt[Array, "..."]:
    """C-order index of each entry inside its slice; uint32 of the full shape."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(within):
        index += jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        stride *= shape[axis]
    return index


def random_order(
    key: jax.Array, shape: tuple[int, ...], roles: Axes | None = None
) -> Shaped[Array, "..."]:
    """Rank of every entry of a leaf in a random order, drawn apart for each slice.

    Args:
      key: typed PRNG key; slice s uses `fold_in(key, s)`.
      shape: of the leaf.
      roles: its axes; None reads the whole leaf as one slice.
    Returns:
      uint32 of `shape`, distinct within a slice.
    """
    stack = roles.stack if roles else ()
    within = roles.within if roles else tuple(range(len(shape)))
    size, copies = 1, 1
    for axis in within:
        size *= shape[axis]
    for axis in stack:
        copies *= shape[axis]
    keys = jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.arange(copies))
    lead = tuple(shape[a] if a in stack else 1 for a in range(len(shape)))

    def spread(words: Array) -> Array:
        return words.reshape(*lead, _ROUNDS)

    constants: Any = jax.vmap(_constants)(keys)
    multiplier, addend = map(spread, constants)
    return _scramble((multiplier, addend), linear_index(shape, within), bits_for(size))


def _host_constants(key: jax.Array, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of `random_order` for some slices, [rows, 1, rounds] each."""
    keys = jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.asarray(rows, jnp.int32))
    multiplier, addend = jax.vmap(_constants)(keys)
    return np.asarray(multiplier)[:, None], np.asarray(addend)[:, None]


def ranks_on_host(
    key: jax.Array, places: np.ndarray, size: int, rows: np.ndarray
) -> np.ndarray:
    """`random_order` at some positions only, in NumPy.

    Args:
      key: as for `random_order`.
      places: [slices, n] positions within each slice; or [n] of the slices `rows`.
      size: of a slice.
      rows: [slices], their numbers.
    Returns:
      uint32 of the shape of `places`.
    """
    multiplier, addend = _host_constants(key, rows)
    bits = bits_for(size)
    x = places.astype(np.uint32)
    for r in range(_ROUNDS):
        x = (x * multiplier[..., r] + addend[..., r]) & np.uint32(2**bits - 1)
        x ^= x >> np.uint32((bits + 1) // 2)
    return x


def positions_on_host(
    key: jax.Array, rows: np.ndarray, ranks: int, size: int
) -> np.ndarray:
    """Positions of the first `ranks` ranks of `random_order`, in NumPy.

    Args:
      key: as for `random_order`.
      rows: numbers of the slices.
      ranks: how many.
      size: of a slice.
    Returns:
      int64 [rows, ranks]; `>= size` means there is none.
    """
    multiplier, addend = _host_constants(key, rows)
    inverse = multiplier.copy()
    for _ in range(5):
        inverse = inverse * (np.uint32(2) - multiplier * inverse)
    bits = bits_for(size)
    x = np.broadcast_to(np.arange(ranks, dtype=np.uint32), (len(rows), ranks)).copy()
    for r in reversed(range(_ROUNDS)):
        x ^= x >> np.uint32((bits + 1) // 2)
        x = ((x - addend[..., r]) * inverse[..., r]) & np.uint32(2**bits - 1)
    return x.astype(np.int64)
