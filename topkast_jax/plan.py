"""Which parameters are sparse, how they are read, and how many entries they keep."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from topkast_jax import _trees
from topkast_jax import grid as grids
from topkast_jax._trees import AxesRules, Parameter
from topkast_jax._types import Axes, Counts, Method, PyTree
from topkast_jax.grid import Grid


@dataclasses.dataclass(frozen=True)
class Site:
    """One sparse parameter.

    Attributes:
      index: its place in the flattened tree.
      path: its name.
      grid: its units.
      counts: units of A and B per selection.
      asked: entries of A and B per slice, before the structure rounded them.
    """

    index: int
    path: str
    grid: Grid
    counts: Counts
    asked: Counts

    @property
    def axes(self) -> Axes:
        return self.grid.axes


def sites(method: Method, rules: AxesRules, params: Sequence[Parameter]) -> list[Site]:
    """The sparse parameters of a flattened tree, with the counts of the method.

    Raises:
      ValueError: nothing selected, a pattern or axes that fit nothing, k = 0 somewhere.
    """
    real = [
        (i, p)
        for i, p in enumerate(params)
        if jnp.issubdtype(jnp.result_type(p.array), jnp.floating)
    ]
    shapes = {p.path: jnp.shape(p.array) for _, p in real}
    roles = rules.resolve(shapes)
    unstacked = {
        path: tuple(shape[a] for a in roles[path].within)
        for path, shape in shapes.items()
    }
    chosen = set(_trees.selected(method.where, unstacked))
    canonical = {p: _trees.slice_shape(shapes[p], roles[p]) for p in shapes}
    copies = {p: _trees.slices(shapes[p], roles[p]) for p in shapes}
    counts = method.counts(
        {p: canonical[p] for p in shapes if p in chosen},
        {p: copies[p] for p in shapes if p in chosen},
    )
    found = []
    for i, p in real:
        if p.path not in chosen:
            continue
        asked = counts[p.path]
        grid = grids.grid(method.structure, p.path, shapes[p.path], roles[p.path])
        whole = grid.structure.parts == grid.selections == grid.entries == 1
        units = asked if whole else grid.quantise(asked)
        found.append(Site(i, p.path, grid, units, asked))
    return found


class Row(NamedTuple):
    """One parameter of a plan. Counts are entries of all slices together.

    `asked` is (k_A, k_B) as the distribution gave them, where the structure changed them.
    """

    path: str
    shape: tuple[int, ...]
    axes: str
    k_forward: int
    k_backward: int
    slots: int
    asked: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def sparse(self) -> bool:
        return self.axes != ""


class Plan(NamedTuple):
    """What a method makes of a parameter tree; `str` prints it as a table.

    Attributes:
      method: name of the method.
      rows: one for each parameter, dense ones included (axes "" and all entries kept).
      slotless: sparse parameters for which the inner optimizer keeps no array of their
        shape, so that nothing is reset when entries enter or leave B.
      structure: name of the structure of the masks.
    """

    method: str
    rows: tuple[Row, ...]
    slotless: tuple[str, ...]
    structure: str

    def __str__(self) -> str:
        head = ("parameter", "shape", "axes", "k_A", "k_B", "sparsity A", "B", "slots")
        lines = [head]
        for row in self.rows:
            shape = "x".join(map(str, row.shape)) or "scalar"
            if not row.sparse:
                lines.append((row.path, shape, "dense", str(row.size), "", "", "", ""))
                continue
            lines.append((row.path, shape, row.axes, *_numbers([row]), str(row.slots)))
        chosen = [row for row in self.rows if row.sparse]
        total = str(sum(row.size for row in chosen))
        lines.append((f"sparse, {self.method}", total, "", *_numbers(chosen), ""))
        total = str(sum(row.size for row in self.rows))
        lines.append(("all", total, "", *_numbers(self.rows), ""))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = "\n".join(
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )
        if any(row.asked for row in chosen):
            a, b = (
                sum((r.asked or (r.k_forward, r.k_backward))[i] for r in chosen)
                for i in (0, 1)
            )
            text += f"\n{self.structure}: asked for k_A {a}, k_B {b}; rounded per layer"
        if self.slotless:
            text += (
                "\nno slot in the inner optimizer (nothing to reset when masks move): "
                + ", ".join(self.slotless)
            )
        return text


def _numbers(rows: Sequence[Row]) -> tuple[str, str, str, str]:
    size = sum(row.size for row in rows)
    forward = sum(row.k_forward for row in rows)
    backward = sum(row.k_backward for row in rows)
    return (
        str(forward),
        str(backward),
        f"{1 - forward / size:.4f}",
        f"{1 - backward / size:.4f}",
    )


def make(
    method: Method,
    inner: optax.GradientTransformation,
    rules: AxesRules,
    tree: PyTree,
) -> Plan:
    """The plan of a method for a tree of parameters, or of their shapes."""
    params, _ = _trees.parameters(tree)
    found = {site.index: site for site in sites(method, rules, params)}
    owners = _trees.slots(jax.eval_shape(inner.init, tree), params)
    rows = []
    for i, param in enumerate(params):
        shape = jnp.shape(param.array)
        size, slots = math.prod(shape), owners.count(i)
        if i not in found:
            rows.append(Row(param.path, shape, "", size, size, slots))
            continue
        site = found[i]
        copies = _trees.slices(shape, site.axes)
        letters: Any = {}
        for letter, group in zip("skio", site.axes, strict=True):
            letters |= dict.fromkeys(group, letter)
        text = " ".join(letters[a] for a in range(len(shape)))
        grid = site.grid
        each = grid.whole[0] * grid.selections * grid.entries
        kept = (each * site.counts.forward, each * site.counts.backward)
        wanted = (copies * site.asked.forward, copies * site.asked.backward)
        asked = None if kept == wanted else wanted
        rows.append(Row(param.path, shape, text, *kept, slots, asked))
    slotless = tuple(row.path for row in rows if row.sparse and not row.slots)
    structure = method.structure.name
    return Plan(method.name, tuple(rows), slotless, structure)
