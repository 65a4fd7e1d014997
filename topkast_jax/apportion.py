"""Whole numbers in proportion: how many entries each parameter is to get.

In exact arithmetic of 32 bits, so that the same numbers come out on any mesh.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from topkast_jax.select import top_k

_DIGITS = 24  # of the significand of a float32


def apportion(
    total: Any, weights: Shaped[Array, " n"], room: Int[Array, " n"]
) -> Int[Array, " n"]:
    """Integers in proportion to `weights` that add up to `total`, none above its room.

    By largest remainders, ties to the first. What does not fit goes to those that have
    room, again in proportion, or equally among them where all their weights are zero.

    Args:
      total: below 2^31; may be traced. Where there is less room, all of it is given.
      weights: not negative; integers (their sum below 2^31), or floats, which count to
        about 24 digits.
      room: the most that each may get.
    Returns:
      int32 of the shape of `room`.
    Example:
      >>> apportion(7, jnp.array([1, 2, 3]), jnp.array([9, 9, 3])).tolist()
      [1, 3, 3]
    """
    if jnp.issubdtype(weights.dtype, jnp.floating):
        limits: Any = jnp.finfo
        most = jnp.maximum(jnp.sum(weights), limits(weights.dtype).tiny)
        weights = jnp.round(weights / most * 2.0**30)
    shares = weights.astype(jnp.uint32)
    room = room.astype(jnp.int32)

    def unfinished(given: Array) -> Array:
        return (jnp.sum(given) < total) & (given < room).any()

    def hand_out(given: Array) -> Array:
        left = (total - jnp.sum(given)).astype(jnp.uint32)
        open_ = given < room
        mine = jnp.where(open_, shares, jnp.zeros_like(shares))
        equally = open_.astype(jnp.uint32)
        mine = jnp.where((mine > 0).any(), mine, equally)
        extra, rest = _times_over(left, mine, jnp.sum(mine, dtype=jnp.uint32))
        short = left - jnp.sum(extra, dtype=jnp.uint32)
        more = extra + top_k(rest, short.astype(jnp.int32), among=open_)
        return jnp.minimum(given + more.astype(jnp.int32), room)

    start = jnp.zeros_like(room)
    return lax.while_loop(unfinished, hand_out, start)


def _times_over(a: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """Quotient and remainder of a * b / c, for a, c below 2^31 and b up to c; uint32."""

    def bit(i: Any, found: tuple[Array, Array]) -> tuple[Array, Array]:
        quotient, rest = found
        one = (a >> (30 - i).astype(jnp.uint32)) & jnp.uint32(1)
        rest = 2 * rest
        over = (rest >= c).astype(jnp.uint32)
        rest = rest - over * c + one * b
        again = (rest >= c).astype(jnp.uint32)
        return 2 * quotient + over + again, rest - again * c

    nothing = jnp.zeros_like(b)
    return lax.fori_loop(0, 31, bit, (nothing, nothing))


def whole_sum(x: Shaped[Array, "..."], axes: tuple[int, ...]) -> Shaped[Array, "..."]:
    """Sum of numbers that are not negative, over `axes`, which stay as 1.

    Of whole numbers, the largest entry having 24 digits: so the order in which devices
    add makes no difference.

    Args:
      x: floats, less than 2^31 of them to add.
      axes: to add over.
    Returns:
      float32.
    Example:
      >>> whole_sum(jnp.array([[1.0, 0.5], [3.0, 0.25]]), (1,)).tolist()
      [[1.5], [3.25]]
    """
    size = 1
    for axis in axes:
        size *= x.shape[axis]
    width = max(1, 31 - size.bit_length())  # of a digit: sums of them fit an int32
    x = x.astype(jnp.float32)
    exponent = lax.bitcast_convert_type(jnp.max(x), jnp.int32) >> 23
    # A power of two, by its bits, that brings the largest entry to 24 digits.
    scale = lax.bitcast_convert_type(
        jnp.clip(253 + _DIGITS - exponent, 1, 254) << 23, jnp.float32
    )
    whole = (x * scale).astype(jnp.int32)
    found = jnp.zeros((), jnp.float32)
    for low in range(0, _DIGITS, width):
        digit = (whole >> low) & (2**width - 1)
        part = jnp.sum(digit, axis=axes, keepdims=True, dtype=jnp.int32)
        found = found + part.astype(jnp.float32) * 2.0**low
    return found / scale


def flat(counts: list[Array]) -> Array:
    """Numbers of several parameters as one list; `split` undoes it."""
    return jnp.concatenate([jnp.ravel(c) for c in counts])


def split(numbers: Array, like: list[Array]) -> list[Array]:
    """A list of numbers, in the shapes of `like`."""
    out, start = [], 0
    for each in like:
        part = lax.slice_in_dim(numbers, start, start + each.size)
        out.append(part.reshape(each.shape))
        start += each.size
    return out
