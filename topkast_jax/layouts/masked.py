"""The masked layout: bool masks over dense arrays. It defines what the others mean."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from topkast_jax._types import Axes, Counts, LeafMasks, Memory, Scalar, Score
from topkast_jax.select import random_k, top_k


class MaskedLeaf(NamedTuple):
    """A `Leaf` whose entries are all the positions, and whose sets are bool masks."""

    value: Array
    forward: Bool[Array, "..."]
    backward: Bool[Array, "..."]
    grad: Array
    path: str
    axes: Axes
    counts: Counts
    key: jax.Array
    memory: Memory = ()
    learning_rate: Scalar | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def top(self, scores: Array, k: Any, among: Array | None = None) -> Array:
        """The `k` entries of largest score, among those marked; ties by position."""
        return top_k(scores, k, self.axes.within, among)

    def grow(self, score: Score, k: Any, outside: Array) -> Array:
        """The `k` positions of largest score outside a set; ties in random order.

        Random, because all-zero gradients tie, and growth must not pile up at the
        lowest positions then.
        """
        scores = score(self, self.memory)
        return top_k(scores, k, self.axes.within, ~outside, self.key)

    def draw(self, k: Any, outside: Array | None = None) -> Array:
        """`k` random positions, outside a set."""
        # Marks made from the value, so that the draw is sharded like it.
        allowed = jnp.ones_like(self.value, bool) if outside is None else ~outside
        return random_k(self.key, k, self.shape, self.axes, allowed)

    def union(self, first: Array, second: Array) -> Array:
        """Union of two sets."""
        return first | second

    def where(self, condition: Any, first: Array, second: Array) -> Array:
        """One of two sets, by a scalar bool that may be traced."""
        return jnp.where(condition, first, second)

    def masks(self, forward: Array, backward: Array) -> LeafMasks:
        """A and B, as the state keeps them."""
        return LeafMasks(jnp.asarray(forward), jnp.asarray(backward))
