"""The share of a process: the slices of a parameter that its devices hold.

Selections never cross a slice, and packed arrays are cut between slices alone. So what
is done on the host is done slice by slice, by every process for its own.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from topkast_jax.grid import Grid

P: Any = PartitionSpec


@dataclasses.dataclass(frozen=True)
class Share:
    """What this process holds of one parameter, as it is stored: [*stack, n, *unit].

    Attributes:
      grid: units of the whole parameter.
      own: numbers of its slices, ascending; all of them where nothing is cut, or where
        one process has all devices.
      sharding: of arrays over several devices; None: wherever JAX puts them.
    """

    grid: Grid
    own: np.ndarray
    sharding: NamedSharding | None = None

    @property
    def complete(self) -> bool:
        """Whether there are no other slices."""
        return len(self.own) == self.grid.whole[0]

    @property
    def of(self) -> tuple[np.ndarray, int]:
        """Own slices, and how many there are: as `Store.own` keeps them."""
        return self.own, self.grid.whole[0]

    def read(self, x: Any) -> np.ndarray:
        """The own slices of an array [*stack, n, ...] as [own, n, ...]; a copy."""
        rest = x.shape[len(self.grid.stack) :]
        if getattr(x, "is_fully_addressable", True):
            whole = np.array(x).reshape(-1, *rest)
            return whole if self.complete else whole[self.own]
        found = np.empty((len(self.own), *rest), x.dtype)
        missing = np.ones(len(self.own), bool)
        for index, piece in _pieces(x, x.sharding):
            slices = _slices(self.grid, index[: len(self.grid.stack)])
            kept = np.isin(slices, self.own)
            at = np.searchsorted(self.own, slices[kept])
            found[at] = piece.reshape(-1, *rest)[kept]
            missing[at] = False
        if missing.any():
            raise ValueError(
                f"an array of a parameter of shape {self.grid.shape} has other slices on "
                "the devices of this process than its positions, which have "
                f"{runs(self.own)}; shard the state with tk.state_shardings"
            )
        return found

    def place(self, values: np.ndarray) -> Array:
        """An array [*stack, n, ...] of which every process gives [own, n, ...]."""
        shape = (*self.grid.stack, *values.shape[1:])
        if self.sharding is None:
            return jnp.asarray(values.reshape(shape))
        spec = P(*self.sharding.spec[: len(shape)])
        sharding = NamedSharding(self.sharding.mesh, spec)
        local = sharding.shard_shape(shape)

        def piece(index: Any) -> np.ndarray:
            slices = _slices(self.grid, index[: len(self.grid.stack)])
            return values[np.searchsorted(self.own, slices)].reshape(local)

        return jax.make_array_from_callback(shape, sharding, piece)

    def units(self, dense: Any, sharding: NamedSharding | None = None) -> np.ndarray:
        """The own units of a dense parameter, [own, units, *unit], shard by shard.

        Args:
          dense: an array that every process has whole, or one over all processes.
          sharding: of the dense parameter; None: it is in one piece.
        """
        grid = self.grid
        if sharding is None:
            units: np.ndarray = grid.to_units(np.asarray(dense))
            return units
        units = np.empty((len(self.own), grid.count, *grid.unit), dense.dtype)
        for index, piece in _pieces(dense, sharding):
            slices = [index[a] for a in grid.axes.stack]
            parts = 1
            if grid.cut is not None:
                each = grid.shape[grid.cut] // grid.structure.parts
                begin, end, _ = index[grid.cut].indices(grid.shape[grid.cut])
                slices.append(slice(begin // each, end // each))
                parts = (end - begin) // each
            here = Grid(piece.shape, grid.axes, grid.structure._replace(parts=parts))
            at = np.searchsorted(self.own, _slices(grid, tuple(slices)))
            units[at] = here.to_units(piece)
        return units


def whole(grid: Grid) -> Share:
    """All slices, in one place."""
    return Share(grid, np.arange(grid.whole[0]))


def of(grid: Grid, sharding: Any) -> Share:
    """The share of this process in arrays that lie so, [*stack, n, ...].

    Raises:
      ValueError: the devices of other processes hold parts of own slices.
    """
    if not isinstance(sharding, NamedSharding):
        return whole(grid)
    if sharding.is_fully_addressable:
        return dataclasses.replace(whole(grid), sharding=sharding)
    stacked = len(grid.stack)
    if any(entry is not None for entry in sharding.spec[stacked:]):
        raise ValueError(
            f"an array of a packed parameter of shape {grid.shape} is cut within its "
            f"slices, {sharding.spec}; see tk.packed_shardings"
        )
    spec = NamedSharding(sharding.mesh, P(*sharding.spec[:stacked]))
    pieces = spec.addressable_devices_indices_map(grid.stack).values()
    own = np.unique(np.concatenate([_slices(grid, index) for index in pieces]))
    return Share(grid, own, sharding)


def put(x: Any, sharding: Any) -> Array:
    """An array that every process has whole, or one over all of them, placed so."""
    if _is_global(x):
        return jax.device_put(x, sharding)
    local = np.asarray(x)
    return jax.make_array_from_callback(local.shape, sharding, lambda i: local[i])


def runs(slices: Any) -> list[list[int]]:
    """Ascending numbers as [begin, end) of those that follow each other."""
    slices = np.asarray(slices)
    breaks = np.flatnonzero(np.diff(slices) != 1) + 1
    return [[int(s[0]), int(s[-1]) + 1] for s in np.split(slices, breaks) if len(s)]


def _is_global(x: Any) -> bool:
    return isinstance(x, jax.Array) and not x.is_fully_addressable


def _slices(grid: Grid, index: Any) -> np.ndarray:
    """Numbers of the slices in a piece, from its index along the stack axes."""
    return np.arange(grid.whole[0]).reshape(grid.stack)[index].reshape(-1)


def _pieces(x: Any, sharding: Any) -> Iterator[tuple[Any, np.ndarray]]:
    """(index, array) of what this process' devices hold, each once."""
    pieces: Iterator[tuple[Any, Any]]
    if _is_global(x) or (isinstance(x, jax.Array) and x.sharding == sharding):
        shards = jax.device_put(x, sharding).addressable_shards
        pieces = ((shard.index, shard.data) for shard in shards)
    else:
        x = np.asarray(x)
        places = sharding.addressable_devices_indices_map(x.shape).values()
        pieces = ((index, x[index]) for index in places)
    seen: list[Any] = []
    for index, piece in pieces:
        if index not in seen:
            seen.append(index)
            yield index, np.asarray(piece)
