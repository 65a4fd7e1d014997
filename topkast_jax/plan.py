"""Which parameters are sparse, how they are read, and how many entries they keep."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from topkast_jax import _trees, levels
from topkast_jax import grid as grids
from topkast_jax._trees import AxesRules, Parameter
from topkast_jax._types import Axes, Counts, Method, Methods, PyTree
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
      method: that chooses its sets.
      levels: units per selection at sparsities of 0, .001, ..., where they follow a
        schedule.
    """

    index: int
    path: str
    grid: Grid
    counts: Counts
    asked: Counts
    method: Method
    levels: tuple[int, ...] = ()

    @property
    def axes(self) -> Axes:
        return self.grid.axes

    def counts_at(self, step: Any) -> Counts:
        """Units of A and B per selection at a step, traced where they move."""
        follows = self.method.follows
        if follows is None or (isinstance(step, int) and step == 0):
            return self.counts
        forward, backward = (levels.at(self.levels, s, step) for s in follows[:2])
        traced: list[Any] = [forward, jnp.maximum(forward, backward)]
        return Counts(*traced)


class Group(NamedTuple):
    """Parameters that one method chooses for."""

    method: Method
    sites: list[Site]


def groups(
    methods: Methods, rules: AxesRules, params: Sequence[Parameter]
) -> list[Group]:
    """The sparse parameters of a flattened tree by method, with its counts.

    Raises:
      ValueError: nothing selected, a pattern or axes that fit nothing, k = 0 somewhere,
        a parameter that no rule of a mixture covers.
    """
    real = [
        (i, p)
        for i, p in enumerate(params)
        if jnp.issubdtype(jnp.result_type(p.array), jnp.floating)
    ]
    shapes = {p.path: jnp.shape(p.array) for _, p in real}
    roles = rules.resolve(shapes)
    indices = {p.path: i for i, p in real}
    found = []
    for method, paths in _shared_out(methods, list(shapes)):
        unstacked = {
            path: tuple(shapes[path][a] for a in roles[path].within) for path in paths
        }
        chosen = set(_trees.selected(method.where, unstacked))
        mine = [path for path in paths if path in chosen]
        asked = (
            {path: _trees.slice_shape(shapes[path], roles[path]) for path in mine},
            {path: _trees.slices(shapes[path], roles[path]) for path in mine},
        )
        counts = method.counts(*asked)
        moving: Mapping[str, tuple[int, ...]] = {}
        if method.follows is not None:
            moving = levels.table(method.follows.distribution, *asked)
        sites = []
        for path in mine:
            grid = grids.grid(method.structure, path, shapes[path], roles[path])
            whole = grid.structure.parts == grid.selections == grid.entries == 1
            units = counts[path] if whole else grid.quantise(counts[path])
            row = grid.nearest(moving.get(path, ()))
            sites.append(
                Site(indices[path], path, grid, units, counts[path], method, tuple(row))
            )
        found.append(Group(method, sites))
    return found


def sites(
    methods: Methods, rules: AxesRules, params: Sequence[Parameter]
) -> list[Site]:
    """The sparse parameters of a flattened tree, in its order; see `groups`."""
    found = [site for group in groups(methods, rules, params) for site in group.sites]
    return sorted(found, key=lambda site: site.index)


def method_of(methods: Methods, path: str) -> Method | None:
    """The method that chooses for a parameter; None where a mixture keeps it dense.

    Raises:
      ValueError: no rule of a mixture covers it.
    """
    if isinstance(methods, Method):
        return methods
    for pattern, method in methods.rules:
        if _trees.matches(pattern, path):
            return method
    raise ValueError(
        f"tk.groups: no rule covers {path!r}; add one, or end with ('*', None) to keep "
        "the rest dense"
    )


def _shared_out(
    methods: Methods, paths: Sequence[str]
) -> list[tuple[Method, list[str]]]:
    """Paths by method, in the order of the rules."""
    if isinstance(methods, Method):
        return [(methods, list(paths))]
    _trees.require_matches([p for p, _ in methods.rules], paths, "tk.groups")
    owners = {path: method_of(methods, path) for path in paths}
    distinct = list({id(m): m for m in methods.methods}.values())
    out = []
    for method in distinct:
        mine = [path for path in paths if owners[path] is method]
        if not mine:
            raise ValueError(
                f"tk.groups: earlier rules take every parameter from {method.name}; "
                "put its rule before them"
            )
        out.append((method, mine))
    return out


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
      notes: of the methods whose sets change in size, what k_A and k_B stand for.
    """

    method: str
    rows: tuple[Row, ...]
    slotless: tuple[str, ...]
    structure: str
    notes: tuple[str, ...] = ()

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
        text += "".join(f"\n{note}" for note in self.notes)
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
    methods: Methods,
    inner: optax.GradientTransformation,
    rules: AxesRules,
    tree: PyTree,
) -> Plan:
    """The plan of methods for a tree of parameters, or of their shapes."""
    params, _ = _trees.parameters(tree)
    found = {site.index: site for site in sites(methods, rules, params)}
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
    structures = dict.fromkeys(s.method.structure.name for s in found.values())
    used = dict.fromkeys((s.method.name, s.method.note) for s in found.values())
    notes = tuple(f"{name}: {note}" for name, note in used if note)
    return Plan(methods.name, tuple(rows), slotless, " + ".join(structures), notes)
