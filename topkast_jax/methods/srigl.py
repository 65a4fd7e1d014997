"""SRigL: constant fan-in and ablation of neurons (Lasby et al., arXiv 2305.02299)."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from topkast_jax import distribution as distribution_lib
from topkast_jax._trees import Where, kernels
from topkast_jax._types import Due, Leaf, LeafMasks, Memory, Method, Schedule
from topkast_jax.distribution import Distribution
from topkast_jax.methods.drop_grow import share_of
from topkast_jax.methods.initial import Init
from topkast_jax.methods.static import beginning
from topkast_jax.schedule import at_step, every, require_at_least
from topkast_jax.score import gradient, magnitude
from topkast_jax.select import top_k
from topkast_jax.structure import Structure, fan_in


def srigl(
    sparsity: float | Schedule,
    *,
    gamma_sal: float | Schedule = 0.3,
    drop_fraction: float | Schedule = 0.3,
    refresh: Due = every(100),
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure | None = None,
    where: Where = kernels,
    init: Init = "random",
) -> Method:
    """Structured RigL: every neuron keeps as many inputs, and some neurons go.

    A neuron is a column of outputs; N of them with k inputs each make the budget N k. At
    a refresh, per layer, with n = round(drop_fraction |A|):

        1. salient are the |A| - n largest |theta| of A, and the n largest |g| off A;
        2. a neuron with fewer than gamma_sal * k salient weights is ablated, but as many
           stay as hold the budget when they are dense;
        3. the new fan-in is k' = N k // neurons that stay, at most all inputs;
        4. the |A| - n largest |theta| among neurons that stay are kept, at most k' of
           each; each grows its largest |g| up to k'.

    So |A| is the budget but for what k' times neurons leaves over. An ablated neuron has
    a new chance at the next refresh, as in the authors' code: its weights are zero, but
    its gradients may be among the largest. What was just dropped may grow again. Where a
    neuron has more than k' to keep, the code keeps any of them, here the largest stay.
    `gamma_sal=0` ablates none: the drop is over the layer as in RigL, the growth within
    each neuron.

    Args:
      sparsity: fraction of zeros, in [0, 1), or a schedule of it by step, which refreshes
        follow; then for layout="masked".
      gamma_sal: share of the fan-in that must be salient, at least 0, or a schedule of
        it. The paper uses 0.3 for convolutional networks and 0.95 for transformers.
      drop_fraction: share of A to replace, in [0, 1], or a schedule of it by step.
      refresh: steps at which masks change.
      distribution: how sparsity is spread over parameters.
      structure: `tk.fan_in()`, which is the default; without ablation `tk.fan_in(a, b)`
        or `tk.groups_of(g, tk.fan_in(...))` too.
      where: which parameters are sparse.
      init: the first A, "random", "magnitude" or a tree of masks like the parameters.
    Returns:
      A `Method`; for the masked layout, for every one with `gamma_sal=0`.
    Raises:
      ValueError: a number out of range, or a structure without a constant fan-in.
    Example:
      >>> import optax, topkast_jax as tk
      >>> method = tk.srigl(0.5, gamma_sal=0.6, drop_fraction=0.5, refresh=tk.every(1))
      >>> tx = tk.sparse(optax.sgd(0.0), method)
      >>> params = {"kernel": jnp.outer(jnp.ones(4), jnp.array([3.0, 2.0, 0.1]))}
      >>> state = tx.init(params)
      >>> grads = {"kernel": jnp.outer(jnp.arange(4.0), jnp.array([1.0, 1.0, 0.1]))}
      >>> _, state = tx.update(grads, state, params)
      >>> tk.masks(state).forward["kernel"].sum(0).tolist()  # six weights, two neurons
      [3, 3, 0]

    Reference:
      Lasby et al., "Dynamic Sparse Training with Structured Sparsity", 2023,
      arXiv 2305.02299.
    """
    structure = fan_in() if structure is None else structure
    require_at_least(0, gamma_sal=gamma_sal)
    if structure.scope != "column":
        raise ValueError(
            f"tk.srigl: {structure.name} keeps no constant fan-in; use tk.fan_in()"
        )
    if gamma_sal and structure != fan_in():
        raise ValueError(
            f"tk.srigl: neurons are ablated one by one, not in {structure.name}; use "
            "tk.fan_in(), or gamma_sal=0"
        )
    share = share_of(drop_fraction)
    base = beginning(
        sparsity, distribution=distribution, structure=structure, where=where, init=init
    )

    def refresh_masks(
        leaf: Leaf, memory: Memory, step: Any
    ) -> tuple[LeafMasks, Memory]:
        k, columns = leaf.counts.forward, leaf.selections
        left = k * columns - _rounded(share(step), k * columns)
        kept = leaf.quota(magnitude(leaf), left, among=leaf.forward)
        if not isinstance(k, int):  # it may have become less than is there
            kept = jnp.minimum(kept, k)
        return _regrown(leaf, kept, k), memory

    def ablate(leaf: Leaf, memory: Memory, step: Any) -> tuple[LeafMasks, Memory]:
        k, columns = leaf.counts.forward, leaf.selections
        outputs = leaf.axes.outputs

        def whole(numbers: Array) -> Array:
            return jnp.sum(numbers, outputs, keepdims=True, dtype=jnp.int32)

        nnz = whole(leaf.count(leaf.forward))
        n = _rounded(share(step), nnz)
        n = jnp.minimum(n, leaf.size * columns - nnz)
        salient = leaf.quota(magnitude(leaf), nnz - n, among=leaf.forward)
        salient += leaf.quota(gradient(leaf), n, among=~leaf.forward)
        stays = salient >= _threshold(at_step(gamma_sal, step), k)
        least = -(-k * columns // leaf.size)
        few = whole(stays) < least
        stays = (few & top_k(salient, least, outputs)) | (~few & stays)
        inputs = jnp.minimum(k * columns // whole(stays), leaf.size)
        living = leaf.forward & stays
        among_living = jnp.minimum(nnz - n, whole(leaf.count(living)))
        kept = leaf.quota(magnitude(leaf), among_living, among=living)
        kept = jnp.minimum(kept, inputs)
        return _regrown(leaf, kept, inputs * stays.astype(jnp.int32)), memory

    return base._replace(
        name="srigl",
        refresh=ablate if gamma_sal else refresh_masks,
        due=refresh,
        probe=True,
        fixed=base.fixed and not gamma_sal,
    )


def _regrown(leaf: Leaf, kept: Any, fan_in: Any) -> LeafMasks:
    """Of each neuron the largest |theta|, as many as asked for, and |g| up to a fan-in."""
    stay = leaf.top(magnitude(leaf), kept, among=leaf.forward)
    chosen = leaf.union(stay, leaf.grow(gradient, fan_in - kept, outside=stay))
    return leaf.masks(chosen, chosen)


def _threshold(share: Any, k: Any) -> Any:
    """`share * k` salient weights, rounded up."""
    if isinstance(share, Array) or isinstance(k, Array):
        return jnp.ceil(share * k).astype(jnp.int32)
    return math.ceil(share * k)


def _rounded(share: Any, k: Any) -> Any:
    """`share * k` to the nearest integer."""
    if isinstance(share, Array) or isinstance(k, Array):
        return jnp.round(share * jnp.asarray(k, jnp.float32)).astype(jnp.int32)
    return round(share * k)
