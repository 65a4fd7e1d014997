"""Sets that shrink: how many units are left at a step, and which."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from topkast_jax import distribution as distribution_lib
from topkast_jax._types import (
    Counts,
    Due,
    Leaf,
    LeafMasks,
    Memory,
    Method,
    Score,
    Step,
)
from topkast_jax.distribution import Copies, Distribution, Shapes
from topkast_jax.layouts.masked import MaskedLeaf, top_across
from topkast_jax.structure import Structure, unstructured

Scope = Literal["layer", "global"]
Ramp: TypeAlias = Literal["cubic", "linear"] | Callable[[Any], Any]
"""A word, or progress in [0, 1] -> share of the way, which rises from 0 to 1."""

_RAMPS: dict[str, Callable[[Any], Any]] = {
    "cubic": lambda progress: 1 - (1 - progress) ** 3,
    "linear": lambda progress: progress,
}


class Budget(NamedTuple):
    """Numbers between a first and a last count, by step, as exact integers.

    A table for each pair of counts, made on the host: where a step may be traced, the
    formula itself would run in float32, which knows no integers beyond 2^24.

    Attributes:
      left: shares of the way from the first count to the last that are still to go.
      which: `step -> ` position in `left`.
    """

    left: tuple[Fraction, ...]
    which: Callable[[Any], Any]

    def table(self, first: int, last: int) -> list[int]:
        """round(last + (first - last) * left), halves to even."""
        return [round(last + (first - last) * share) for share in self.left]

    def entries(self, first: int, last: int, step: Step) -> Int[Array, ""]:
        """The number at a step, below 2^31."""
        return jnp.asarray(np.array(self.table(first, last), np.int32))[
            self.which(step)
        ]

    def total(self, first: int, last: int, step: Step) -> tuple[Array, Array]:
        """The number at a step, of any size, as a pair for `tk.top_k_tree`."""
        parts = [divmod(k, 2**30) for k in self.table(first, last)]
        high, low = jnp.asarray(np.array(parts, np.int32))[self.which(step)]
        return high, low


def between(refresh: Due, start: int, stop: int, ramp: Ramp) -> tuple[Budget, Due]:
    """The budget that goes down from `start` to `stop`, and when it does.

    Args:
      refresh: steps at which it may.
      start: before it nothing is due.
      stop: is itself due, and the last.
      ramp: see `Ramp`.
    Raises:
      ValueError: steps out of order, or a ramp that does not rise from 0 to 1.
    """
    if not 0 <= start < stop:
        raise ValueError(
            f"needs 0 <= start < stop, got start={start} and stop={stop}; for a single "
            "cut say tk.one_shot"
        )
    if isinstance(ramp, str) and ramp not in _RAMPS:
        raise ValueError(f"ramp={ramp!r} is not one of {tuple(_RAMPS)} or a function")
    way = _RAMPS[ramp] if isinstance(ramp, str) else ramp

    def due(step: Any) -> Any:
        return (refresh(step) & (step >= start) & (step < stop)) | (step == stop)

    steps = np.flatnonzero(due(np.arange(stop + 1)))
    progress = [Fraction(int(t) - start, stop - start) for t in steps]
    shares = [_exact(way(Fraction(p))) for p in progress]
    ends = [_exact(way(Fraction(p))) for p in (0, 1)]
    path = [Fraction(0), *shares, Fraction(1)]
    if ends != [0, 1] or sorted(path) != path:
        raise ValueError(f"ramp={ramp!r} does not rise from 0 to 1 over [0, 1]")

    def which(step: Any) -> Any:
        return jnp.sum(steps <= step)

    return Budget((Fraction(1), *(1 - share for share in shares)), which), due


def _exact(share: Any) -> Fraction:
    return Fraction(share if isinstance(share, int | Fraction) else float(share))


def require_scope(scope: str, structure: Structure) -> None:
    """Raises ValueError for an unknown scope, or units that cannot be compared."""
    if scope not in ("layer", "global"):
        raise ValueError(f"scope={scope!r} is not 'layer' or 'global'")
    if scope == "global" and structure != unstructured:
        raise ValueError(
            f'scope="global" compares single entries of all parameters, and '
            f"structure={structure.name} counts units of each; use "
            'structure=tk.unstructured, or scope="layer"'
        )


def counts_between(
    distribution: Distribution, first: float, last: float, scope: Scope
) -> Callable[[Shapes, Copies], Any]:
    """The counts of a method whose sets go from one sparsity to another.

    A first sparsity of 0 means everything, also where a distribution has other rules.
    Where parameters compete, the last counts are what each would keep on average.
    """

    def counts(shapes: Shapes, copies: Copies) -> Any:
        k_last = distribution(shapes, last, copies)
        k_first = distribution(shapes, first, copies)
        if first == 0:
            k_first = distribution_lib.uniform(shapes, 0.0)
        if scope == "global":
            return {p: Counts(k_last[p], k_first[p]) for p in shapes}
        return distribution_lib.forward_and_backward(k_last, k_first, shapes)

    return counts


def shrinking(
    base: Method,
    name: str,
    budget: Budget,
    due: Due,
    score: Score | None,
    *,
    sparsities: tuple[float, float],
    scope: Scope,
    nested: bool = True,
) -> Method:
    """A method with A = B, the best k(t) units, from the first masks of `base`.

    Args:
      base: gives init, where and structure.
      name: of the method.
      budget: k by step.
      due: when masks change.
      score: what a unit is worth; None chooses at random.
      sparsities: the first and the last.
      scope: "layer": k of each parameter by its counts; "global": all parameters
        compete for round((1 - sparsity) * total size).
      nested: whether units come out of A alone, so that none returns.
    """

    def refresh(leaf: Leaf, memory: Memory, step: Any) -> tuple[LeafMasks, Memory]:
        k = budget.entries(leaf.counts.backward, leaf.counts.forward, step)
        among = leaf.forward if nested else None
        if score is None:
            chosen = leaf.draw(k, among=among)
        else:
            chosen = leaf.top(score(leaf, memory), k, among=among)
        return leaf.masks(chosen, chosen), memory

    def across(leaves: list[Any], memories: list[Memory], step: Any) -> Any:
        first, last = totals(leaves, sparsities)
        k = budget.total(first, last, step)
        scores = None
        if score is not None:
            pairs = zip(leaves, memories, strict=True)
            scores = [score(leaf, memory) for leaf, memory in pairs]
        chosen = top_across(leaves, scores, k, nested)
        sets = [leaf.masks(a, a) for leaf, a in zip(leaves, chosen, strict=True)]
        return list(zip(sets, memories, strict=True))

    return base._replace(
        name=name,
        refresh=refresh,
        due=due,
        across=across if scope == "global" else None,
        fixed=False,
    )


def totals(leaves: list[MaskedLeaf], sparsities: tuple[float, ...]) -> list[int]:
    """round((1 - sparsity) * size) of all parameters together, for each sparsity."""
    size = sum(leaf.value.size for leaf in leaves)
    return [round((1 - sparsity) * size) for sparsity in sparsities]
