"""Straight-through: the network sees the k largest weights, all weights are trained."""

import jax.numpy as jnp

from topkast_jax import distribution as distribution_lib
from topkast_jax import levels
from topkast_jax._trees import Where, kernels
from topkast_jax._types import Due, Leaf, LeafMasks, Memory, Method, Schedule
from topkast_jax.distribution import Distribution
from topkast_jax.methods.initial import Init
from topkast_jax.methods.top_kast import top_kast
from topkast_jax.schedule import every
from topkast_jax.structure import Structure, unstructured


def straight_through(
    sparsity: float | Schedule,
    *,
    soft: bool = False,
    refresh: Due = every(1),
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure = unstructured,
    where: Where = kernels,
    init: Init = "magnitude",
) -> Method:
    """Straight-through: A = the k largest |theta|, B = everything.

    The gradient at alpha moves all of theta as if the selection were the identity, so
    any weight may come back. With S = A,

        hard:  alpha = theta on A
        soft:  alpha = sign(theta) max(|theta| - tau, 0) on A,
               tau = the (k + 1)-th largest |theta|

    The soft form is continuous in theta: a weight enters A at zero. (With the k-th
    magnitude, as some write it, k - 1 would be left.) tau is that of the last refresh.

    The hard form is `tk.top_kast(sparsity, 0.0, penalty=0.0)` under another name: the
    gradient of the weights is dense, and nothing is saved in the backward pass.

    Corner cases: weights of A that tie with tau are zero in alpha; sparsity 0 makes tau
    zero. The packed layouts hold B, here everything, and run the hard form without
    gaining from it; the soft one needs layout="masked".

    Args:
      sparsity: fraction of zeros in the forward pass, in [0, 1), or a schedule of it by
        step, which refreshes follow; then for layout="masked".
      soft: whether alpha is the soft threshold of theta.
      refresh: steps at which A (and tau) are chosen anew; the paper's every step.
      distribution: how sparsity is spread over parameters.
      structure: which patterns the masks have; for the soft form single entries.
      where: which parameters are sparse.
      init: the first A, until the first refresh: "magnitude", as at every refresh;
        "random"; or a tree of masks like the parameters.
    Returns:
      A `Method`.
    Raises:
      ValueError: a sparsity out of range, a soft form of units that are no entries, or
        of a first A that is not the largest weights.
    Example:
      >>> import optax, topkast_jax as tk
      >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]])}
      >>> for soft in (False, True):
      ...     tx = tk.sparse(optax.sgd(0.1), tk.straight_through(0.5, soft=soft))
      ...     tk.export(params, tx.init(params))["kernel"].tolist()
      [[0.0, 0.0], [3.0, -4.0]]
      [[0.0, 0.0], [1.0, -2.0]]

    Reference:
      Bengio, Léonard and Courville, "Estimating or propagating gradients through
      stochastic neurons", 2013, arXiv 1308.3432. Soft thresholds as in Kusupati et al.,
      2020, arXiv 2002.03231, with tau from k in place of a learned one.
    """
    levels.first_value(sparsity)
    hard = top_kast(
        sparsity,
        0.0,
        refresh=refresh,
        penalty=0.0,
        distribution=distribution,
        structure=structure,
        where=where,
        init=init,
    )._replace(name="straight_through")
    if not soft:
        return hard
    if not isinstance(init, str) or init != "magnitude":
        raise ValueError(
            "soft=True shrinks A by the largest weight outside of it, so A must be the "
            "largest weights; use init='magnitude', or soft=False"
        )
    if structure != unstructured:
        raise ValueError(
            f"soft=True shrinks single entries, and structure={structure.name} chooses "
            "units; use structure=tk.unstructured, or soft=False"
        )

    def shrunk(leaf: Leaf, sets: LeafMasks) -> LeafMasks:
        leaf.masks(*sets[:2], 0)  # an error where a layout knows no such weights
        rest = jnp.where(sets.forward, 0, abs(leaf.value))
        tau = jnp.max(rest, axis=leaf.axes.within, keepdims=True)
        return leaf.masks(sets.forward, sets.backward, tau)

    def init_masks(leaf: Leaf) -> tuple[LeafMasks, Memory]:
        sets, memory = hard.init(leaf)
        return shrunk(leaf, sets), memory

    def refresh_masks(
        leaf: Leaf, memory: Memory, step: object
    ) -> tuple[LeafMasks, Memory]:
        sets, memory = hard.refresh(leaf, memory, step)
        return shrunk(leaf, sets), memory

    return hard._replace(init=init_masks, refresh=refresh_masks)
