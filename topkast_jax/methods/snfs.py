"""SNFS: sparse networks from scratch (Dettmers & Zettlemoyer, arXiv 1907.04840)."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from topkast_jax import distribution as distribution_lib
from topkast_jax import levels, score
from topkast_jax._trees import Where, kernels
from topkast_jax._types import Due, Leaf, LeafMasks, Memory, Method, Schedule
from topkast_jax.apportion import flat, whole_sum
from topkast_jax.distribution import Distribution
from topkast_jax.methods.between import counts_of, regrowth, require_movable
from topkast_jax.methods.drop_grow import share_of
from topkast_jax.methods.initial import Init
from topkast_jax.methods.static import beginning
from topkast_jax.schedule import at_step, every
from topkast_jax.structure import Structure, unstructured


def snfs(
    sparsity: float | Schedule,
    *,
    drop_fraction: float | Schedule = 0.5,
    momentum: float | Schedule = 0.9,
    redistribute: bool = True,
    refresh: Due = every(100),
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure = unstructured,
    where: Where = kernels,
    init: Init = "random",
) -> Method:
    """Sparse momentum: drop by magnitude, grow and redistribute by momentum.

    With M the running mean of the gradient of all entries, M = beta M + (1 - beta) g at
    every step, a refresh

        drops    n_l = round(drop_fraction |A_l|) entries of smallest |theta| in layer l,
        shares   sum n_l out in proportion to the mean |M| over A_l before the drop,
        grows    in each layer that many entries of largest |M| outside those kept.

    The total is constant; what exceeds a layer's room goes to the others in proportion.
    What was just dropped may grow again, and then keeps its value. A slice of a stacked
    parameter counts as a layer. All gradients are seen at every step (P is everything),
    as the method needs: a dense weight gradient and one more array per parameter.

    Args:
      sparsity: fraction of zeros, in [0, 1); without `redistribute` it may be a schedule
        by step, which refreshes follow.
      drop_fraction: share of A to replace, in [0, 1], or a schedule of it by step. The
        paper anneals 0.5 with a cosine, once an epoch.
      momentum: beta, in [0, 1), or a schedule of it.
      redistribute: whether entries move between layers; else each layer regrows its own.
      refresh: steps at which masks change.
      distribution: how sparsity is spread over parameters at the start.
      structure: which patterns the masks have; to redistribute, `tk.unstructured` or
        `tk.blocks(...)`.
      where: which parameters are sparse.
      init: the first A, "random", "magnitude" or a tree of masks like the parameters.
    Returns:
      A `Method` for the masked layout.
    Raises:
      ValueError: a number out of range, or a structure that fixes the numbers which
        `redistribute` would change.
    Example:
      >>> import optax, topkast_jax as tk
      >>> tx = tk.sparse(optax.sgd(0.1), tk.snfs(0.75, refresh=tk.every(1)))
      >>> params = {name: jnp.ones((4, 4)) for name in ("one/kernel", "two/kernel")}
      >>> state = tx.init(params)
      >>> grads = {"one/kernel": jnp.ones((4, 4)), "two/kernel": jnp.zeros((4, 4))}
      >>> _, state = tx.update(grads, state, params)
      >>> {name: int(mask.sum()) for name, mask in tk.masks(state).forward.items()}
      {'one/kernel': 6, 'two/kernel': 2}

    Reference:
      Dettmers and Zettlemoyer, "Sparse Networks from Scratch: Faster Training without
      Losing Performance", 2019, arXiv 1907.04840.
    """
    if not callable(momentum) and not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum} must lie in [0, 1)")
    if redistribute:
        require_movable(structure, "tk.snfs(redistribute=True)")
        levels.refuse(
            "tk.snfs", "redistribute=True keeps the total constant", sparsity=sparsity
        )
    share = share_of(drop_fraction)
    base = beginning(
        sparsity, distribution=distribution, structure=structure, where=where, init=init
    )

    def first(leaf: Leaf) -> tuple[LeafMasks, Memory]:
        return base.init(leaf)[0], jnp.zeros_like(leaf.value, jnp.float32)

    def observe(grad: Array, mean: Memory, step: Any) -> Memory:
        beta = at_step(momentum, step)
        return beta * mean + (1 - beta) * grad.astype(jnp.float32)

    def replaced(leaf: Leaf, kept: Any, n: Any) -> LeafMasks:
        chosen = leaf.union(kept, leaf.grow(score.momentum, n, outside=kept))
        return leaf.masks(chosen, chosen)

    def refresh_masks(leaf: Leaf, mean: Memory, step: Any) -> tuple[LeafMasks, Memory]:
        k = leaf.counts.forward
        n = leaf.portion(share(step), k)
        kept = leaf.top(score.magnitude(leaf), k - n, among=leaf.forward)
        missing = n if isinstance(k, int) else k - leaf.count(kept)
        return replaced(leaf, kept, missing), mean

    def across(
        leaves: list[Leaf], means: list[Memory], step: Any
    ) -> list[tuple[LeafMasks, Memory]]:
        counts, total = counts_of(leaves)
        kept, sums = [], []
        for leaf, mean, k in zip(leaves, means, counts, strict=True):
            left = k - leaf.portion(share(step), k)
            kept.append(leaf.top(score.magnitude(leaf), left, among=leaf.forward))
            active = jnp.where(leaf.forward, abs(mean), jnp.zeros_like(mean))
            sums.append(whole_sum(active, leaf.axes.within))
        weights = flat(sums) / jnp.maximum(flat(counts), 1).astype(jnp.float32)
        numbers = regrowth(leaves, kept, total, weights)
        return [
            (replaced(leaf, k, n), mean)
            for leaf, k, n, mean in zip(leaves, kept, numbers, means, strict=True)
        ]

    return base._replace(
        name="snfs",
        init=first,
        refresh=refresh_masks,
        due=refresh,
        probe="always",
        observe=observe,
        across=across if redistribute else None,
        fixed=base.fixed and not redistribute,
        entrywise=True,
    )
