"""The words of the library as types: sets, masks, leaves, methods, state."""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import optax
from jaxtyping import Array, Float, Int

PyTree: TypeAlias = Any
KeyPath: TypeAlias = tuple[Any, ...]
Step: TypeAlias = int | Int[Array, ""]
Scalar: TypeAlias = float | Float[Array, ""] | Int[Array, ""]
Schedule: TypeAlias = Callable[[Any], Any]
"""`step -> value`; any optax schedule fits."""
Due: TypeAlias = Callable[[Any], Any]
"""`step -> bool`; elementwise on an array of steps."""
Entries: TypeAlias = Any
"""A set of positions in one leaf. Its form belongs to the layout: methods only pass it
on. In the masked layout it is a bool array of the leaf's shape."""
Memory: TypeAlias = PyTree
"""What a method remembers of one leaf between refreshes; a pytree of arrays."""


class Axes(NamedTuple):
    """Roles of the axes of one leaf, each a tuple of ascending axis numbers.

    A leaf is read as (stack..., window..., inputs..., outputs...). Selection runs per
    slice of `stack`; `window` (the spatial axes of a convolution) counts toward the
    fan-in and is kept apart only because ERK counts it apart.
    """

    stack: tuple[int, ...]
    window: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def within(self) -> tuple[int, ...]:
        """The axes inside one slice, ascending."""
        return tuple(sorted(self.window + self.inputs + self.outputs))


class Counts(NamedTuple):
    """Sizes of A and B of one leaf: entries per slice of its stack axes.

    Where a structure has been applied: units per selection. The two are the same
    without a structure. For methods whose sets change in size, A never holds fewer than
    `forward` and B never more than `backward`, a dense beginning (`tk.delayed`) apart.
    Where entries move between parameters or selections, or parameters compete
    (`Method.across`), the two are what they start with, or would share.
    """

    forward: int
    backward: int


class LeafMasks(NamedTuple):
    """A and B of one leaf, in the form of its layout.

    `shrink` is by how much the magnitudes on A are smaller in alpha than in theta, a
    number or an array that broadcasts against the leaf; None: they are the same. `fresh`
    are entries of B that begin at zero once more, though they were in B before; None:
    none. It is for the refresh alone, the state does not keep it.
    """

    forward: Entries
    backward: Entries
    shrink: Any = None
    fresh: Entries | None = None


class Masks(NamedTuple):
    """Trees shaped like the parameters, valid for the coming step.

    A leaf is None where the parameter is dense. In the masked layout `forward` (A) and
    `backward` (B) hold bool arrays; `probe` (P) holds a scalar bool for "everything", a
    mask for a subset, and None where the method never probes. `shrink` holds what alpha
    is smaller by (`LeafMasks`), as a rule None. In the packed layout `forward` holds an
    `Index`, which lists B with A first, `probe` numbers of units for a subset (int32
    [*stack, c], repeated, or in A, or -1 for none), and the others None.
    """

    forward: PyTree
    backward: PyTree
    probe: PyTree
    shrink: PyTree = None


