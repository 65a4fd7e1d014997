"""DSR: dynamic sparse reparameterization (Mostafa & Wang, arXiv 1902.05967)."""

from typing import Any

import jax.numpy as jnp

from topkast_jax import distribution as distribution_lib
from topkast_jax import levels
from topkast_jax._trees import Where, kernels
from topkast_jax._types import Due, Leaf, LeafMasks, Memory, Method, Schedule
from topkast_jax.apportion import flat
from topkast_jax.distribution import Distribution
from topkast_jax.methods.between import counts_of, regrowth, require_movable
from topkast_jax.methods.drop_grow import share_of
from topkast_jax.methods.initial import Init
from topkast_jax.methods.static import beginning
from topkast_jax.schedule import at_step, every
from topkast_jax.score import magnitude
from topkast_jax.structure import Structure, unstructured


def dsr(
    sparsity: float,
    *,
    threshold: float = 1e-3,
    drop_fraction: float | Schedule = 0.1,
    tolerance: float | Schedule = 0.1,
    refresh: Due = every(100),
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure = unstructured,
    where: Where = kernels,
    init: Init = "random",
) -> Method:
    """One magnitude threshold for all layers, which adapts; growth where much survives.

    A refresh, with K entries in all layers together:

        prunes   every active entry with |theta| < H, of K_p in all;
        adapts   H := 2 H if K_p < (1 - delta) N_p,  H / 2 if K_p > (1 + delta) N_p;
        grows    K_p entries at random, layer l a share R_l / sum R, R_l its survivors.

    The sum of |A_l| is constant. Shares are rounded by largest remainders; what exceeds a
    layer's room goes to the others in proportion, and equally if nothing survived. What
    was just pruned may be drawn again, and then keeps its value. A layer whose entries
    all fall below H grows none and stays empty, as in the paper. The first layers are
    small and keep dense values there; exclude such with `where`. A slice of a stacked
    parameter counts as a layer.

    Args:
      sparsity: fraction of zeros over all sparse parameters, in [0, 1).
      threshold: H of the first refresh, above 0; no schedule, as it adapts from there.
      drop_fraction: N_p / K, the share of A that each refresh should prune, in [0, 1],
        or a schedule of it by step. The paper gives N_p itself.
      tolerance: delta, in [0, 1), or a schedule of it by step.
      refresh: steps at which masks change.
      distribution: how sparsity is spread over parameters at the start.
      structure: `tk.unstructured`; others are refused.
      where: which parameters are sparse.
      init: the first A, "random", "magnitude" or a tree of masks like the parameters.
    Returns:
      A `Method` for the masked layout; its memory is H, the same at every parameter.
    Raises:
      ValueError: a number out of range, or another structure.
    Example:
      >>> import optax, topkast_jax as tk
      >>> method = tk.dsr(0.5, threshold=0.5, drop_fraction=0.25, refresh=tk.every(1))
      >>> tx = tk.sparse(optax.sgd(0.1), method)
      >>> params = {"one/kernel": jnp.ones((2, 2)), "two/kernel": jnp.zeros((2, 2))}
      >>> state = tx.init(params)
      >>> _, state = tx.update(params, state, params)
      >>> {name: int(mask.sum()) for name, mask in tk.masks(state).forward.items()}
      {'one/kernel': 4, 'two/kernel': 0}
      >>> float(state.sparse_memory["one/kernel"])  # two were pruned, one was wanted
      0.25

    Reference:
      Mostafa and Wang, "Parameter Efficient Training of Deep Convolutional Neural
      Networks by Dynamic Sparse Reparameterization", 2019, arXiv 1902.05967.
    """
    levels.refuse("tk.dsr", "it is where H begins, and H adapts", threshold=threshold)
    if not threshold > 0:
        raise ValueError(
            f"threshold={threshold} must be above 0: it doubles and halves"
        )
    if not callable(tolerance) and not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance} must lie in [0, 1)")
    require_movable(structure, "tk.dsr")
    if structure.block != (1, 1):
        raise ValueError(
            f"tk.dsr holds single weights against one threshold, not {structure.name}; "
            "use tk.unstructured, or tk.snfs, which moves blocks too"
        )
    share = share_of(drop_fraction)
    levels.refuse("tk.dsr", "it keeps the total constant", sparsity=sparsity)
    base = beginning(
        sparsity, distribution=distribution, structure=structure, where=where, init=init
    )

    def first(leaf: Leaf) -> tuple[LeafMasks, Memory]:
        return base.init(leaf)[0], jnp.float32(threshold)

    def across(
        leaves: list[Leaf], memories: list[Memory], step: Any
    ) -> list[tuple[LeafMasks, Memory]]:
        h = memories[0]  # the same at every parameter
        _, total = counts_of(leaves)
        kept = []
        for leaf in leaves:
            size = magnitude(leaf)
            stays = leaf.forward & (size.astype(jnp.float32) >= h)
            kept.append(leaf.top(size, leaf.size, among=stays))
        survivors = flat([leaf.count(k) for leaf, k in zip(leaves, kept, strict=True)])
        numbers = regrowth(leaves, kept, total, survivors)
        target = share(step) * total
        wanted = round(target) if isinstance(target, float) else jnp.round(target)
        pruned = (total - jnp.sum(survivors)).astype(jnp.float32)
        delta = at_step(tolerance, step)
        few, many = (1 - delta) * wanted, (1 + delta) * wanted
        raised = jnp.where(pruned < few, 2 * h, h)
        coming = jnp.where(pruned > many, h / 2, raised)
        out: list[tuple[LeafMasks, Memory]] = []
        for leaf, k, n in zip(leaves, kept, numbers, strict=True):
            chosen = leaf.union(k, leaf.draw(n, outside=k))
            out.append((leaf.masks(chosen, chosen), coming))
        return out

    return base._replace(
        name="dsr", init=first, due=refresh, across=across, fixed=False
    )
