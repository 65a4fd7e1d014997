"""Static random sparsity: the baseline that every dynamic method must beat."""

from typing import Any

from topkast_jax import distribution as distribution_lib
from topkast_jax import levels
from topkast_jax._trees import Where, kernels
from topkast_jax._types import (
    Following,
    Leaf,
    LeafMasks,
    Memory,
    Method,
    Schedule,
)
from topkast_jax.distribution import Copies, Distribution, Shapes
from topkast_jax.methods.initial import Init, starting_set
from topkast_jax.structure import Structure, unstructured


def static(
    sparsity: float,
    *,
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure = unstructured,
    where: Where = kernels,
    init: Init = "random",
) -> Method:
    """A mask that never changes, drawn from the seed: A = B, weights off A are zero.

    Args:
      sparsity: fraction of zeros, in [0, 1).
      distribution: how sparsity is spread over parameters.
      structure: which patterns the masks have, as `tk.blocks(8, 128)`.
      where: which parameters are sparse.
      init: the first A, "random", "magnitude" (the largest weights, for a network that
        was trained before) or a tree of masks like the parameters.
    Returns:
      A `Method` that never refreshes.
    Raises:
      ValueError: a sparsity or an `init` that makes no sense.
    Example:
      >>> import jax.numpy as jnp, optax, topkast_jax as tk
      >>> tx = tk.sparse(optax.sgd(0.1), tk.static(0.75))
      >>> masks = tk.masks(tx.init({"kernel": jnp.ones((4, 4))}))
      >>> int(masks.forward["kernel"].sum())
      4
    """
    levels.refuse(
        "tk.static",
        "masks never change; tk.set_ and others follow it",
        sparsity=sparsity,
    )
    return beginning(
        sparsity, distribution=distribution, structure=structure, where=where, init=init
    )


def beginning(
    sparsity: float | Schedule,
    *,
    distribution: Distribution,
    structure: Structure,
    where: Where,
    init: Init,
) -> Method:
    """What methods with A = B begin from: `static`, whose counts may follow a schedule."""
    at_first = levels.first_value(sparsity)
    first = starting_set(init)

    def counts(shapes: Shapes, copies: Copies) -> Any:
        k = distribution(shapes, at_first, copies)
        return distribution_lib.forward_and_backward(k, k, shapes)

    def init_masks(leaf: Leaf) -> tuple[LeafMasks, Memory]:
        chosen = first(leaf, leaf.counts.forward)
        return leaf.masks(chosen, chosen), ()

    def keep_masks(leaf: Leaf, memory: Memory, step: Any) -> tuple[LeafMasks, Memory]:
        del step
        return LeafMasks(leaf.forward, leaf.backward), memory

    return Method(
        name="static",
        counts=counts,
        init=init_masks,
        refresh=keep_masks,
        due=None,
        where=where,
        structure=structure,
        reservoir=False,
        **following(sparsity, sparsity, distribution),
    )


def following(
    forward: float | Schedule, backward: float | Schedule, distribution: Distribution
) -> dict[str, Any]:
    """Fields of a `Method` whose sparsities may be schedules."""
    if not callable(forward) and not callable(backward):
        return {}
    return dict(
        fixed=False,
        follows=Following(forward, backward, distribution),
        note="k_A and k_B are those of step 0, and follow a schedule",
    )
