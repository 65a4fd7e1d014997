"""GraNet: RigL on a budget that shrinks."""

from typing import Any

from topkast_jax import distribution as distribution_lib
from topkast_jax._trees import Where, kernels
from topkast_jax._types import Due, Leaf, LeafMasks, Memory, Method, Schedule
from topkast_jax.distribution import Distribution
from topkast_jax.layouts.masked import top_across
from topkast_jax.methods.drop_grow import by_gradient, exchanged, share_of
from topkast_jax.methods.initial import Init
from topkast_jax.methods.pruning import falling
from topkast_jax.methods.shrinking import Ramp, Scope, between, totals
from topkast_jax.schedule import every
from topkast_jax.score import magnitude
from topkast_jax.structure import Structure, unstructured


def granet(
    sparsity: float,
    *,
    start: int,
    stop: int,
    initial_sparsity: float = 0.5,
    drop_fraction: float | Schedule = 0.5,
    refresh: Due = every(100),
    ramp: Ramp = "cubic",
    scope: Scope = "global",
    distribution: Distribution = distribution_lib.erk,
    structure: Structure = unstructured,
    where: Where = kernels,
    init: Init = "random",
) -> Method:
    """GraNet: gradual pruning with zero-cost neuroregeneration.

    At a refresh t, with k(t) of `tk.magnitude` from `start` to `stop`:

        prune   the k(t) largest |theta| of A stay, over all parameters together
        drop    of the k of them in a parameter, the n = round(drop_fraction * k)
                smallest go
        grow    the n largest |gradient| outside those kept come

    so it is RigL (`tk.rigl`) with a budget that shrinks; after `stop` it is RigL. What
    was pruned or dropped may grow again at once, and then keeps its value and moments;
    other grown weights start at zero. `stop` is itself due.

    Differs from the authors' code, which rounds n up, keeps one entry less by a strict
    threshold, and zeroes what pruning took even where it grows again. Corner cases: as
    for `tk.magnitude`, a parameter may lose all entries under "global"; it then grows
    none.

    Args:
      sparsity: fraction of zeros from `stop` on, in [0, 1).
      start: first step of the ramp.
      stop: last step of the ramp.
      initial_sparsity: fraction of zeros before `start`, in [0, sparsity].
      drop_fraction: share of A to replace, in [0, 1], or a schedule of it by step.
      refresh: steps at which masks change, before `start` and after `stop` as well.
      ramp: "cubic", "linear" or a function; see `tk.magnitude`.
      scope: "global", or "layer", where no parameter loses entries to another.
      distribution: how sparsity is spread over parameters; the paper's ERK.
      structure: which patterns the masks have, as `tk.blocks(8, 128)`.
      where: which parameters are sparse.
      init: the first A, "random", "magnitude" or a tree of masks like the parameters.
    Returns:
      A `Method`, for layout="masked": its sets change in size.
    Raises:
      ValueError: a number out of range or order, or a structure that cannot compete.
    Example:
      >>> import jax.numpy as jnp, optax, topkast_jax as tk
      >>> method = tk.granet(0.75, start=0, stop=2, refresh=tk.every(1))
      >>> tx = tk.sparse(optax.sgd(0.1), method)
      >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4)}
      >>> state, left = tx.init(params), []
      >>> for _ in range(3):
      ...     left.append(int(tk.masks(state).forward["kernel"].sum()))
      ...     _, state = tx.update(params, state, params)
      >>> left  # 4 + 4 * (1/2)^3, rounded to even, after one of two steps
      [8, 4, 4]

    Reference:
      Liu et al., "Sparse Training via Boosting Pruning Plasticity with
      Neuroregeneration", 2021, arXiv 2106.10404.
    """
    budget, within = between(refresh, start, stop, ramp)
    share = share_of(drop_fraction)

    def due(step: Any) -> Any:
        return refresh(step) | within(step)

    def refresh_masks(
        leaf: Leaf, memory: Memory, step: Any
    ) -> tuple[LeafMasks, Memory]:
        k = budget.entries(leaf.counts.backward, leaf.counts.forward, step)
        return exchanged(leaf, leaf.forward, k, share(step), by_gradient), memory

    def across(leaves: list[Any], memories: list[Memory], step: Any) -> Any:
        first, last = totals(leaves, (initial_sparsity, sparsity))
        k = budget.total(first, last, step)
        sizes = [magnitude(leaf) for leaf in leaves]
        found = []
        for leaf, stay in zip(leaves, top_across(leaves, sizes, k, True), strict=True):
            here = leaf.count(stay)
            found.append(exchanged(leaf, stay, here, share(step), by_gradient))
        return list(zip(found, memories, strict=True))

    base = falling(
        sparsity, initial_sparsity, scope, distribution, structure, where, init
    )
    compete = "; all parameters compete for the sum" if scope == "global" else ""
    return base._replace(
        name="granet",
        refresh=refresh_masks,
        due=due,
        across=across if scope == "global" else None,
        probe=True,
        note=f"k_B entries of A and B before step {start}, k_A from step {stop} on"
        + compete,
    )
