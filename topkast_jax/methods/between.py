"""Entries that move between parameters while their total is constant: SNFS and DSR."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from topkast_jax._types import Entries, Leaf
from topkast_jax.apportion import apportion, flat, split
from topkast_jax.draw import LARGEST_SLICE
from topkast_jax.structure import Structure


def require_movable(structure: Structure, what: str) -> None:
    """Raises ValueError for patterns that fix how many units each selection keeps."""
    if structure.scope != "slice" or structure.parts != 1:
        raise ValueError(
            f"{what} moves entries between parameters, but {structure.name} keeps as "
            "many in every column or group; use tk.unstructured or tk.blocks(...)"
        )


def counts_of(leaves: list[Leaf]) -> tuple[list[Array], int]:
    """Units of A in every selection of every parameter, and their constant total.

    Raises:
      ValueError: units of several sizes, or more of them than an int32 can count.
    """
    counts = [leaf.count(leaf.forward) for leaf in leaves]
    units = {
        math.prod(leaf.shape) // (leaf.size * count.size): leaf.path
        for leaf, count in zip(leaves, counts, strict=True)
    }
    if len(units) > 1:
        (one, first), (two, second), *_ = units.items()
        raise ValueError(
            f"units of {first!r} have {one} entries, those of {second!r} {two}: moving "
            "them would change the total; choose blocks that divide both, or exclude "
            "one with where"
        )
    pairs = zip(leaves, counts, strict=True)
    total = sum(leaf.counts.forward * c.size for leaf, c in pairs)
    if total > LARGEST_SLICE:
        raise ValueError(
            f"{total} entries over all parameters: those that move between parameters "
            f"are counted by int32, at most {LARGEST_SLICE}; use several methods "
            "(tk.groups)"
        )
    return counts, total


def regrowth(
    leaves: list[Leaf], kept: list[Entries], total: int, weights: Array
) -> list[Any]:
    """How many units each selection is to grow, in proportion to weights.

    Args:
      leaves: the parameters.
      kept: the set that stays, of each.
      total: units over all of them, after the growth.
      weights: of every selection of every parameter, in one list.
    Returns:
      Numbers that the verbs of each leaf take. With those kept they add up to `total`.
    """
    counts = [leaf.count(k) for leaf, k in zip(leaves, kept, strict=True)]
    room = flat([leaf.size - c for leaf, c in zip(leaves, counts, strict=True)])
    return split(apportion(total - jnp.sum(flat(counts)), weights, room), counts)
