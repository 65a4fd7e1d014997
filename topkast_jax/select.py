"""Exact selection of the k best entries by counting, never by sorting.

A threshold is bracketed on the bits of the scores with nothing but sums over the
scores, so sharded scores stay where they are: the collectives are counts. Ties at the
threshold are broken by a second search, over positions or over a random order.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Shaped

from topkast_jax import _trees
from topkast_jax._types import Axes, PyTree
from topkast_jax.draw import LARGEST_SLICE, bits_for, linear_index, random_order


def top_k(
    scores: Shaped[Array, "..."],
    k: Any,
    axes: tuple[int, ...] | None = None,
    among: Bool[Array, "..."] | None = None,
    key: jax.Array | None = None,
) -> Bool[Array, "..."]:
    """Mask of exactly the `k` largest entries, per slice off `axes`.

    A bracketed search on the bits of the scores: count reductions only, so a sharded
    input stays sharded and `k` may be traced. About fifteen passes over `scores`.

    Args:
      scores: any real dtype, any shape; -0 equals 0, NaN sorts last.
      k: in [0, slice size]; an int, a traced int32 scalar, or an int32 array with the
        shape of `scores` reduced over `axes`, those kept as 1.
      axes: axes of one selection, ascending; None for all. The rest are slices.
      among: choose only where True; where fewer than `k` are, all of them are chosen.
      key: ties at the threshold go to the lowest linear index within the slice, or, if
        given, in the random order of this key.
    Returns:
      Boolean mask of the shape and sharding of `scores`.
    Raises:
      ValueError: a static `k` outside [0, slice size], or a slice over 2^31-1 entries.
    Example:
      >>> scores = jnp.array([[3.0, 1.0, 2.0], [5.0, 5.0, 5.0]])
      >>> top_k(scores, 2).astype(int).tolist()
      [[0, 0, 0], [1, 1, 0]]
      >>> top_k(scores, 2, axes=(1,)).astype(int).tolist()
      [[1, 0, 1], [1, 1, 0]]
    """
    axes = tuple(range(scores.ndim)) if axes is None else axes
    size = math.prod(scores.shape[a] for a in axes)
    bits_for(size)
    _require_static_k(k, size, "top_k")
    if scores.size == 0:
        return jnp.zeros(scores.shape, bool)
    return _top_k(scores, jnp.asarray(k, jnp.int32), axes, among, key)


@functools.partial(jax.jit, static_argnames="axes")
def _top_k(
    scores: Array,
    k: Array,
    axes: tuple[int, ...],
    among: Array | None,
    key: jax.Array | None,
) -> Array:
    among = jnp.ones_like(scores, bool) if among is None else among

    def count(marks: Sequence[Array]) -> _Count:
        small = jnp.sum(marks[0], axis=axes, keepdims=True, dtype=jnp.int32)
        return _Count(jnp.zeros_like(small), small)

    bits, wanted = ordered_bits(scores), _Count.of(k)
    (sure,), (tied,), rest = _split([bits], [among], wanted, count)
    stack = tuple(a for a in range(scores.ndim) if a not in axes)
    if key is None:
        order = linear_index(scores.shape, axes)
    else:
        order = random_order(key, scores.shape, Axes(stack, (), axes, ()))
    first = jnp.uint32(LARGEST_SLICE) - order
    (won,), (last,), more = _split([first], [tied], rest, count)
    return sure | won | (last & more.positive())


def top_k_tree(
    scores: PyTree, k: Any, among: PyTree = None, key: jax.Array | None = None
) -> PyTree:
    """Masks of exactly the `k` largest entries over all leaves of a tree together.

    Args:
      scores: tree of arrays of one dtype, each of at most 2^31-1 entries. Counts across
        leaves do not overflow.
      k: in [0, total size]; a Python int, a traced int32 scalar, or, for what may not fit
        one, a pair (high, low) of them that stands for high * 2**30 + low.
      among: tree of bool masks of the same structure; None for everywhere.
      key: ties go to the first leaf and the lowest index, or in a random order over all
        leaves.
    Returns:
      Tree of boolean masks.
    Raises:
      ValueError: a static `k` outside [0, total size], or leaves of several dtypes.
    Example:
      >>> scores = {"a": jnp.array([1.0, 4.0]), "b": jnp.array([3.0, 2.0])}
      >>> {name: m.tolist() for name, m in top_k_tree(scores, 2).items()}
      {'a': [False, True], 'b': [True, False]}
    """
    leaves, treedef = _trees.flatten(scores)
    _require_static_k(k, sum(math.prod(leaf.shape) for leaf in leaves), "top_k_tree")
    if len({leaf.dtype for leaf in leaves}) > 1:
        raise ValueError(
            "top_k_tree: leaves of several dtypes cannot be compared; cast the scores"
        )
    marks = None if among is None else treedef.flatten_up_to(among)
    return treedef.unflatten(_top_k_of(leaves, _Count.of(k), marks, key))


@jax.jit
def _top_k_of(
    leaves: list[Array],
    k: "_Count",
    marks: list[Array] | None,
    key: jax.Array | None,
) -> list[Array]:
    if marks is None:
        marks = [jnp.ones_like(leaf, bool) for leaf in leaves]

    def count(marks: Sequence[Array]) -> _Count:
        per_leaf = (_Count.of(jnp.sum(m, dtype=jnp.int32)) for m in marks)
        return functools.reduce(_Count.plus, per_leaf)

    bits = [ordered_bits(x) for x in leaves]
    chosen, tied, rest = _split(bits, marks, k, count)
    if key is not None:
        keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
        orders = [  # full width, so that leaves of different size mix evenly
            random_order(leaf_key, x.shape) << (32 - bits_for(x.size))
            for leaf_key, x in zip(keys, leaves, strict=True)
        ]
        sure, tied, rest = _split(orders, tied, rest, count)
        chosen = [a | b for a, b in zip(chosen, sure, strict=True)]
    out = []
    for sure_here, ties in zip(chosen, tied, strict=True):
        here = count([ties])
        take = jnp.where(here.at_least(rest), rest.low, here.low)
        take = jnp.where(rest.high > 0, here.low, take)
        won = top_k(jnp.zeros(ties.shape), take, among=ties)
        rest = rest.minus(count([won]))
        out.append(sure_here | won)
    return out


def random_k(
    key: jax.Array,
    k: Any,
    shape: tuple[int, ...],
    roles: Axes | None = None,
    among: Bool[Array, "..."] | None = None,
) -> Bool[Array, "..."]:
    """Mask of `k` entries drawn without replacement, per slice.

    Args:
      key: typed PRNG key.
      k: as in `top_k`.
      shape: of the leaf.
      roles: axes of the leaf; None reads it as one slice.
      among: draw only where True.
    Returns:
      Boolean mask of `shape`.
    Example:
      >>> int(random_k(jax.random.key(0), 3, (4, 5)).sum())
      3
    """
    order = random_order(key, shape, roles)
    within = roles.within if roles else None
    return top_k(jnp.uint32(LARGEST_SLICE) - order, k, within, among)


def ordered_bits(scores: Array) -> Array:
    """Unsigned integers in the order of the scores; -0 as 0, NaN as the least (0)."""
    dtype = scores.dtype
    if jnp.issubdtype(dtype, jnp.bool_):
        return scores.astype(jnp.uint32)
    if jnp.issubdtype(dtype, jnp.unsignedinteger):
        return scores if dtype.itemsize >= 4 else scores.astype(jnp.uint32)
    if jnp.issubdtype(dtype, jnp.signedinteger):
        wide = scores if dtype.itemsize >= 4 else scores.astype(jnp.int32)
        unsigned = jnp.uint64 if wide.dtype.itemsize == 8 else jnp.uint32
        top = jnp.array(1 << (8 * wide.dtype.itemsize - 1), unsigned)
        return lax.bitcast_convert_type(wide, unsigned) ^ top
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"scores must be real, not {dtype}")
    wide = scores if dtype.itemsize >= 4 else scores.astype(jnp.float32)
    unsigned = jnp.uint64 if wide.dtype.itemsize == 8 else jnp.uint32
    top = jnp.array(1 << (8 * wide.dtype.itemsize - 1), unsigned)
    raw = lax.bitcast_convert_type(wide, unsigned)
    # All on the bits: a processor that flushes subnormal numbers equates them to zero.
    infinity = lax.bitcast_convert_type(jnp.array(jnp.inf, wide.dtype), unsigned)
    ordered = jnp.where(raw > top, ~raw, raw | top)
    return jnp.where(raw & ~top > infinity, jnp.zeros_like(ordered), ordered)


class _Count(NamedTuple):
    """Counts as pairs of int32 in base 2**30, exact over trees of any size."""

    high: Array
    low: Array

    @classmethod
    def of(cls, k: Any) -> "_Count":
        if isinstance(k, tuple):
            return cls(*(jnp.asarray(part, jnp.int32) for part in k))
        if isinstance(k, int | np.integer):
            return cls(jnp.int32(int(k) >> 30), jnp.int32(int(k) & (2**30 - 1)))
        k = jnp.asarray(k).astype(jnp.int32)
        return cls(k >> 30, k & (2**30 - 1))

    def plus(self, other: "_Count") -> "_Count":
        low = self.low + other.low
        return _Count(self.high + other.high + (low >> 30), low & (2**30 - 1))

    def minus(self, other: "_Count") -> "_Count":
        low = self.low - other.low
        return _Count(self.high - other.high + (low >> 30), low & (2**30 - 1))

    def at_least(self, other: "_Count") -> Array:
        equal = self.high == other.high
        return (self.high > other.high) | (equal & (self.low >= other.low))

    def equals(self, other: "_Count") -> Array:
        return (self.high == other.high) & (self.low == other.low)

    def positive(self) -> Array:
        return (self.high > 0) | ((self.high == 0) & (self.low > 0))

    def to_float(self) -> Array:
        return self.high.astype(jnp.float32) * 2.0**30 + self.low.astype(jnp.float32)


class _Bracket(NamedTuple):
    """The threshold lies in [lo, hi]; excess = count - k at lo (>= 0), beyond hi (< 0).

    `last` is the end that moved last (1 lo, -1 hi), for the Illinois rule.
    """

    lo: Array
    hi: Array
    excess_lo: Array
    excess_hi: Array
    last: Array
    passes: Array


def _split(
    bits: Sequence[Array],
    marks: Sequence[Array],
    k: _Count,
    count: Callable[[Sequence[Array]], _Count],
) -> tuple[list[Array], list[Array], _Count]:
    """Entries above the k-th largest, entries equal to it, and how many of those."""
    cut = _threshold(bits, marks, k, count)
    sure = [m & (b > cut) for m, b in zip(marks, bits, strict=True)]
    tied = [m & (b == cut) for m, b in zip(marks, bits, strict=True)]
    return sure, tied, k.minus(count(sure))


def _threshold(
    bits: Sequence[Array],
    marks: Sequence[Array],
    k: _Count,
    count: Callable[[Sequence[Array]], _Count],
) -> Array:
    """Largest T such that at least `k` marked entries are >= T; 0 if fewer are marked.

    Four halvings, then regula falsi (Illinois), then halvings again from pass 40 on, so
    that no distribution of scores costs more than 40 + 64 passes.
    """
    dtype = bits[0].dtype
    width = 8 * dtype.itemsize

    def count_from(threshold: Array) -> _Count:
        return count([m & (b >= threshold) for m, b in zip(marks, bits, strict=True)])

    def open_(state: _Bracket) -> Array:
        return (state.lo < state.hi).any()

    def step(state: _Bracket) -> _Bracket:
        span = state.hi - state.lo
        half = span // 2 + (span & 1)
        share = state.excess_lo / (state.excess_lo - state.excess_hi)
        reach = (span.astype(jnp.float32) * share).astype(dtype)
        guess = jnp.where((state.passes < 4) | (state.passes >= 40), half, reach)
        at = state.lo + jnp.clip(guess, jnp.minimum(span, 1), span)
        found = count_from(at)
        enough, exact = found.at_least(k), found.equals(k)
        excess = found.minus(k).to_float()
        again = jnp.where(enough, state.last == 1, state.last == -1)
        damped = jnp.where(again, 0.5, 1.0)
        moving = state.lo < state.hi
        new = _Bracket(
            jnp.where(enough, at, state.lo),
            jnp.where(exact, at, jnp.where(enough, state.hi, at - 1)),
            jnp.where(enough, excess, state.excess_lo * damped),
            jnp.where(enough, state.excess_hi * damped, excess),
            jnp.where(enough, 1, -1),
            state.passes + 1,
        )
        held = jax.tree.map(lambda a, b: jnp.where(moving, a, b), new, state)
        return held._replace(passes=new.passes)

    everything = count_from(jnp.zeros((), dtype))
    none = jnp.zeros_like(everything.low)  # sharded as counts are
    top = jnp.array(2**width - 1, dtype)
    wanted = _Count(k.high + none, k.low + none)
    done = everything.equals(wanted) | wanted.minus(everything).positive()
    state = _Bracket(
        none.astype(dtype),
        jnp.where(done, none.astype(dtype), top),
        jnp.maximum(everything.minus(wanted).to_float(), 1.0),
        jnp.minimum(-wanted.to_float(), -1.0),
        none,
        jnp.int32(0),
    )
    return lax.while_loop(open_, step, state).lo


def _require_static_k(k: Any, size: int, name: str) -> None:
    if isinstance(k, int | np.integer) and not 0 <= k <= size:
        raise ValueError(f"{name}: k={k} is outside [0, {size}]: there is no such mask")
