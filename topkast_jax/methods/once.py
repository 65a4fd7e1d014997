"""Pruned once: in the middle of training, or before it by the gradient (SNIP)."""

from fractions import Fraction
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array

from topkast_jax import distribution as distribution_lib
from topkast_jax import schedule
from topkast_jax import score as scores
from topkast_jax._trees import Where, kernels
from topkast_jax._types import Leaf, LeafMasks, Memory, Method, Score
from topkast_jax.distribution import Distribution
from topkast_jax.methods.initial import everything
from topkast_jax.methods.pruning import falling
from topkast_jax.methods.shrinking import Budget, Scope, require_scope, shrinking
from topkast_jax.methods.static import static
from topkast_jax.structure import Structure, unstructured

_SCORES: dict[str, Score | None] = {
    "magnitude": scores.magnitude,
    "saliency": scores.saliency,
    "random": None,
}


def one_shot(
    sparsity: float,
    *,
    at: int,
    score: Literal["magnitude", "saliency", "random"] = "magnitude",
    scope: Scope = "layer",
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure = unstructured,
    where: Where = kernels,
) -> Method:
    """Dense before one step, sparse from it on: the best k entries stay, trained on.

    A = B = everything before step `at`, the k best of them from then on; the rest are
    zero. `at=0` prunes the parameters that training starts from, so a network that was
    trained before is pruned and fine-tuned; its sets have one size, and any layout can
    hold them.

    Args:
      sparsity: fraction of zeros from `at` on, in [0, 1).
      at: the step.
      score: what stays: the largest |theta|; the largest |theta * dL/dtheta|, by the
        gradient of the step before; or a random choice.
      scope: "layer", or "global", where parameters compete with each other and one may
        lose all of its entries.
      distribution: how sparsity is spread over parameters; for scope="layer".
      structure: which patterns the masks have, as `tk.blocks(8, 128)`.
      where: which parameters are sparse.
    Returns:
      A `Method`; for layout="masked" unless `at` is 0.
    Raises:
      ValueError: a number or word that makes no sense, a structure that cannot compete,
        or something that step 0 cannot do.
    Example:
      >>> import jax.numpy as jnp, optax, topkast_jax as tk
      >>> tx = tk.sparse(optax.sgd(0.0), tk.one_shot(0.5, at=1))
      >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]])}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[0.0, 0.0], [3.0, -4.0]]
    """
    if score not in _SCORES:
        raise ValueError(f"score={score!r} is not one of {tuple(_SCORES)}")
    if at < 0:
        raise ValueError(f"at={at} must not be negative")
    require_scope(scope, structure)
    if at == 0:
        if score == "saliency" or scope == "global":
            raise ValueError(
                f"at=0 with score={score!r}, scope={scope!r}: before the first step "
                "there is no gradient, and parameters are chosen one by one; use at=1, "
                "or tk.snip"
            )
        first = static(
            sparsity,
            distribution=distribution,
            structure=structure,
            where=where,
            init=score,
        )
        return first._replace(name="one_shot")
    base = falling(sparsity, 0.0, scope, distribution, structure, where, "magnitude")
    method = shrinking(
        base,
        "one_shot",
        Budget((Fraction(0),), lambda step: 0 * step),
        schedule.at([at]),
        _SCORES[score],
        sparsities=(0.0, sparsity),
        scope=scope,
    )
    compete = "; all parameters compete for the sum" if scope == "global" else ""
    return method._replace(note=f"dense before step {at}, k_A entries after{compete}")


def snip(
    sparsity: float,
    *,
    batches: int = 1,
    average: Literal["gradient", "score"] = "gradient",
    scope: Scope = "global",
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure = unstructured,
    where: Where = kernels,
) -> Method:
    """SNIP: prunes once, before training, by the gradient of the first batch.

    Step 0 only looks: A is everything, B nothing, P everything, so that the gradient is
    that of the dense network at initialisation and no sparse parameter moves. From step
    1 on A = B = the k entries of largest connection sensitivity

        s = |theta * dL/dtheta|

    for good. The paper's c is 1 at initialisation, so that dL/dc = theta * dL/dtheta; its
    division of s by the sum of all s changes no order and is left out.

    Differs from the paper: parameters that are kept dense, and the schedules of the
    optimizer, take an ordinary step while the others only look. Corner cases: under
    "global" (the paper's) a parameter may be left without entries; see
    `tk.metrics.sparsity`. Equal sensitivities go to the lowest position. Should the
    gradient of the last looking step hold NaN or Inf, nothing is chosen, and sparse
    parameters never move: `tk.health` tells.

    Args:
      sparsity: fraction of zeros from step `batches` on, in [0, 1).
      batches: how many steps only look; the paper's 1. With more, a sum of gradients is
        kept in the state, for good.
      average: over several batches: "gradient", |theta * mean of gradients|, or
        "score", the mean of |theta * gradient|.
      scope: "global", or "layer", where each parameter keeps a share of its own.
      distribution: how sparsity is spread over parameters; for scope="layer".
      structure: which patterns the masks have, as `tk.blocks(8, 128)`.
      where: which parameters are sparse.
    Returns:
      A `Method`, for layout="masked": its sets change in size.
    Raises:
      ValueError: a number or word that makes no sense, a structure that cannot compete.
    Example:
      >>> import optax, topkast_jax as tk
      >>> tx = tk.sparse(optax.sgd(0.1), tk.snip(0.5))
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> grads = {"kernel": jnp.array([[9.0, 2.0], [2.0, 1.0]])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> tk.masks(state).forward["kernel"].astype(int).tolist()
      [[1, 0], [1, 0]]
      >>> optax.apply_updates(params, updates)["kernel"].tolist()
      [[1.0, 0.0], [3.0, 0.0]]

    Reference:
      Lee, Ajanthan and Torr, "SNIP: single-shot network pruning based on connection
      sensitivity", 2019, arXiv 1810.02340.
    """
    if batches < 1:
        raise ValueError(f"batches={batches} must be at least 1")
    if average not in ("gradient", "score"):
        raise ValueError(f"average={average!r} is not 'gradient' or 'score'")
    summed = batches > 1

    def init_masks(leaf: Leaf) -> tuple[LeafMasks, Memory]:
        nothing = leaf.top(scores.magnitude(leaf), 0)
        memory = jnp.zeros_like(leaf.value) if summed else ()
        return leaf.masks(everything(leaf), nothing), memory

    def sensitivity(leaf: Any, memory: Memory) -> Array:
        return abs(leaf.value * (memory if summed else leaf.grad))

    def add(grad: Array, memory: Memory, step: Any) -> Memory:
        del step
        return memory + (abs(grad) if average == "score" else grad)

    base = falling(sparsity, 0.0, scope, distribution, structure, where, "magnitude")
    method = shrinking(
        base._replace(init=init_masks),
        "snip",
        Budget((Fraction(0),), lambda step: 0 * step),
        schedule.at([batches]),
        sensitivity,
        sparsities=(0.0, sparsity),
        scope=scope,
    )
    compete = "; all parameters compete for the sum" if scope == "global" else ""
    return method._replace(
        probe=lambda step: step < batches,
        observe=add if summed else None,
        note=f"dense and untrained before step {batches}, k_A entries after{compete}",
    )
