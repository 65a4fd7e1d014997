"""The masked layout: bool masks over dense arrays. It defines what the others mean."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from topkast_jax._types import Axes, Counts, LeafMasks, Memory, Scalar, Score
from topkast_jax.grid import Grid
from topkast_jax.pairs import draw as draw_pairs
from topkast_jax.portion import portion
from topkast_jax.select import random_k, top_k, top_k_tree


@dataclasses.dataclass(frozen=True)
class MaskedLeaf:
    """A `Leaf` whose entries are all the positions, and whose sets are bool masks."""

    value: Array
    forward: Bool[Array, "..."]
    backward: Bool[Array, "..."]
    grad: Array
    path: str
    grid: Grid
    counts: Counts
    key: jax.Array
    memory: Memory = ()
    learning_rate: Scalar | None = None
    stats: Any = None
    seen: Any = None
    step: Any = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def axes(self) -> Axes:
        return self.grid.axes

    @property
    def size(self) -> int:
        """Units that compete in one selection."""
        return self.grid.size

    @property
    def selections(self) -> int:
        """Selections in one slice."""
        return self.grid.selections

    def top(self, scores: Array, k: Any, among: Array | None = None) -> Array:
        """The `k` units of largest score, among those marked; ties by position."""
        return self._top(scores, k, among, None)

    def quota(self, scores: Array, k: Any, among: Array | None = None) -> Array:
        """How many of a slice's `k` units of largest score lie in each selection."""
        grid = self.grid
        units = grid.scores(scores)
        allowed = None if among is None else grid.of_entries(among)
        axes = tuple(a for a in range(units.ndim) if a not in grid.stacked)
        chosen = top_k(units, k, axes, allowed)
        return jnp.sum(chosen, axis=grid.roles.within, keepdims=True, dtype=jnp.int32)

    def grow(
        self, score: Score, k: Any, outside: Array, among: Array | None = None
    ) -> Array:
        """The `k` units of largest score outside a set; ties in random order.

        Random, because all-zero gradients tie, and growth must not pile up at the
        lowest positions then.
        """
        allowed = ~outside if among is None else among & ~outside
        return self._top(score(self, self.memory), k, allowed, self.key)

    def _top(
        self, scores: Array, k: Any, among: Array | None, key: jax.Array | None
    ) -> Array:
        grid = self.grid
        allowed = None if among is None else grid.of_entries(among)
        within = grid.roles.within
        return grid.spread(top_k(grid.scores(scores), k, within, allowed, key))

    def draw(
        self, k: Any, outside: Array | None = None, among: Array | None = None
    ) -> Array:
        """`k` random units, outside a set, and within one if given."""
        grid = self.grid
        # Marks made from the value, so that the draw is sharded like it.
        allowed = jnp.ones_like(self.value, bool) if among is None else among
        allowed = grid.of_entries(allowed if outside is None else allowed & ~outside)
        return grid.spread(random_k(self.key, k, allowed.shape, grid.roles, allowed))

    def pairs(
        self, n: Any, inputs: Any = None, outputs: Any = None, most: int | None = None
    ) -> Array:
        """What `n` draws of a row and a column hit in each selection; see `pairs.draw`."""
        grid = self.grid
        most = n if most is None else most
        slices, rows, columns = draw_pairs(self.key, most, grid, inputs, outputs)
        places = grid.places(slices, rows, columns)
        if most is not n:  # draws beyond n fall outside
            late = jnp.arange(most) >= jnp.reshape(
                n, (-1, *(1 for _ in rows.shape[1:]))
            )
            places = (jnp.where(late, grid.array[0], places[0]), *places[1:])
        # Marks made from the value, so that the set is sharded like it.
        marks = jnp.zeros_like(self.value, bool)
        marks = marks.reshape(grid.array) if grid.plain else jnp.zeros(grid.array, bool)
        lies: Any = jax.typeof(marks).sharding
        explicit = jax.sharding.AxisType.Explicit in lies.mesh.axis_types
        out = {"out_sharding": lies} if explicit else {}
        return grid.spread(marks.at[places].set(True, mode="drop", **out))

    def portion(self, share: Any, k: Any, up: bool = False) -> Any:
        """`share * k` as a number of units of a selection; see `grid.portion`."""
        return portion(share, k, self.grid, self.key, up)

    def union(self, first: Array, second: Array) -> Array:
        """Union of two sets."""
        return first | second

    def where(self, condition: Any, first: Array, second: Array) -> Array:
        """One of two sets, by a scalar bool that may be traced."""
        return jnp.where(condition, first, second)

    def given(self, mask: Any, most: int) -> Array:
        """A set from a bool array of the parameter's shape, of at most so many units."""
        self.grid.require(self.path, mask, most)
        return jnp.asarray(mask)

    def marks(self, entries: Array) -> Array:
        """A set as a bool array of the parameter's shape."""
        return entries

    def count(self, entries: Array) -> Array:
        """Units of a set: int32, the shape of `grid.array` with 1 for axes within."""
        marks = self.grid.of_entries(entries)
        within = self.grid.roles.within
        return jnp.sum(marks, axis=within, keepdims=True, dtype=jnp.int32)

    def masks(
        self,
        forward: Array,
        backward: Array,
        shrink: Any = None,
        fresh: Array | None = None,
    ) -> LeafMasks:
        """A and B, as the state keeps them."""
        return LeafMasks(jnp.asarray(forward), jnp.asarray(backward), shrink, fresh)


def top_across(
    leaves: list[MaskedLeaf], scores: list[Array] | None, k: Any, nested: bool
) -> list[Array]:
    """The `k` entries of largest score over several parameters together.

    Args:
      leaves: the parameters.
      scores: of their entries; None chooses at random.
      k: as `tk.top_k_tree` takes it.
      nested: whether only entries of A may be chosen.
    Returns:
      A set for each parameter; one may be empty. Ties go to the first parameter and the
      lowest position.
    """
    among = [leaf.forward for leaf in leaves] if nested else None
    if scores is None:  # all equal, and ties in random order
        equal = [jnp.zeros_like(leaf.value, jnp.float32) for leaf in leaves]
        return list(top_k_tree(equal, k, among, leaves[0].key))
    dtype = jnp.result_type(*scores)
    return list(top_k_tree([s.astype(dtype) for s in scores], k, among))
