"""The units of a parameter: how its entries are grouped, numbered and scored."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Shaped

from topkast_jax._types import Axes, Counts
from topkast_jax.halving import total
from topkast_jax.structure import Structure, along_of


@dataclasses.dataclass(frozen=True)
class Grid:
    """The units of one parameter: [slices, rows, columns], each of a block's entries.

    Attributes:
      shape: of the parameter.
      axes: their roles.
      structure: with the block cut to the parameter's sides.
    """

    shape: tuple[int, ...]
    axes: Axes
    structure: Structure

    @property
    def cut(self) -> int | None:
        """The axis of the parameter that is cut into groups; None without groups."""
        if self.structure.parts == 1:
            return None
        outputs = self.structure.along == "outputs"
        return (self.axes.outputs if outputs else self.axes.inputs)[0]

    @property
    def split(self) -> tuple[tuple[int, ...], Axes]:
        """Shape and roles of the parameter with its groups as the last stack axis."""
        parts, axis = self.structure.parts, self.cut
        if axis is None:
            return self.shape, self.axes
        shape = (
            *self.shape[:axis],
            parts,
            self.shape[axis] // parts,
            *self.shape[axis + 1 :],
        )
        moved = Axes(*(tuple(a + (a >= axis) for a in group) for group in self.axes))
        return shape, moved._replace(stack=(*moved.stack, axis))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(inputs, outputs) of a slice, all groups together."""
        return _matrix_shape(self.shape, self.axes)

    @property
    def whole(self) -> tuple[int, int, int]:
        """(slices, inputs, outputs) of a group; the window counts as inputs."""
        shape, axes = self.split
        slices = math.prod(shape[a] for a in axes.stack)
        return (slices, *_matrix_shape(shape, axes))

    @property
    def units(self) -> tuple[int, ...]:
        """Shape of the array of units that selections run over."""
        slices, inputs, outputs = self.whole
        rows = inputs // self.structure.block[0]
        columns = outputs // self.structure.block[1]
        if self.structure.scope == "group":
            per = self.structure.group
            return (slices, rows // per, per, columns)
        return (slices, rows, columns)

    @property
    def array(self) -> tuple[int, ...]:
        """Shape of what `scores` returns: the parameter's own where `plain`."""
        return self.split[0] if self.plain else self.units

    @property
    def plain(self) -> bool:
        """Whether a unit is an entry in its place, so that nothing is moved."""
        return self.structure.block == (1, 1) and self.structure.scope != "group"

    @property
    def roles(self) -> Axes:
        """Axes of the array of units; of the parameter itself where `plain`."""
        column = self.structure.scope == "column"
        if self.plain:
            axes = self.split[1]
            if not column:
                return axes._replace(stack=tuple(sorted(axes.stack)))
            stack = tuple(sorted(axes.stack + axes.outputs))
            return Axes(stack, axes.window, axes.inputs, ())
        if self.structure.scope == "group":
            return Axes((0, 1, 3), (), (2,), ())
        return Axes((0, 2), (), (1,), ()) if column else Axes((0,), (), (1,), (2,))

    @property
    def size(self) -> int:
        """Units that compete in one selection."""
        _, rows, *rest = self.units
        if self.structure.scope == "column":
            return rows
        return rest[0] if self.structure.scope == "group" else rows * rest[0]

    @property
    def selections(self) -> int:
        """Selections in one slice."""
        return math.prod(self.units[1:]) // self.size

    @property
    def stacked(self) -> tuple[int, ...]:
        """Axes of `array` along which slices lie; the rest of it is one slice."""
        return self.split[1].stack if self.plain else (0,)

    @property
    def entries(self) -> int:
        """Entries of one unit."""
        return math.prod(self.structure.block)

    def quantise(self, counts: Counts) -> Counts:
        """Units per selection, from entries of a slice: the nearest number, at least 1."""
        return Counts(*self.nearest(counts))

    def nearest(self, entries: Sequence[int]) -> list[int]:
        """`quantise` of any number of counts."""
        each = self.structure.parts * self.selections * self.entries
        most = self.size
        return [min(most, max(1, round(k / each))) for k in entries]

    @property
    def row_per_slice(self) -> bool:
        """Whether selections are the slices, in the order in which they are stored."""
        stack = self.split[1].stack
        return self.selections == 1 and not (
            self.plain and list(stack) != sorted(stack)
        )

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stack axes, the groups last where there are several."""
        shape, axes = self.split
        return tuple(shape[a] for a in axes.stack)

    @property
    def count(self) -> int:
        """Units in one slice."""
        return math.prod(self.units[1:])

    @property
    def unit(self) -> tuple[int, ...]:
        """Shape of one unit as it is stored; () for a single entry."""
        return () if self.entries == 1 else self.structure.block

    @property
    def stored_array(self) -> tuple[tuple[int, ...], Axes]:
        """`array` and `roles` of what `to_units` numbers: stack axes first."""
        if not self.plain:
            return self.units, self.roles
        order, roles, (shape, _) = self._order, self.roles, self.split
        moved = (tuple(order.index(a) for a in group) for group in roles)
        return tuple(shape[a] for a in order), Axes(*moved)

    def inner(self, stacked: int) -> "Grid":
        """The units of one slice of the first `stacked` stack axes."""
        if stacked > len(self.axes.stack):
            return Grid(*self.split, self.structure._replace(parts=1)).inner(stacked)
        gone = self.axes.stack[:stacked]
        left = [a for a in range(len(self.shape)) if a not in gone]
        roles = (tuple(left.index(a) for a in g if a in left) for g in self.axes)
        return Grid(tuple(self.shape[a] for a in left), Axes(*roles), self.structure)

    @property
    def _order(self) -> tuple[int, ...]:
        """Axes of `split` in the order in which entries are stored."""
        a = self.split[1]
        if self.plain:
            return (*a.stack, *a.within)
        return (*a.stack, *a.window, *a.inputs, *a.outputs)

    def to_units(self, x: Any) -> Any:
        """The entries by unit, [slices, units, *unit]; of a NumPy or JAX array.

        Units are numbered in C order over `array`, slice by slice.
        """
        slices, inputs, outputs = self.whole
        x = x.reshape(self.split[0]).transpose(self._order)
        if self.plain:
            return x.reshape(slices, self.count)
        high, wide = self.structure.block
        # One axis at a time: a mesh with explicit axes knows no more.
        x = x.reshape(slices, inputs, outputs)
        x = x.reshape(slices, inputs // high, high, outputs)
        x = x.reshape(slices, inputs // high, high, outputs // wide, wide)
        return x.transpose(0, 1, 3, 2, 4).reshape(slices, self.count, *self.unit)

    def from_units(self, x: Any) -> Any:
        """Inverse of `to_units`: an array in the shape of the parameter."""
        slices, inputs, outputs = self.whole
        if not self.plain:
            high, wide = self.structure.block
            x = x.reshape(slices, inputs // high, outputs // wide, high, wide)
            x = x.transpose(0, 1, 3, 2, 4)
            x = x.reshape(slices, inputs, outputs // wide, wide)
            x = x.reshape(slices, inputs, outputs)
        order, (shape, _) = self._order, self.split
        x = x.reshape([shape[a] for a in order])
        return x.transpose([order.index(a) for a in range(len(order))]).reshape(
            self.shape
        )

    def sides(self, inputs: Any, outputs: Any) -> tuple[Any, Any]:
        """Numbers of inputs and of outputs as numbers of rows and columns of units.

        Args:
          inputs: shaped like the parameter, but for 1 along its outputs.
          outputs: shaped like the parameter, but for 1 along window and inputs.
        Returns:
          [slices, rows] and [slices, columns], sums over the sides of a unit.
        """
        _, axes = self.split
        stack = self.stack
        found = []
        for x, side in zip((inputs, outputs), self.structure.block, strict=True):
            if self.cut is not None:
                parts = self.structure.parts if x.shape[self.cut] > 1 else 1
                before, after = x.shape[: self.cut], x.shape[self.cut + 1 :]
                x = x.reshape(*before, parts, x.shape[self.cut] // parts, *after)
            x = x.transpose(*axes.stack, *axes.window, *axes.inputs, *axes.outputs)
            x = x.reshape(*x.shape[: len(stack)], -1, side)
            x = total(x, 1)
            where: Any = np if isinstance(x, np.ndarray) else jnp
            x = where.broadcast_to(x, (*stack, x.shape[-1]))
            found.append(x.reshape(self.whole[0], -1))
        return found[0], found[1]

    def places(self, slices: Any, rows: Any, columns: Any) -> tuple[Any, ...]:
        """Where units lie in `array`, given by slice, row and column: an index per axis."""
        if not self.plain:
            if self.structure.scope == "group":
                per = self.structure.group
                return slices, rows // per, rows % per, columns
            return slices, rows, columns
        shape, axes = self.split
        found: dict[int, Any] = {}
        sides = (axes.stack, axes.window + axes.inputs, axes.outputs)
        for group, number in zip(sides, (slices, rows, columns), strict=True):
            for axis in reversed(group):
                found[axis] = number % shape[axis]
                number = number // shape[axis]
        zero = slices * 0
        return tuple(found.get(axis, zero) for axis in range(len(shape)))

    def numbers(self, rows: Any, columns: Any) -> Any:
        """Numbers of units within their slice (`to_units`), by row and column."""
        if not self.plain:
            return rows * self.units[-1] + columns
        shape, axes = self.split
        places = self.places(rows * 0, rows, columns)
        return _raveled(
            [places[a] for a in axes.within], [shape[a] for a in axes.within]
        )

    def rows_and_columns(self, numbers: Any) -> tuple[Any, Any]:
        """Inverse of `numbers`."""
        if not self.plain:
            return numbers // self.units[-1], numbers % self.units[-1]
        shape, axes = self.split
        places = _unraveled(numbers, [shape[a] for a in axes.within])
        found = dict(zip(axes.within, places, strict=True))
        rows, columns = (
            _raveled([found[a] for a in side], [shape[a] for a in side])
            for side in ((*axes.window, *axes.inputs), axes.outputs)
        )
        return rows, columns

    def within_selections(self, numbers: Any) -> Any:
        """Positions in their selections of units that are given by number."""
        array, roles, first = self._inside
        where = _unraveled(numbers, array[first:])
        return _raveled(
            [where[a - first] for a in roles.within], [array[a] for a in roles.within]
        )

    def selection_of(self, numbers: Any) -> Any:
        """In which selection of their slice units lie that are given by number."""
        array, roles, first = self._inside
        where = _unraveled(numbers, array[first:])
        apart = [a for a in roles.stack if a >= first]
        return _raveled([where[a - first] for a in apart], [array[a] for a in apart])

    def of_selections(self, positions: Any) -> Any:
        """Numbers of units, from positions [..., selections of a slice, n] in each."""
        array, roles, first = self._inside
        apart = [a for a in roles.stack if a >= first]
        found: dict[int, Any] = {}
        selection = np.arange(self.selections, dtype=np.int32)[:, None]
        for axes, number in ((apart, selection), (roles.within, positions)):
            parts = _unraveled(number, [array[a] for a in axes])
            found |= dict(zip(axes, parts, strict=True))
        inside = range(first, len(array))
        return _raveled([found[a] for a in inside], [array[a] for a in inside])

    @property
    def _inside(self) -> tuple[tuple[int, ...], Axes, int]:
        """`stored_array`, and how many of its axes count slices."""
        return (*self.stored_array, len(self.stack) if self.plain else 1)

    def matrix(self, x: Any) -> Any:
        """A parameter without stack axes as [inputs, outputs]."""
        order = (*self.axes.window, *self.axes.inputs, *self.axes.outputs)
        return x.transpose(order).reshape(self.matrix_shape)

    def from_matrix(self, x: Any) -> Any:
        """Inverse of `matrix`."""
        order = (*self.axes.window, *self.axes.inputs, *self.axes.outputs)
        x = x.reshape([self.shape[a] for a in order])
        return x.transpose([order.index(a) for a in range(len(order))])

    def scores(self, scores: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Scores of units, in the shape of `array`: sums over their entries."""
        if self.plain:
            return scores.reshape(self.array)
        return total(self.to_units(scores), len(self.unit)).reshape(self.units)

    def of_entries(self, mask: Any) -> Any:
        """Mask of units, from one of entries (NumPy or JAX) made of whole units."""
        if self.plain:
            return mask.reshape(self.array)
        units = self.to_units(mask)
        return units[(..., *(0 for _ in self.unit))].reshape(self.units)

    def require(self, path: str, mask: np.ndarray, most: int) -> None:
        """Raises ValueError unless a mask of entries is one of units, so many at most."""
        if mask.shape != self.shape:
            raise ValueError(f"{path!r} has shape {self.shape}, its mask {mask.shape}")
        inside = tuple(range(2, 2 + len(self.unit)))
        units = self.to_units(mask)
        if (units.any(axis=inside) != units.all(axis=inside)).any():
            raise ValueError(
                f"the mask of {path!r} is not made of whole units of "
                f"{self.structure.name}"
            )
        marks = np.asarray(self.of_entries(mask))
        found = int(marks.sum(axis=self.roles.within).max(initial=0))
        if found > most:
            raise ValueError(
                f"the mask of {path!r} has {found} units in one selection, and "
                f"{most} are to be kept; lower the sparsity"
            )

    def spread(self, mask: Bool[Array, "..."]) -> Bool[Array, "..."]:
        """Mask of entries, in the shape of the parameter, from a mask of units."""
        if self.plain:
            return mask.reshape(self.shape)
        slices = self.whole[0]
        mask = mask.reshape(slices, self.count, *(1 for _ in self.unit))
        return self.from_units(jnp.broadcast_to(mask, (slices, self.count, *self.unit)))


def _raveled(places: Sequence[Any], shape: Sequence[int]) -> Any:
    """Numbers in C order; of NumPy or JAX arrays."""
    number: Any = 0
    for place, length in zip(places, shape, strict=True):
        number = number * length + place
    return number


def _unraveled(numbers: Any, shape: Sequence[int]) -> list[Any]:
    """Inverse of `_raveled`."""
    places = []
    for length in reversed(shape):
        places.append(numbers % length)
        numbers = numbers // length
    return places[::-1]


def _matrix_shape(shape: tuple[int, ...], axes: Axes) -> tuple[int, int]:
    inputs = math.prod(shape[a] for a in axes.window + axes.inputs)
    return inputs, math.prod(shape[a] for a in axes.outputs)


def grid(structure: Structure, path: str, shape: tuple[int, ...], axes: Axes) -> Grid:
    """The units of one parameter.

    Raises:
      ValueError: the parameter is not made of whole units, or of whole groups.
    """
    structure = structure._replace(along=along_of(structure, path))
    _require_parts(structure, path, shape, axes)
    whole = Grid(shape, axes, structure._replace(block=(1, 1))).whole
    block = tuple(map(min, structure.block, whole[1:]))
    found = Grid(shape, axes, structure._replace(block=(block[0], block[1])))
    for side, length, what in zip(block, whole[1:], ("inputs", "outputs"), strict=True):
        if length % side:
            raise ValueError(
                f"{path!r} has {length} {what}, not a multiple of {side}, as "
                f"{structure.name} needs; choose another structure for it, or exclude "
                "it with where"
            )
    if structure.scope == "group" and (whole[1] // block[0]) % structure.group:
        raise ValueError(
            f"{path!r} has {whole[1]} inputs, not a multiple of {structure.group}, as "
            f"{structure.name} needs; choose another M, or exclude it with where"
        )
    return found


def _require_parts(
    structure: Structure, path: str, shape: tuple[int, ...], axes: Axes
) -> None:
    if structure.parts == 1:
        return
    cut = axes.outputs if structure.along == "outputs" else axes.inputs
    if not cut or shape[cut[0]] % structure.parts:
        raise ValueError(
            f"{path!r}, of shape {shape}, has {shape[cut[0]] if cut else 'no'} "
            f"{structure.along} to cut into {structure.parts} groups; choose another "
            "number or axis, or exclude it with where"
        )
