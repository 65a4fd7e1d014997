"""The packed layout: the units of B alone, those of A first, with their numbers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from topkast_jax._types import Axes, Counts, Memory, Scalar
from topkast_jax.grid import Grid
from topkast_jax.pairs import draw as draw_pairs


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["index"],
    meta_fields=["grid", "k_forward", "multiplied"],
)
@dataclasses.dataclass(frozen=True)
class Index:
    """Where the units of B of one parameter lie: A and B of a packed layout.

    Attributes:
      index: int32 [*stack, n_B], numbers of units within their slice (`Grid.to_units`):
        first those of A, then the rest of B, each part by selection, then ascending.
      grid: the units of the whole parameter.
      k_forward: n_A, how many of each slice belong to A.
      multiplied: whether the layout multiplies by units (block) or expands (packed).
    """

    index: Any
    grid: Grid
    k_forward: int
    multiplied: bool = False

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the values: [*stack, n_B, *unit]."""
        return (*self.index.shape, *self.grid.unit)

    @property
    def here(self) -> Grid:
        """Units of what `index` holds: of one slice, inside a scan over the stack."""
        return self.grid.inner(len(self.grid.stack) - (self.index.ndim - 1))

    @property
    def in_forward(self) -> Bool[Array, "..."]:
        """Which units belong to A; broadcasts against the values."""
        n = self.index.shape[-1]
        return (jnp.arange(n) < self.k_forward).reshape(n, *(1 for _ in self.grid.unit))


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "index"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class BlockMatrix:
    """alpha by units, as `tk.ops.sparse_matmul` takes it.

    Attributes:
      values: [*stack, n_B, *unit], those of A first.
      index: where they belong, and how many are A.
    """

    values: Any
    index: Index


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "delta"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Probed:
    """Packed values and a dense zero, the gradient of which `tk.probe` asks for."""

    values: Any
    delta: Any


def gather(dense: Any, index: Index) -> Any:
    """Values [*stack, n_B, *unit] of a parameter in its own shape."""
    grid = index.here
    units = grid.to_units(dense)
    flat = index.index.reshape(len(units), -1)
    found = jax.vmap(lambda u, i: u.at[i].get(mode="promise_in_bounds"))(units, flat)
    return found.reshape(*index.index.shape, *grid.unit)


def scatter(values: Array, index: Index) -> Array:
    """Inverse of `gather`: the values in their places, zeros elsewhere."""
    grid = index.here
    slices, n = grid.whole[0], values.shape[index.index.ndim - 1]
    flat = index.index[..., :n].reshape(slices, n)

    def one(value: Array, at: Array) -> Array:
        empty = jnp.zeros((grid.count, *grid.unit), values.dtype)
        options: Any = dict(unique_indices=True, mode="promise_in_bounds")
        # As an addition where there are numbers: that can be transposed.
        if values.dtype == jnp.bool_:
            return empty.at[at].set(value, **options)
        return empty.at[at].add(value, **options)

    stored = values.reshape(slices, n, *grid.unit)
    return grid.from_units(jax.vmap(one)(stored, flat))


@jax.custom_jvp
def expand(values: Array, index: Index) -> Array:
    """alpha in the shape of the parameter; its gradient reaches all of B."""
    axis = index.index.ndim - 1
    forward = jax.lax.slice_in_dim(values, 0, index.k_forward, axis=axis)
    return scatter(forward, index)


@expand.defjvp
def _expand_jvp(primals: Any, tangents: Any) -> Any:
    values, index = primals
    return expand(values, index), scatter(tangents[0], index)


@dataclasses.dataclass(frozen=True)
class PackedLeaf:
    """A `View` of the units of B.

    Sets are chosen on the host (`layouts.host`), where positions are lists of any
    length. Here are only the draws that a method asks to see the gradient of.
    """

    value: Any
    grad: Any
    index: Index
    path: str
    key: jax.Array
    memory: Memory = ()
    learning_rate: Scalar | None = None
    stats: Any = None
    seen: Any = None
    step: Any = None

    def pairs(
        self, n: Any, inputs: Any = None, outputs: Any = None, most: int | None = None
    ) -> Array:
        """Numbers of units that `n` draws hit in each selection, int32 [*stack, c]."""
        grid = self.index.grid
        drawn = n if most is None else most
        _, rows, columns = draw_pairs(self.key, drawn, grid, inputs, outputs)
        numbers = grid.numbers(rows, columns)
        if most is not None:  # draws beyond n are none
            late = jnp.broadcast_to(jnp.arange(most) >= n, rows.shape)
            numbers = jnp.where(late.reshape(numbers.shape), -1, numbers)
        return numbers.reshape(*grid.stack, -1)

    @property
    def forward(self) -> Bool[Array, "..."]:
        return self.index.in_forward

    @property
    def backward(self) -> Bool[Array, "..."]:
        return jnp.ones_like(self.index.in_forward)

    @property
    def counts(self) -> Counts:
        """Units of A and B per selection."""
        each = self.index.grid.selections
        return Counts(self.index.k_forward // each, self.index.index.shape[-1] // each)

    @property
    def size(self) -> int:
        """Units that compete in one selection."""
        return self.index.grid.size

    @property
    def shape(self) -> tuple[int, ...]:
        return self.index.grid.shape

    @property
    def axes(self) -> Axes:
        return self.index.grid.axes
