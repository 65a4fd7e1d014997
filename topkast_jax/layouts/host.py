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

from topkast_jax import draw
from topkast_jax._types import Axes, Counts, LeafMasks, Memory, Score
from topkast_jax.grid import Grid
from topkast_jax.halving import total
from topkast_jax.layouts.selections import Set, contains, set_of, to_keys, to_units
from topkast_jax.pairs import draw as draw_pairs
from topkast_jax.portion import portion

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
    step: Any = None

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
        units = self._units(scores, among)
        chosen = _top_rows(units, _per_row(k, len(units)))
        return self._set(chosen, self.places)

    def quota(self, scores: Any, k: Any, among: Any = None) -> np.ndarray:
        """How many of a slice's `k` units of largest score lie in each selection."""
        units = self._units(scores, among)
        places = self._places()
        slices, number = to_units(self.grid, self._keys(places).reshape(-1))
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

    def _units(self, scores: Any, among: Any) -> np.ndarray:
        """[selections, m], the score of each unit; least outside of marks, or of a set."""
        units = total(np.asarray(scores), len(self.grid.unit))
        if among is None:
            return units
        marks = np.asarray(among)
        if marks.dtype != np.bool_:
            marks = contains(marks, self._keys(self._places()))
        return np.where(marks, units, -np.inf)

    def _places(self) -> np.ndarray:
        if self.places is not None:
            return self.places
        return np.broadcast_to(np.arange(self.size), (len(self.rows), self.size))

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
        taken = contains(outside, keys)
        if among is not None:
            taken |= ~contains(among, keys)
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
            free = (places < self.size) & ~contains(taken, keys)
            order = np.cumsum(free, axis=1)
            if ranks == 2**bits or (order[:, -1] >= wanted).all():
                return np.sort(keys[free & (order <= wanted[:, None])])
            ranks *= 2

    def _draw_among(self, k: Any, among: Set, outside: Set | None) -> Set:
        """As `draw`: the members that come first in the same random order."""
        if outside is not None:
            among = among[~contains(outside, among)]
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
        slices, units = to_units(grid, entries)
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
        drawn = n if most is None else most
        draws = draw_pairs(self.key, drawn, self.grid, inputs, outputs)
        slices, rows, columns = (
            np.asarray(x).astype(np.int64)[..., : int(n)] for x in draws
        )
        units = self.grid.numbers(rows, columns)
        keys = np.unique(to_keys(self.grid, slices * self.grid.count + units))
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


def _per_row(k: Any, rows: int) -> np.ndarray:
    return np.broadcast_to(np.asarray(k, np.int64), (rows,))


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
