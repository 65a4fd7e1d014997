"""Which patterns a mask may have: units of several entries, and where they compete.

A selection chooses units: single entries, or blocks of inputs x outputs. Units compete
over a whole slice, or within each output column (constant fan-in), or within groups of
M neighbours (N:M). The score of a unit is the sum of the scores of its entries.
"""

import dataclasses
import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from topkast_jax._types import Axes, Counts

Scope = Literal["slice", "column", "group"]


class Structure(NamedTuple):
    """A pattern of masks.

    Attributes:
      name: what tables call it.
      block: inputs x outputs of a unit; a side longer than the parameter's is all of it.
      scope: units compete within a "slice" (the whole parameter, unless it is stacked),
        an output "column" of units, or a "group".
      group: M, neighbours along the inputs that form a group.
    """

    name: str
    block: tuple[int, int] = (1, 1)
    scope: Scope = "slice"
    group: int = 1


unstructured = Structure("unstructured")
"""Single entries that compete over the whole parameter."""


def blocks(inputs: int, outputs: int) -> Structure:
    """Blocks of `inputs` x `outputs` entries that compete over the whole parameter.

    Raises:
      ValueError: a side below 1. When a parameter is not made of whole blocks, `init`
        raises and names it.
    Example:
      >>> blocks(8, 128).name
      'blocks 8x128'
    """
    _require_positive("blocks", inputs, outputs)
    return Structure(f"blocks {inputs}x{outputs}", (inputs, outputs))


def fan_in(inputs: int = 1, outputs: int = 1) -> Structure:
    """The same number of units in every column of outputs; blocks if sides are given.

    Reference:
      Lasby et al., "Dynamic sparse training with structured sparsity" (SRigL), 2023,
      arXiv 2305.02299: constant fan-in.
    """
    _require_positive("fan_in", inputs, outputs)
    size = "" if (inputs, outputs) == (1, 1) else f" {inputs}x{outputs}"
    return Structure(f"fan-in{size}", (inputs, outputs), "column")


def n_of_m(m: int) -> Structure:
    """N:M: the same number of entries out of every `m` neighbours along the inputs.

    N follows from the sparsity: the nearest number, at least 1.

    Raises:
      ValueError: `m` below 2.
    """
    if m < 2:
        raise ValueError(f"n_of_m: m={m} must be at least 2")
    return Structure(f"N:{m}", (1, 1), "group", m)


def _require_positive(name: str, *sides: int) -> None:
    if min(sides) < 1:
        raise ValueError(f"{name}: {'x'.join(map(str, sides))}: sides are at least 1")


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
    def whole(self) -> tuple[int, int, int]:
        """(slices, inputs, outputs) of the parameter; the window counts as inputs."""

        def product(group: tuple[int, ...]) -> int:
            return math.prod(self.shape[a] for a in group)

        rows = product(self.axes.window) * product(self.axes.inputs)
        return product(self.axes.stack), rows, product(self.axes.outputs)

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
        return self.shape if self.plain else self.units

    @property
    def plain(self) -> bool:
        """Whether a unit is an entry in its place, so that nothing is reshaped."""
        return self.structure.block == (1, 1) and self.structure.scope != "group"

    @property
    def roles(self) -> Axes:
        """Axes of the array of units; of the parameter itself where `plain`."""
        column = self.structure.scope == "column"
        if self.plain:
            if not column:
                return self.axes
            stack = tuple(sorted(self.axes.stack + self.axes.outputs))
            return Axes(stack, self.axes.window, self.axes.inputs, ())
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
    def entries(self) -> int:
        """Entries of one unit."""
        return math.prod(self.structure.block)

    def quantise(self, counts: Counts) -> Counts:
        """Units per selection, from entries per slice: the nearest number, at least 1."""

        def nearest(k: int) -> int:
            return min(self.size, max(1, round(k / (self.selections * self.entries))))

        return Counts(*map(nearest, counts))

    def blocks(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Entries by unit: [*units, entries of a unit]."""
        order = (self.axes.stack, self.axes.window, self.axes.inputs, self.axes.outputs)
        slices, inputs, outputs = self.whole
        high, wide = self.structure.block
        x = x.transpose(sum(order, ()))
        x = x.reshape(slices, inputs // high, high, outputs // wide, wide)
        return x.transpose(0, 1, 3, 2, 4).reshape(*self.units, high * wide)

    def scores(self, scores: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Scores of units: sums over their entries."""
        return scores if self.plain else jnp.sum(self.blocks(scores), axis=-1)

    def of_entries(self, mask: Bool[Array, "..."]) -> Bool[Array, "..."]:
        """Mask of units, from a mask of entries that is made of whole units."""
        return mask if self.plain else self.blocks(mask)[..., 0]

    def spread(self, mask: Bool[Array, "..."]) -> Bool[Array, "..."]:
        """Mask of entries, in the shape of the parameter, from a mask of units."""
        if self.plain:
            return mask
        slices, inputs, outputs = self.whole
        high, wide = self.structure.block
        mask = mask.reshape(slices, inputs // high, 1, outputs // wide, 1)
        mask = jnp.broadcast_to(
            mask, (slices, inputs // high, high, outputs // wide, wide)
        )
        order = sum(
            (self.axes.stack, self.axes.window, self.axes.inputs, self.axes.outputs), ()
        )
        mask = mask.reshape([self.shape[a] for a in order])
        return mask.transpose([order.index(a) for a in range(len(order))])


def grid(structure: Structure, path: str, shape: tuple[int, ...], axes: Axes) -> Grid:
    """The units of one parameter.

    Raises:
      ValueError: the parameter is not made of whole units, or of whole groups.
    """
    whole = Grid(shape, axes, unstructured).whole
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
