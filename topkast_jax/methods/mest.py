"""MEST: memory-economic sparse training (Yuan et al., arXiv 2110.14032)."""

import math
from typing import Any

from topkast_jax import distribution as distribution_lib
from topkast_jax._trees import Where, kernels
from topkast_jax._types import Due, Leaf, LeafMasks, Memory, Method, Schedule
from topkast_jax.distribution import Copies, Distribution, Shapes
from topkast_jax.methods.drop_grow import share_of
from topkast_jax.methods.initial import Init
from topkast_jax.methods.static import beginning
from topkast_jax.schedule import at_step, every, require_at_least
from topkast_jax.score import gradient, magnitude
from topkast_jax.structure import Structure, unstructured


def mest(
    sparsity: float | Schedule,
    *,
    drop_fraction: float | Schedule = 0.3,
    weight: float | Schedule = 0.01,
    soft: bool = False,
    refresh: Due = every(100),
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure = unstructured,
    where: Where = kernels,
    init: Init = "random",
) -> Method:
    """Drop what is small and has a small gradient, grow at random: never a dense array.

    At a refresh with n = round(drop_fraction * k), scores S = |theta| + lambda |g|, g the
    gradient of the step before:

        hard bound (EM)     keep the k - n largest S of A, grow n: |A| = k always
        soft bound (EM&S)   keep the k largest S of A, grow n beyond: |A| = k + n

    With the soft bound nothing goes before it has been compared with what was grown: the
    refresh after next shrinks A back to k first. "Elastic mutation" lets n fall during
    training: give a schedule, such as `optax.piecewise_constant_schedule`; where it
    reaches 0 the soft bound ends at k exactly. What was just dropped may be drawn again,
    and then keeps its value. Gradients outside A are never seen.

    Args:
      sparsity: fraction of zeros, in [0, 1), or a schedule of it by step, which refreshes
        follow, for layout="masked"; with the soft bound, of the target k.
      drop_fraction: share of k that mutates, in [0, 1], or a schedule of it by step.
      weight: lambda, at least 0, or a schedule of it.
      soft: whether the bound on |A| is soft.
      refresh: steps at which masks change.
      distribution: how sparsity is spread over parameters.
      structure: which patterns the masks have, as `tk.blocks(8, 128)`.
      where: which parameters are sparse.
      init: the first A, "random", "magnitude" or a tree of masks like the parameters.
    Returns:
      A `Method`; for every layout with the hard bound (packed ones ask for
      found=tk.probe(...) at a refresh), for the masked one with the soft bound.
    Raises:
      ValueError: a number out of range.
    Example:
      >>> import jax.numpy as jnp, optax, topkast_jax as tk
      >>> tx = tk.sparse(optax.sgd(0.1), tk.mest(0.75, soft=True, refresh=tk.every(1)))
      >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4)}
      >>> state = tx.init(params)
      >>> _, after = tx.update(params, state, params)
      >>> [int(tk.masks(s).forward["kernel"].sum()) for s in (state, after)]
      [4, 5]

    Reference:
      Yuan et al., "MEST: Accurate and Fast Memory-Economic Sparse Training Framework on
      the Edge", 2021, arXiv 2110.14032.
    """
    require_at_least(0, weight=weight)
    share = share_of(drop_fraction)
    base = beginning(
        sparsity, distribution=distribution, structure=structure, where=where, init=init
    )

    def counts(shapes: Shapes, copies: Copies) -> Any:
        found = base.counts(shapes, copies)
        if not soft:
            return found
        most = 1.0 if callable(drop_fraction) else drop_fraction
        sizes = {p: math.prod(s) for p, s in shapes.items()}
        return {
            p: c._replace(backward=min(sizes[p], c.forward + round(most * c.forward)))
            for p, c in found.items()
        }

    def refresh_masks(
        leaf: Leaf, memory: Memory, step: Any
    ) -> tuple[LeafMasks, Memory]:
        k = leaf.counts.forward
        n = leaf.portion(share(step), k)
        scores = magnitude(leaf) + at_step(weight, step) * gradient(leaf)
        kept = leaf.top(scores, k if soft else k - n, among=leaf.forward)
        target = k + n if soft else k
        missing = n if isinstance(k, int) else target - leaf.count(kept)
        chosen = leaf.union(kept, leaf.draw(missing, outside=kept))
        return leaf.masks(chosen, chosen), memory

    return base._replace(
        name="mest",
        counts=counts,
        refresh=refresh_masks,
        due=refresh,
        fixed=base.fixed and not soft,
        needs_gradient=True,
    )
