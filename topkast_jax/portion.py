"""Shares of a number of units as whole numbers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from topkast_jax.grid import Grid

_PORTION = 2**32 - 1
"""Folded into a leaf's key for `portion`; no slice has this number."""


def ceiling(share: Any, k: Any) -> Any:
    """ceil(share * k), where a product within a millionth of an integer is that integer.

    In floating point .07 * 100 is above 7, and differently so in every precision.

    Args:
      share: a number or a traced scalar.
      k: an int, or an integer array.
    Returns:
      An int; int32 where something is an array.
    Example:
      >>> ceiling(0.07, 100), ceiling(0.2, 11)
      (7, 3)
    """
    product = share * k
    if isinstance(product, Array):
        nearest = jnp.round(product)
        same = abs(product - nearest) <= 1e-6 * product
        return jnp.where(same, nearest, jnp.ceil(product)).astype(jnp.int32)
    nearest = round(product)
    same = abs(product - nearest) <= 1e-6 * product
    return nearest if same else math.ceil(product)


def portion(share: Any, k: Any, grid: Grid, key: jax.Array, up: bool = False) -> Any:
    """`share * k` as a number of units of a selection.

    Rounded. Where a slice has several selections or groups, each is rounded up or down at random,
    so that the total comes out: 0.3 of 1 would be 0 in each of them.

    Args:
      share: in [0, 1], a number or a traced scalar.
      k: units that a selection keeps: an int, a traced scalar, or as many numbers as
        `Leaf.count` gives.
      grid: the units.
      key: of the leaf at this step.
      up: rounded up, where a slice is one selection.
    Returns:
      An int, a scalar, or an array with one number for each selection, in the shape of
      `grid.array` with 1 for the axes within.
    """
    wanted = share * (k if isinstance(k, int) else jnp.asarray(k, jnp.float32))
    if grid.selections * grid.structure.parts == 1:
        if up:
            return ceiling(share, k)
        if not isinstance(wanted, Array):
            return round(wanted)
        return jnp.minimum(jnp.round(wanted).astype(jnp.int32), k)
    within = grid.roles.within
    shape = [1 if a in within else n for a, n in enumerate(grid.array)]
    noise = jax.random.uniform(jax.random.fold_in(key, jnp.uint32(_PORTION)), shape)
    return jnp.minimum(jnp.floor(wanted + noise).astype(jnp.int32), k)
