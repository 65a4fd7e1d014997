"""Which patterns a mask may have: units of several entries, and where they compete.

A selection chooses units: single entries, or blocks of inputs x outputs. Units compete
over a whole slice, or within each output column (constant fan-in), or within groups of
M neighbours (N:M). The score of a unit is the sum of the scores of its entries.
"""

import fnmatch
from collections.abc import Mapping
from typing import Literal, NamedTuple

Scope = Literal["slice", "column", "group"]


class Structure(NamedTuple):
    """A pattern of masks.

    Attributes:
      name: what tables call it.
      block: inputs x outputs of a unit; a side longer than the parameter's is all of it.
      scope: units compete within a "slice" (the whole parameter, unless it is stacked),
        an output "column" of units, or a "group".
      group: M, neighbours along the inputs that form a group.
      parts: equal parts of the parameter that select apart; see `groups_of`.
      along: axis that is cut into parts, "outputs" or "inputs"; or pairs (glob of a
        path, axis), first match wins.
    """

    name: str
    block: tuple[int, int] = (1, 1)
    scope: Scope = "slice"
    group: int = 1
    parts: int = 1
    along: str | tuple[tuple[str, str], ...] = "outputs"


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


def groups_of(
    groups: int,
    structure: Structure = unstructured,
    along: str | Mapping[str, str] = "outputs",
) -> Structure:
    """Selects apart in equal parts of every parameter, so that each can live alone.

    A packed parameter is sharded by these groups: a mesh axis that cuts it must divide
    their number. They belong to the method and not to the mesh, so that the same masks
    come out on any mesh.

    Args:
      groups: how many.
      structure: what is selected in each.
      along: the axis that is cut, "outputs" or "inputs" (the first of several); or
        globs of paths to axes, first match wins.
    Raises:
      ValueError: fewer than one group, an unknown axis, or groups within groups. When
        a parameter does not divide, `init` raises and names it.
    Example:
      >>> groups_of(4, blocks(8, 128)).name
      'blocks 8x128, in 4 groups'
    """
    _require_positive("groups_of", groups)
    pairs = (("*", along),) if isinstance(along, str) else tuple(along.items())
    for _, axis in pairs:
        if axis not in ("inputs", "outputs"):
            raise ValueError(f"groups_of: along={axis!r} is not 'inputs' or 'outputs'")
    if structure.parts != 1:
        raise ValueError(f"groups_of: {structure.name} is in groups already")
    if groups == 1:
        return structure
    name = f"{structure.name}, in {groups} groups"
    return structure._replace(name=name, parts=groups, along=pairs)


def _require_positive(name: str, *sides: int) -> None:
    if min(sides) < 1:
        raise ValueError(f"{name}: {'x'.join(map(str, sides))}: sides are at least 1")


def along_of(structure: Structure, path: str) -> str:
    """The axis of one parameter that is cut into groups."""
    if isinstance(structure.along, str):
        return structure.along
    for glob, axis in structure.along:
        if fnmatch.fnmatchcase(path, glob):
            return axis
    raise ValueError(
        f"groups_of: along says nothing of {path!r}; end with a rule for '*'"
    )
