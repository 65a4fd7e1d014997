"""Sets on the host, and the order in which units lie: by slice, and by selection."""

from typing import Any

import numpy as np
from jaxtyping import Int

from topkast_jax._types import LeafMasks
from topkast_jax.grid import Grid

Set = Int[np.ndarray, " _"]
"""A set of units: sorted int64, selection * size + position within the selection.

Selections have the numbers that they have in the whole parameter, also where a process
holds some of its slices (`layouts.share`).
"""


TABLE = 16
"""Keys are looked up in a table where that is at most so many times as long as the
set, which keeps its bytes a multiple of the set's; by bisection where it is longer."""


def set_of(grid: Grid, mask: Any) -> Set:
    """A mask of entries, made of whole units, as a set."""
    units = grid.to_units(np.asarray(mask))
    units = units[(..., *(0 for _ in grid.unit))]
    if not grid.row_per_slice:
        array, roles = grid.stored_array
        units = units.reshape(array).transpose(*roles.stack, *roles.within)
    return np.flatnonzero(units)


def numbered(grid: Grid, masks: LeafMasks, slices: int) -> np.ndarray:
    """int32 [slices, n_B] of `Index`: numbers of units, A first, each part by selection.

    Args:
      grid: units of the parameter.
      masks: A and B.
      slices: how many they are of.
    """
    forward, backward = masks.forward, masks.backward
    rest = backward[~contains(forward, backward)]
    parts = []
    for part in (forward, rest):
        owner, units = to_units(grid, part)
        # Selections of a slice follow each other, unless outputs come before the stack.
        order = np.argsort(owner, kind="stable")
        parts.append(units[order].reshape(slices, -1))
    return np.concatenate(parts, axis=1).astype(np.int32)


def contains(members: Set, keys: np.ndarray) -> np.ndarray:
    """Which keys are in a sorted set."""
    if not len(members) or not len(keys):
        return np.zeros(keys.shape, bool)
    span = 1 + max(members[-1], keys.max())
    if span <= TABLE * len(members):
        marks = np.zeros(span, bool)
        marks[members] = True
        return marks[keys]
    at = np.searchsorted(members, keys)
    return members[np.minimum(at, len(members) - 1)] == keys


def find(members: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Where each key stands in `members`, int32 in any order; -1 where it does not."""
    if not len(members):
        return np.full(keys.shape, -1, np.int64)
    span = 1 + max(members.max(), keys.max(initial=0))
    if span <= TABLE * len(members):
        table = np.full(span, -1, np.int32)
        table[members] = np.arange(len(members), dtype=np.int32)
        return table[keys].astype(np.int64)
    order = np.argsort(members, kind="stable")
    ranked = members[order]
    at = np.minimum(np.searchsorted(ranked, keys), len(ranked) - 1)
    return np.where(ranked[at] == keys, order[at], -1)


def to_units(grid: Grid, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(slice, unit) of selection keys."""
    if grid.row_per_slice:
        return keys // grid.count, keys % grid.count
    array, roles = grid.stored_array
    selection = np.unravel_index(keys // grid.size, [array[a] for a in roles.stack])
    position = np.unravel_index(keys % grid.size, [array[a] for a in roles.within])
    where: dict[int, np.ndarray] = dict(zip(roles.stack, selection, strict=True))
    where |= dict(zip(roles.within, position, strict=True))
    flat = np.ravel_multi_index([where[a] for a in range(len(array))], array)
    return flat // grid.count, flat % grid.count


def to_keys(grid: Grid, flat: np.ndarray) -> np.ndarray:
    """Selection keys of units, slice * units of a slice + number."""
    if grid.row_per_slice:
        return flat
    array, roles = grid.stored_array
    where = np.unravel_index(flat, array)
    selection = np.ravel_multi_index(
        [where[a] for a in roles.stack], [array[a] for a in roles.stack]
    )
    position = np.ravel_multi_index(
        [where[a] for a in roles.within], [array[a] for a in roles.within]
    )
    return selection * grid.size + position


def selections_of(grid: Grid, own: np.ndarray) -> np.ndarray:
    """Numbers of the selections in each of some slices, [own, selections]."""
    if grid.row_per_slice:
        return own[:, None]
    array, roles = grid.stored_array
    first = _slice_axes(grid)
    rest = [a for a in roles.stack if a >= first]
    where: dict[int, np.ndarray] = {}
    for axes, numbers in (
        (rest, np.arange(grid.selections)),
        (range(first), own[:, None]),
    ):
        if axes:
            found = np.unravel_index(numbers, [array[a] for a in axes])
            where |= dict(zip(axes, found, strict=True))
    lead = [np.broadcast_to(where[a], (len(own), grid.selections)) for a in roles.stack]
    return np.ravel_multi_index(lead, [array[a] for a in roles.stack]).astype(np.int64)


def rows_of(grid: Grid, own: np.ndarray) -> np.ndarray:
    """Numbers of the selections in some slices, ascending."""
    if len(own) == grid.whole[0]:
        return np.arange(len(own) * grid.selections)
    return np.sort(selections_of(grid, own), axis=None)


def _slice_axes(grid: Grid) -> int:
    """How many axes of `grid.stored_array` count slices: the first ones."""
    return len(grid.stack) if grid.plain else 1


def selection_places(
    grid: Grid, index: np.ndarray, own: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a list of units by selection.

    Args:
      grid: units of the parameter.
      index: [own, n] numbers of units, the same number in each selection.
      own: numbers of the slices.
    Returns:
      places [selections, m], ascending, and [selections, m], where in the flattened
      list each of them stands.
    """
    keys = to_keys(
        grid, (own.astype(np.int64)[:, None] * grid.count + index).reshape(-1)
    )
    order = np.argsort(keys, kind="stable")
    rows = len(own) * grid.selections
    return keys[order].reshape(rows, -1) % grid.size, order.reshape(rows, -1)


def by_selection(grid: Grid, units: np.ndarray, own: np.ndarray) -> np.ndarray:
    """theta of some slices, [own, units, *unit], as [selections, size, *unit]."""
    if grid.row_per_slice:
        return units
    array, roles = grid.stored_array
    if len(own) == grid.whole[0]:
        inside = range(len(array), len(array) + len(grid.unit))
        units = units.reshape(*array, *grid.unit)
        units = units.transpose(*roles.stack, *roles.within, *inside)
        return units.reshape(-1, grid.size, *grid.unit)
    first = _slice_axes(grid)
    axes = [a for a in roles.stack if a >= first] + list(roles.within)
    units = units.reshape(len(own), *array[first:], *grid.unit)
    inside = range(1 + len(axes), units.ndim)
    units = units.transpose(0, *(1 + a - first for a in axes), *inside)
    # Outputs may come before the stack.
    order = np.argsort(selections_of(grid, own), axis=None, kind="stable")
    return units.reshape(-1, grid.size, *grid.unit)[order]
