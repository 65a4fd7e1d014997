"""Draws of units by row and column, each by its own probabilities, in O(n + in + out).

Exact integers decide, so that every layout, backend and mesh draws the same units:
weights are cut to integers by their bits, and a draw is looked up among their sums.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, UInt

from topkast_jax.grid import Grid

_PAIRS = 2**32 - 3
"""Folded into a leaf's key for `draw`; no slice has this number."""


def draw(
    key: jax.Array, n: int, grid: Grid, inputs: Any = None, outputs: Any = None
) -> tuple[Array, Array, Array]:
    """`n` draws with replacement in every selection: a row ~ f and a column ~ g.

    Row and column are independent, so that unit (i, j) is drawn in proportion to
    f_i g_j among the units of its selection. Where a selection is one column, or M
    neighbours in it, that leaves the rows to be drawn.

    Args:
      key: of the leaf at this step.
      n: draws in each selection.
      grid: the units.
      inputs: f, not negative, shaped like the parameter but for 1 along its outputs.
        Of a unit with several rows: their sum. None, or only zeros: all alike.
      outputs: g, likewise, with 1 along window and inputs.
    Returns:
      slices, rows and columns of the units, int32 [slices, ..., n].
    Reference:
      Heddes et al., 2024, arXiv 2401.06898: sample(f, g, n).
    """
    slices, rows, columns = grid.units[0], grid.units[1], grid.units[-1]
    shape: tuple[int, ...] = (slices, n)
    if grid.structure.scope == "column":
        shape = (slices, columns, n)
    elif grid.structure.scope == "group":
        shape = (slices, grid.units[1], columns, n)
        rows *= grid.units[2]
    f: Any = jnp.zeros((slices, rows))
    g: Any = jnp.zeros((slices, columns))
    if inputs is not None:
        f, g = grid.sides(jnp.asarray(inputs), jnp.asarray(outputs))
    words = jax.random.bits(
        jax.random.fold_in(key, jnp.uint32(_PAIRS)), (2, *shape), jnp.uint32
    )
    lead = [
        lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(len(shape) - 1)
    ]
    if grid.structure.scope == "slice":
        row, column = _pick(f, words[0]), _pick(g, words[1])
        return lead[0], row, column
    if grid.structure.scope == "column":
        row = _pick(f, words[0].reshape(slices, -1)).reshape(shape)
        return lead[0], row, lead[1]
    per = grid.units[2]
    inside = _pick(f.reshape(-1, per), words[0].reshape(slices * grid.units[1], -1))
    return lead[0], lead[1] * per + inside.reshape(shape), lead[2]


def _pick(weights: Array, words: UInt[Array, "slices n"]) -> Int[Array, "slices n"]:
    """Numbers drawn in proportion to weights [slices, m], by 32 random bits each."""
    sums = jnp.cumsum(integers(weights), axis=1, dtype=jnp.uint32)
    at = _scaled(words, sums[:, -1:])
    found = jax.vmap(lambda s, x: jnp.searchsorted(s, x, side="right"))(sums, at)
    return found.astype(jnp.int32)


def integers(weights: Array) -> UInt[Array, "slices m"]:
    """Weights [slices, m] as integers in proportion, whose sum is below 2^32.

    Cut down, never rounded by a division: the largest becomes 2^b or more for m numbers
    below 2^(b + 1), and what is smaller than a 2^b-th of it becomes 0. All ones where
    every weight is zero. Subnormal numbers count as zero, as some backends have it.

    Example:
      >>> integers(jnp.array([[1.0, 3.0, 0.0]])).tolist()
      [[268435456, 805306368, 0]]
    """
    m = weights.shape[1]
    bits = lax.bitcast_convert_type(weights.astype(jnp.float32), jnp.uint32)
    exponent = (bits >> 23) & 0xFF
    mantissa = ((bits & 0x7FFFFF) | 0x800000) << 8
    largest = exponent.max(axis=1, keepdims=True)
    down = largest - exponent + (m - 1).bit_length()
    cut = jnp.where(down < 32, mantissa >> jnp.minimum(down, 31), jnp.uint32(0))
    cut = jnp.where(exponent == 0, jnp.uint32(0), cut)
    return jnp.where(largest == 0, jnp.uint32(1), cut)


def _scaled(words: Array, total: Array) -> Array:
    """floor(words * total / 2^32), in 32 bits."""
    a, b = words >> 16, words & 0xFFFF
    c, d = total >> 16, total & 0xFFFF
    middle = a * d + ((b * d) >> 16)
    low = b * c + (middle & 0xFFFF)
    return a * c + (middle >> 16) + (low >> 16)
