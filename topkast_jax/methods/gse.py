"""Guided stochastic exploration (Heddes et al., arXiv 2401.06898)."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp

from topkast_jax import distribution as distribution_lib
from topkast_jax import levels
from topkast_jax._trees import Where, kernels
from topkast_jax._types import (
    Draws,
    Due,
    Entries,
    Leaf,
    LeafMasks,
    Memory,
    Method,
    Schedule,
    View,
)
from topkast_jax.distribution import Distribution
from topkast_jax.methods.drop_grow import share_of
from topkast_jax.methods.initial import Init
from topkast_jax.methods.static import beginning
from topkast_jax.portion import ceiling
from topkast_jax.schedule import LOOKED_AT, at_step, every
from topkast_jax.score import gradient, magnitude
from topkast_jax.select import top_k_tree
from topkast_jax.structure import Structure, unstructured

Candidates = Literal["uniform", "grabo", "graest", "all"]
Scope = Literal["layer", "global"]
STATISTICS: dict[str, Any] = {"grabo": "norms", "graest": "sketches"}


def gse(
    sparsity: float | Schedule,
    *,
    candidates: Candidates = "uniform",
    subset: float | Schedule = 1.0,
    drop_fraction: float | Schedule = 0.2,
    refresh: Due = every(1000),
    scope: Scope = "layer",
    distribution: Distribution = distribution_lib.erdos_renyi,
    structure: Structure = unstructured,
    where: Where = kernels,
    init: Init = "random",
) -> Method:
    """GSE: drop by magnitude, grow by the gradient of a few random candidates.

    At a refresh, per parameter (per slice of a stacked one),

        S = sample(f, g, ceil(gamma |A|)) less A     row i ~ f, column j ~ g
        k = min(ceil(alpha_t |A|), |S|)
        G = the k largest |gradient| on S,   P = the k smallest |theta| on A
        A = (A less P) with G                        new weights and moments zero

    The pairs are drawn with replacement, and S excludes the A of before: what is pruned
    cannot grow in the same refresh. With the inputs h and the gradients of the outputs
    delta of a layer, [in, batch] and [out, batch],

        uniform    f, g ~ 1
        grabo      f ~ |h| 1,  g ~ |delta| 1     |gradient| <= (|h| 1)(|delta| 1)^T
        graest     f ~ |h s|,  g ~ |delta s|     E (h s)(delta s)^T = gradient

    s is one vector of random signs for both. A convolution is read as a matrix over its
    unfolded patches. "all" takes every entry as a candidate: RigL without regrowth.

    Corner cases: no candidate outside A, and nothing changes. Statistics that are zero
    everywhere, and the first step, draw uniformly. Where a structure makes several
    selections of a parameter (fan-in, N:M), each draws its own ceil(gamma |A|) among
    its units, and alpha_t |A| is rounded at random.

    What differs: candidates are drawn at the end of the step before the one whose
    gradient they see, by the statistics of that step (one batch earlier than in the
    paper), so that no more of the gradient is ever made. The paper's pseudocode replaces
    the optimizer's step by the refresh; as in the authors' code, both happen. That code
    compares all layers with each other (`scope="global"`) and takes everything as
    candidates where a layer is at most half sparse; here no layer is special. Its GraEst
    multiplies one row of delta by the signs in convolutions; the paper is taken.

    Args:
      sparsity: fraction of zeros, in [0, 1), or a schedule of it by step, which refreshes
        follow; then for layout="masked".
      candidates: how they are drawn; "grabo" and "graest" need
        `tx.update(..., stats=...)`, see `tk.taps`.
      subset: gamma, candidates drawn for each entry of A, above 0, or a schedule of it by
        step, which counts up to the largest of its values at steps 0, 1, 2, 4, ... 2^20.
      drop_fraction: alpha_t, share of A to replace, in [0, 1], or a schedule of it by
        step; the paper has `tk.cosine(0.2, T_end)`.
      refresh: steps at which masks change; the paper has `tk.every(1000, stop=T_end)`.
      scope: "layer", or "global": k, G and P over all parameters together, whose sizes
        then change; that needs the masked layout.
      distribution: how sparsity is spread over parameters.
      structure: which patterns the masks have, as `tk.blocks(8, 128)`.
      where: which parameters are sparse.
      init: the first A, "random", "magnitude" (the largest weights, for a network that
        was trained before) or a tree of masks like the parameters.
    Returns:
      A `Method`.
    Raises:
      ValueError: an unknown word, a number out of range, or a structure whose selections
        are not whole parameters with `scope="global"`.
    Example:
      >>> import optax, topkast_jax as tk
      >>> method = tk.gse(0.75, subset=2.0, refresh=tk.every(1))
      >>> state = tk.sparse(optax.sgd(0.1), method).init({"kernel": jnp.zeros((4, 4))})
      >>> seen = tk.masks(state).probe["kernel"]  # of eight draws, distinct ones
      >>> 0 < int(seen.sum()) <= 8
      True

    Reference:
      Heddes, Srinivasa, Givargis and Nicolau, "Always-sparse training by growing
      connections with guided stochastic exploration", 2024, arXiv 2401.06898.
    """
    options: dict[str, tuple[Any, tuple[str, ...]]] = {
        "candidates": (candidates, ("uniform", "grabo", "graest", "all")),
        "scope": (scope, ("layer", "global")),
    }
    for name, (value, known) in options.items():
        if value not in known:
            raise ValueError(f"{name}={value!r} is not one of {known}")
    largest = _largest(subset)
    share = share_of(drop_fraction)
    if scope == "global":
        levels.refuse("tk.gse", 'scope="global" keeps the total', sparsity=sparsity)
    if scope == "global" and (structure.scope != "slice" or structure.parts > 1):
        raise ValueError(
            f'scope="global" compares all units of all parameters, and {structure.name} '
            'keeps the same number in every part; use scope="layer"'
        )

    def sides(leaf: View) -> tuple[Any, Any]:
        if candidates == "uniform" or leaf.stats is None:
            return None, None
        return abs(leaf.stats.inputs), abs(leaf.stats.outputs)

    def all_of(leaf: Leaf) -> Entries:
        """A, in whole units."""
        most = leaf.counts.forward if fixed else leaf.size
        return leaf.top(magnitude(leaf), most, among=leaf.forward)

    def draw(leaf: Draws, memory: Memory, step: Any) -> Entries:
        del memory
        k, share = leaf.counts.forward, at_step(subset, step)
        if isinstance(k, int) and not callable(subset):
            return leaf.pairs(ceiling(share, k), *sides(leaf))
        most = ceiling(largest, k if isinstance(k, int) else leaf.size)
        n = jnp.minimum(ceiling(jnp.float32(share), k), most)
        return leaf.pairs(n, *sides(leaf), most=most)

    def draw_for_any_size(leaf: Leaf, memory: Memory, step: Any) -> Entries:
        del memory
        share = jnp.float32(at_step(subset, step))
        most = ceiling(largest, leaf.size)
        n = jnp.minimum(ceiling(share, leaf.count(all_of(leaf))), most)
        return leaf.pairs(n, *sides(leaf), most=most)

    def refresh_masks(
        leaf: Leaf, memory: Memory, step: Any
    ) -> tuple[LeafMasks, Memory]:
        k = leaf.counts.forward
        before = all_of(leaf)
        n = leaf.portion(share(step), k, up=True)
        if not isinstance(k, int):  # more than is there is asked for
            n = n + jnp.maximum(k - leaf.count(before), 0)
        grown = leaf.grow(gradient, n, outside=before, among=leaf.seen)
        kept = leaf.top(magnitude(leaf), k - leaf.count(grown), among=leaf.forward)
        chosen = leaf.union(kept, grown)
        return leaf.masks(chosen, chosen), memory

    base = beginning(
        sparsity, distribution=distribution, structure=structure, where=where, init=init
    )
    fixed = base.fixed and scope == "layer"
    sampled = draw if scope == "layer" else draw_for_any_size
    return base._replace(
        name="gse",
        refresh=refresh_masks,
        due=refresh,
        probe=True,
        candidates=None if candidates == "all" else sampled,
        statistics=STATISTICS.get(candidates),
        across=_over_all(share) if scope == "global" else None,
        fixed=fixed,
    )


def _largest(subset: float | Schedule) -> float:
    """The largest share of candidates, at the steps that are looked at in advance.

    Raises:
      ValueError: a value that is not above 0.
    """
    values = {step: float(at_step(subset, step)) for step in LOOKED_AT}
    for step, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(
                f"subset={value} at step {step} must be above 0: candidates for each of A"
                if callable(subset)
                else f"subset={value} must be above 0: candidates for each of A"
            )
    return max(values.values())


def _over_all(share: Callable[[Any], Any]) -> Callable[..., Any]:
    """k, G and P over all parameters together, in the masked layout."""

    def choose(leaves: list[Any], memories: list[Memory], step: Any) -> Any:
        def units(of: Callable[[Any], Any]) -> list[Any]:
            return [leaf.grid.scores(of(leaf).astype(jnp.float32)) for leaf in leaves]

        grids = [leaf.grid for leaf in leaves]
        present = [
            g.of_entries(leaf.forward) for g, leaf in zip(grids, leaves, strict=True)
        ]
        allowed = [
            ~here if leaf.seen is None else ~here & leaf.grid.of_entries(leaf.seen)
            for here, leaf in zip(present, leaves, strict=True)
        ]
        total = _size(present)
        n = jnp.minimum(ceiling(jnp.float32(share(step)), total), total)
        grown = top_k_tree(units(gradient), n, allowed, leaves[0].key)
        kept = top_k_tree(units(magnitude), total - _size(grown), present)
        found = []
        for leaf, memory, some, new in zip(leaves, memories, kept, grown, strict=True):
            chosen = leaf.grid.spread(some | new)
            found.append((leaf.masks(chosen, chosen), memory))
        return found

    return choose


def _size(masks: list[Any]) -> Any:
    """Entries of some masks together."""
    return sum(jnp.sum(mask, dtype=jnp.int32) for mask in masks)