@runtime_checkable
class View(Protocol):
    """One sparse parameter as it is read at every step, whatever its layout stores.

    The arrays run over the entries that the layout holds: all of them in the masked
    layout, those of B in a packed one. `grad` is zero outside B and P. A method reads
    them elementwise. `size` is how many units compete in one selection, `counts` how
    many of them A and B keep. `step` is that of the masks. `stats` is what `tx.update(..., stats=...)` was given for
    this parameter, or None. `seen` is P of the step that `grad` is of, as a set; None
    where that was everything, or nothing.
    """

    @property
    def value(self) -> Any: ...
    @property
    def forward(self) -> Any: ...
    @property
    def backward(self) -> Any: ...
    @property
    def grad(self) -> Any: ...
    @property
    def counts(self) -> Counts: ...
    @property
    def size(self) -> int: ...
    @property
    def learning_rate(self) -> Scalar | None: ...
    @property
    def step(self) -> Any: ...
    @property
    def stats(self) -> Any: ...
    @property
    def seen(self) -> Any: ...
    @property
    def path(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def axes(self) -> Axes: ...
    @property
    def key(self) -> jax.Array: ...


@runtime_checkable
class Draws(View, Protocol):
    """A view that can say which gradients a method wants to see."""

    def pairs(
        self, n: Any, inputs: Any = None, outputs: Any = None, most: int | None = None
    ) -> Entries:
        """The units that `n` draws with replacement hit in each selection, a row in
        proportion to `inputs`, a column to `outputs`; `most` bounds an `n` that is traced.
        """
        ...


@runtime_checkable
class Leaf(Draws, Protocol):
    """A view that can also make sets: what a method sees when masks are chosen.

    Sets are made with the verbs only, which count units of the method's structure, so
    that the same method runs in every layout.
    """

    @property
    def selections(self) -> int:
        """Selections in one slice."""
        ...

    def top(self, scores: Any, k: Any, among: Any = None) -> Entries:
        """The `k` units of largest score, among those marked or in a set; ties by
        position.
        """
        ...

    def quota(self, scores: Any, k: Any, among: Any = None) -> Any:
        """How many of a slice's `k` units of largest score lie in each selection; `top`
        and the rest take it.
        """
        ...

    def grow(
        self, score: "Score", k: Any, outside: Entries, among: Entries | None = None
    ) -> Entries:
        """The `k` candidates of largest score outside a set, and within one if given;
        ties in random order.
        """
        ...

    def draw(
        self, k: Any, outside: Entries | None = None, among: Entries | None = None
    ) -> Entries:
        """`k` random units, outside a set, and within one if given."""
        ...

    def given(self, mask: Any, most: int) -> Entries:
        """A set from a bool array of the parameter's shape, of at most so many units."""
        ...

    def marks(self, entries: Entries) -> Any:
        """A set as a bool array of the parameter's shape, in any layout."""
        ...

    def count(self, entries: Entries) -> Any:
        """Units of a set, for each selection; `top` and the rest take it."""
        ...

    def portion(self, share: Any, k: Any, up: bool = False) -> Any:
        """`share * k` as a number of units of a selection, rounded, or up if asked;
        `top` and the rest take it.
        """
        ...

    def union(self, first: Entries, second: Entries) -> Entries:
        """Union of two sets."""
        ...

    def where(self, condition: Any, first: Entries, second: Entries) -> Entries:
        """One of two sets, by a scalar bool that may be traced."""
        ...

    def masks(
        self,
        forward: Entries,
        backward: Entries,
        shrink: Any = None,
        fresh: Entries | None = None,
    ) -> LeafMasks:
        """A and B, as the state keeps them."""
        ...


class Following(NamedTuple):
    """Sparsities of which one or both are schedules.

    Attributes:
      forward, backward: of A and B, numbers or schedules.
      distribution: of each over parameters, as `tk.uniform`.
    """

    forward: float | Schedule
    backward: float | Schedule
    distribution: Callable[..., dict[str, int]]


Score: TypeAlias = Callable[[View, Memory], Any]
CountRule: TypeAlias = Callable[
    [Mapping[str, tuple[int, ...]], Mapping[str, int]], dict[str, Counts]
]


class Method(NamedTuple):
    """One paper: which sets, chosen how and when. Pure functions over a `Leaf`.

    Attributes:
      name: what messages call it.
      counts: `({path: slice shape}, {path: slices}) -> {path: Counts}`, on the host; of
        step 0, where they move.
      init: `(leaf) -> (masks, memory)`, valid for step 0.
      refresh: `(leaf, memory, step) -> (masks, memory)`, valid for `step`.
      due: at which steps a refresh takes effect; None for never.
      where: which parameters are sparse.
      structure: which patterns the masks have.
      reservoir: whether entries off B keep their value (else they are zero).
      probe: whether the step before a refresh sees, but does not apply, the gradient
        of entries outside B; "always": every step does; a schedule (step -> bool): the
        steps that it names do.
      candidates: `(leaf, memory, step) -> entries`, those whose gradient is seen in step
        `step`; None for all of them. Of the verbs, the leaf has only `pairs` in the packed
        layouts (`Draws`).
      observe: `(grad, memory, step) -> memory`, every step.
      penalty: `(leaf) -> gradient` of the method's own penalty, added on B.
      adjust: `(update, leaf, memory) -> update`, after the inner optimizer, every step.
      needs_learning_rate: whether `adjust` reads `leaf.learning_rate`.
      across: `([leaf], [memory], step) -> [(masks, memory)]`, in place of `refresh` where
        parameters compete with each other.
      fixed: whether A and B of every parameter keep their sizes (but for a last refresh
        that makes B smaller); packed arrays need that.
      note: what a plan says of sets whose sizes change; "" for nothing.
      needs_gradient: whether `refresh` reads the gradient of entries in A; packed arrays
        get it from `tk.probe`.
      entrywise: whether the memory, other than for reading by the user, holds something
        of every entry; packed arrays have no place for it.
      statistics: what `tx.update(..., stats=...)` must be given, see `tk.taps`: "norms",
        sums of magnitudes over the batch, or "sketches", sums with random signs.
      follows: the sparsities that `Leaf.counts` follow after step 0, traced; None where
        they stay as `counts` says.
    """

    name: str
    counts: CountRule
    init: Callable[[Leaf], tuple[LeafMasks, Memory]]
    refresh: Callable[[Leaf, Memory, Any], tuple[LeafMasks, Memory]]
    due: Due | None
    where: Any
    reservoir: bool
    structure: Any
    probe: bool | Literal["always"] | Due = False
    candidates: Callable[[Any, Memory, Any], Entries] | None = None
    observe: Callable[[Array, Memory, Any], Memory] | None = None
    penalty: Callable[[View], Array] | None = None
    adjust: Callable[[Array, View, Memory], Array] | None = None
    needs_learning_rate: bool = False
    across: (
        Callable[[list[Leaf], list[Memory], Any], list[tuple[LeafMasks, Memory]]] | None
    ) = None
    fixed: bool = True
    note: str = ""
    needs_gradient: bool = False
    entrywise: bool = False
    statistics: Literal["norms", "sketches"] | None = None
    follows: Following | None = None


class Mixture(NamedTuple):
    """Methods by parameter; from `tk.groups`.

    Attributes:
      rules: (pattern, method) pairs, the first that matches a path wins; None for dense.
    """

    rules: tuple[tuple[Any, Method | None], ...]

    @property
    def name(self) -> str:
        names = dict.fromkeys(m.name if m else "dense" for _, m in self.rules)
        return " + ".join(names)

    @property
    def methods(self) -> tuple[Method, ...]:
        return tuple(method for _, method in self.rules if method is not None)

    @property
    def due(self) -> Due | None:
        """Whether any of them is due."""
        each = [method.due for method in self.methods if method.due is not None]
        return (
            (lambda step: functools.reduce(operator.or_, (d(step) for d in each)))
            if each
            else None
        )

    @property
    def reservoir(self) -> bool:
        """Whether any of them keeps one."""
        return any(method.reservoir for method in self.methods)

    @property
    def statistics(self) -> bool:
        """Whether any of them draws by statistics of activations."""
        return any(method.statistics is not None for method in self.methods)

    @property
    def needs_gradient(self) -> bool:
        """Whether any of them reads the gradient of entries in A."""
        return any(method.needs_gradient for method in self.methods)

    @property
    def probe(self) -> bool | Literal["always"]:
        """What the most curious of them asks for."""
        asked = [method.probe for method in self.methods if method.probe]
        return "always" if "always" in asked else bool(asked)


Methods: TypeAlias = Method | Mixture


class SparseState(NamedTuple):
    """State of `tk.sparse`; everything in it is an array.

    Attributes:
      sparse_step: int32, number of updates so far; the masks are for this step.
      sparse_seed: uint32, from which every random draw is derived.
      sparse_masks: A, B and P for this step.
      sparse_memory: tree like the parameters, the method's memory at sparse leaves.
      sparse_reservoir: tree like the parameters, bool at sparse leaves: whether entries
        off B keep their value.
      leaks: int32, updates whose gradient was nonzero outside B and P.
      nonfinite_step: int32, first update with NaN or Inf in a gradient, -1 if none.
      nonfinite_leaf: uint32, CRC-32 of the path of the first such parameter.
      nonfinite_count: int32, how many entries of its gradient were NaN or Inf.
      sparse_inner: state of the inner optimizer.
      sparse_next: A and B that are chosen and not yet in force (`refresh_delay`, masked
        layout); None without a delay.
    """

    sparse_step: Int[Array, ""]
    sparse_seed: Array
    sparse_masks: Masks
    sparse_memory: PyTree
    sparse_reservoir: PyTree
    leaks: Int[Array, ""]
    nonfinite_step: Int[Array, ""]
    nonfinite_leaf: Array
    nonfinite_count: Int[Array, ""]
    sparse_inner: optax.OptState
    sparse_next: PyTree = None
