"""A leaf on the host: sets as lists of positions, chosen in NumPy.

Serves both kinds of method in the packed layouts. With a reservoir the entries are all
of theta, which lives in host memory; without one they are those of A alone, and nothing
here is larger than a small multiple of k.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from topkast_jax import draw
from topkast_jax._types import Axes, Counts, LeafMasks, Memory, Score
from topkast_jax.grid import Grid, portion, total
from topkast_jax.pairs import draw as draw_pairs

Set = Int[np.ndarray, " _"]
"""A set of units: sorted int64, selection * size + position within the selection.

Selections have the numbers that they have in the whole parameter, also where a process
holds some of its slices (`layouts.share`).
"""

_FEW = 64
"""Up to so many selections are worth a pass of their own."""


@dataclasses.dataclass(frozen=True)
class HostLeaf:
    """A `Leaf` in NumPy: [selections, entries of each, *unit].

    Attributes:
      rows: [selections], their numbers, ascending.
      places: [selections, m], position of each entry within its selection, ascending;
        None where the entries are all units, in order.
      value: [selections, m, *unit].
      grad: as `value`; the gradient of the last step, where the method probes.
      forward, backward: bool [selections, m].
      candidates: units outside A whose gradient was seen, (places, gradients), both
        [selections, c] and that with the unit behind; None without a probe.
      seen: units whose gradient was asked for; None: all of them.
    """

    grid: Grid
    counts: Counts
    path: str
    key: jax.Array
    rows: np.ndarray
    places: np.ndarray | None
    value: np.ndarray
    grad: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    candidates: tuple[np.ndarray, np.ndarray] | None = None
    memory: Memory = ()
    learning_rate: Any = None
    stats: Any = None
    seen: Set | None = None

    @property
    def size(self) -> int:
        """Units that compete in one selection."""
        return self.grid.size

    @property
    def selections(self) -> int:
        """Selections in one slice."""
        return self.grid.selections

    @property
    def shape(self) -> tuple[int, ...]:
        return self.grid.shape

    @property
    def axes(self) -> Axes:
        return self.grid.axes

    def top(self, scores: Any, k: Any, among: Any = None) -> Set:
        """The `k` units of largest score, among those marked; ties by position."""
        units = total(np.asarray(scores), len(self.grid.unit))
        if among is not None:
            units = np.where(np.asarray(among), units, -np.inf)
        chosen = _top_rows(units, _per_row(k, len(units)))
        return self._set(chosen, self.places)

    def quota(self, scores: Any, k: Any, among: Any = None) -> np.ndarray:
        """How many of a slice's `k` units of largest score lie in each selection."""
        units = total(np.asarray(scores), len(self.grid.unit))
        if among is not None:
            units = np.where(np.asarray(among), units, -np.inf)
        places = self.places
        if places is None:
            places = np.broadcast_to(np.arange(self.size), units.shape)
        slices, number = _to_units(self.grid, self._keys(places).reshape(-1))
        order = np.argsort(slices, kind="stable")
        shape = (len(self.rows) // self.grid.selections, -1)
        chosen = _top_rows(
            units.reshape(-1)[order].reshape(shape),
            _per_row(k, shape[0]),
            number[order].reshape(shape),
        )
        marks = np.zeros(units.size, bool)
        marks[order] = chosen.reshape(-1)
        return marks.reshape(units.shape).sum(axis=1)

    def grow(self, score: Score, k: Any, outside: Set, among: Set | None = None) -> Set:
        """The `k` candidates of largest score outside a set; ties in random order."""
        if self.candidates is None or self.places is None:
            raise ValueError(
                f"{self.path!r}: growth by gradient needs the gradients of absent "
                "entries: pass found=tk.probe(...) to tk.refresh"
            )
        seen, gradients = self.candidates
        places = np.concatenate([self.places, seen], axis=1)
        grads = np.concatenate([self.grad, gradients], axis=1)
        values = np.concatenate([self.value, np.zeros_like(gradients)], axis=1)
        wider = dataclasses.replace(self, value=values, grad=grads, places=places)
        units = total(np.asarray(score(wider, self.memory)), len(self.grid.unit))
        keys = self._keys(places)
        taken = _contains(outside, keys)
        if among is not None:
            taken |= ~_contains(among, keys)
        units = np.where(taken, -np.inf, units)
        ranks = draw.ranks_on_host(self.key, places, self.size, self.rows)
        chosen = _top_rows(units, _per_row(k, len(units)), ranks)
        return self._set(chosen, places)

    def draw(self, k: Any, outside: Set | None = None, among: Set | None = None) -> Set:
        """`k` random units of each selection, outside a set, and within one if given."""
        if among is not None:
            return self._draw_among(k, among, outside)
        wanted = _per_row(k, len(self.rows))
        taken = np.zeros(0, np.int64) if outside is None else outside
        most = np.bincount(taken // self.size).max(initial=0)
        bits = draw.bits_for(self.size)
        needed = int(wanted.max(initial=0) + most)
        ranks = math.ceil(1.1 * needed * 2**bits / self.size) + 16
        while True:
            ranks = min(ranks, 2**bits)
            places = draw.positions_on_host(self.key, self.rows, ranks, self.size)
            keys = self._keys(places)
            free = (places < self.size) & ~_contains(taken, keys)
            order = np.cumsum(free, axis=1)
            if ranks == 2**bits or (order[:, -1] >= wanted).all():
                return np.sort(keys[free & (order <= wanted[:, None])])
            ranks *= 2

    def _draw_among(self, k: Any, among: Set, outside: Set | None) -> Set:
        """As `draw`: the members that come first in the same random order."""
        if outside is not None:
            among = among[~_contains(outside, among)]
        selection, place = np.divmod(among, self.size)
        ranks = draw.ranks_on_host(self.key, place[:, None], self.size, selection)[:, 0]
        order = np.lexsort((ranks, selection))
        row = np.searchsorted(self.rows, selection)  # ascends, also once ordered
        turn = np.arange(len(among)) - np.searchsorted(row, row)
        return np.sort(among[order][turn < _per_row(k, len(self.rows))[row]])

    def given(self, mask: np.ndarray, most: int) -> Set:
        """A set from a bool array of the parameter's shape, of at most so many units."""
        self.grid.require(self.path, mask, most)
        entries = set_of(self.grid, mask)
        return entries[np.isin(entries // self.size, self.rows)]

    def marks(self, entries: Set) -> np.ndarray:
        """A set as a bool array of the parameter's shape."""
        grid = self.grid
        if len(self.rows) < grid.whole[0] * grid.selections:
            raise ValueError(
                f"{self.path!r}: a memory of every entry needs all slices on one process"
            )
        slices, units = _to_units(grid, entries)
        marks = np.zeros((grid.whole[0], grid.count), bool)
        marks[slices, units] = True
        wide = marks.reshape(*marks.shape, *(1 for _ in grid.unit))
        return grid.from_units(np.broadcast_to(wide, (*marks.shape, *grid.unit)))

    def count(self, entries: Set) -> np.ndarray:
        """Units of a set in each selection."""
        at = np.searchsorted(self.rows, entries // self.size)
        return np.bincount(at, minlength=len(self.rows))

    def union(self, first: Set, second: Set) -> Set:
        """Union of two sets."""
        return np.union1d(first, second)

    def where(self, condition: Any, first: Set, second: Set) -> Set:
        """One of two sets."""
        return first if condition else second

    def pairs(
        self, n: Any, inputs: Any = None, outputs: Any = None, most: int | None = None
    ) -> Set:
        """What `n` draws of a row and a column hit in each selection."""
        del most
        draws = draw_pairs(self.key, n, self.grid, inputs, outputs)
        slices, rows, columns = (np.asarray(x).astype(np.int64) for x in draws)
        units = self.grid.numbers(rows, columns)
        keys = np.unique(_to_keys(self.grid, slices * self.grid.count + units))
        return keys[np.isin(keys // self.size, self.rows)]

    def portion(self, share: Any, k: Any, up: bool = False) -> Any:
        """`share * k` as a number of units of a selection; see the masked layout."""
        found = portion(share, k, self.grid, self.key, up)
        if isinstance(found, int):
            return found
        numbers = np.asarray(found).reshape(-1)  # one for all, or one for each
        return numbers[self.rows] if len(numbers) > 1 else numbers

    def masks(
        self,
        forward: Set,
        backward: Set,
        shrink: Any = None,
        fresh: Set | None = None,
    ) -> LeafMasks:
        """A and B, as `numbered` reads them."""
        if fresh is not None:
            raise ValueError(
                f"{self.path!r}: values that begin anew while they stay in B need "
                'layout="masked"'
            )
        if shrink is not None:
            raise ValueError(
                f"{self.path!r}: alpha that is smaller than theta on A needs "
                'layout="masked"'
            )
        return LeafMasks(forward, backward)

    def _keys(self, places: np.ndarray) -> np.ndarray:
        return places + self.size * self.rows[:, None]

    def _set(self, chosen: np.ndarray, places: np.ndarray | None) -> Set:
        """From marks on entries; sorted even where the places are not."""
        if places is None:
            found = np.flatnonzero(chosen)
            if len(self.rows) == self.grid.whole[0] * self.grid.selections:
                return found
            return self.rows[found // self.size] * self.size + found % self.size
        return np.sort(self._keys(places)[chosen])


def set_of(grid: Grid, mask: Any) -> Set:
    """A mask of entries, made of whole units, as a set."""
    units = grid.to_units(np.asarray(mask))
    units = units[(..., *(0 for _ in grid.unit))]
    if not grid.row_per_slice:
        array, roles = grid.stored_array
        units = units.reshape(array).transpose(*roles.stack, *roles.within)
    return np.flatnonzero(units)


def _per_row(k: Any, rows: int) -> np.ndarray:
    return np.broadcast_to(np.asarray(k, np.int64), (rows,))


def _contains(members: Set, keys: np.ndarray) -> np.ndarray:
    """Which keys are in a sorted set."""
    if not len(members):
        return np.zeros(keys.shape, bool)
    at = np.searchsorted(members, keys)
    return members[np.minimum(at, len(members) - 1)] == keys


def _top_rows(
    scores: np.ndarray, k: np.ndarray, ranks: np.ndarray | None = None
) -> np.ndarray:
    """Marks of the k[r] largest of row r; ties by lowest rank, or by order.

    Scores of -inf are never chosen.
    """
    if scores.dtype.itemsize < 4:  # NumPy has no fast order for small floats
        scores = scores.astype(np.float32)
    if len(scores) > _FEW:
        order = np.argsort(-scores, axis=1, kind="stable")
        if ranks is not None:
            order = np.lexsort((ranks, -scores), axis=1)
        chosen = np.zeros(scores.shape, bool)
        rows = np.arange(scores.shape[1]) < k[:, None]
        np.put_along_axis(chosen, order, rows, axis=1)
        return chosen & (scores > -np.inf)
    chosen = np.zeros(scores.shape, bool)
    for row, (line, count) in enumerate(zip(scores, k.tolist(), strict=True)):
        allowed = int(np.count_nonzero(line > -np.inf))
        count = min(count, allowed)
        if count == 0:
            continue
        cut = np.partition(line, len(line) - count)[len(line) - count]
        above = line > cut
        tied = np.flatnonzero(line == cut)
        if ranks is not None:
            tied = tied[np.argsort(ranks[row][tied], kind="stable")]
        chosen[row] = above
        chosen[row, tied[: count - int(above.sum())]] = True
    return chosen


def numbered(grid: Grid, masks: LeafMasks, slices: int) -> np.ndarray:
    """int32 [slices, n_B] of `Index`: numbers of units, A first, each part by selection.

    Args:
      grid: units of the parameter.
      masks: A and B.
      slices: how many they are of.
    """
    forward, backward = masks.forward, masks.backward
    rest = backward[~_contains(forward, backward)]
    parts = []
    for part in (forward, rest):
        owner, units = _to_units(grid, part)
        # Selections of a slice follow each other, unless outputs come before the stack.
        order = np.argsort(owner, kind="stable")
        parts.append(units[order].reshape(slices, -1))
    return np.concatenate(parts, axis=1).astype(np.int32)


def _to_units(grid: Grid, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def _to_keys(grid: Grid, flat: np.ndarray) -> np.ndarray:
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
    keys = _to_keys(
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
