"""Deep Rewiring: a walk over weights of fixed sign (Bellec et al., arXiv 1711.05136)."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from topkast_jax import distribution as distribution_lib
from topkast_jax import levels
from topkast_jax._trees import Where, kernels
from topkast_jax._types import Due, Leaf, LeafMasks, Memory, Method, Schedule, View
from topkast_jax.distribution import Distribution
from topkast_jax.methods.initial import Init
from topkast_jax.methods.static import beginning
from topkast_jax.schedule import at_step, every, require_at_least
from topkast_jax.score import magnitude
from topkast_jax.select import top_k_tree
from topkast_jax.structure import Structure, unstructured

Scope = Literal["network", "leaf"]
_SIGNS, _NOISE = 2**32 - 3, 2**32 - 4
"""Folded into a leaf's key; no slice has these numbers."""


def deep_r(
    sparsity: float,
    *,
    l1: float | Schedule = 1e-4,
    temperature: float | Schedule = 1e-6,
    scope: Scope = "network",
    strict: bool = False,
    refresh: Due = every(1),
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure = unstructured,
    where: Where = kernels,
    init: Init = "random",
) -> Method:
    """Deep Rewiring: weights die when they cross zero, and as many revive at random.

    Each weight is w = s theta with a sign s of its own and theta >= 0 while it is active.
    A step adds to what the inner optimizer made of the gradient, in terms of theta,

        - eta alpha + sqrt(2 eta T) nu,    nu standard normal, on active weights;

    then every active one with theta < 0 goes dormant, and as many dormant ones, drawn
    uniformly, revive at theta = 0: the number K of active ones is constant. With gradient
    descent that samples from a posterior over networks, T its temperature; other
    optimizers leave that theory. What has just gone dormant may revive at once, from zero.

    Signs belong to entries, dormant ones included, as in the paper: that of the initial
    weight, at random where it is zero. The memory is these, one byte each. The authors'
    code revives at 1e-12 and keeps theta > 0 (`strict`), so that a weight which does not
    leave zero in its first step is drawn anew.

    Args:
      sparsity: fraction of zeros, in [0, 1).
      l1: alpha, weight of the L1 penalty, at least 0, or a schedule of it.
      temperature: T, at least 0, or a schedule of it.
      scope: whether K is that of the "network", so that entries move between parameters
        (the paper), or of each "leaf".
      strict: whether theta = 0 counts as dormant.
      refresh: steps at which weights may die and revive; in between, one that crossed
        zero goes on.
      distribution: how sparsity is spread over parameters at the start.
      structure: which patterns the masks have. Signs are those of single weights, so
        `tk.unstructured`, or with scope="leaf" `tk.fan_in()` and `tk.n_of_m(...)`.
      where: which parameters are sparse.
      init: the first A, "random", "magnitude" or a tree of masks like the parameters.
    Returns:
      A `Method` for the masked layout; `tk.sparse` asks for the learning rate eta.
    Raises:
      ValueError: a number out of range, an unknown scope, or a structure of blocks.
    Example:
      >>> import optax, topkast_jax as tk
      >>> method = tk.deep_r(0.5, l1=0.5, temperature=0.0)
      >>> tx = tk.sparse(optax.sgd(1.0), method, learning_rate=1.0)
      >>> params = {"kernel": jnp.array([[3.0, -3.0], [0.1, -0.1]])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.zeros((2, 2))}, state, params)
      >>> int(tk.masks(state).forward["kernel"].sum())
      2

    Reference:
      Bellec et al., "Deep Rewiring: Training very sparse deep networks", 2018,
      arXiv 1711.05136.
    """
    require_at_least(0, l1=l1, temperature=temperature)
    if scope not in ("network", "leaf"):
        raise ValueError(f"scope={scope!r} is not 'network' or 'leaf'")
    if structure.block != (1, 1):
        raise ValueError(
            f"tk.deep_r gives a sign to every weight, which {structure.name} would not "
            "share; use tk.unstructured"
        )
    if scope == "network" and structure != unstructured:
        raise ValueError(
            f"tk.deep_r: {structure.name} fixes how many weights each parameter keeps; "
            'use scope="leaf"'
        )
    levels.refuse("tk.deep_r", "it keeps the total constant", sparsity=sparsity)
    base = beginning(
        sparsity, distribution=distribution, structure=structure, where=where, init=init
    )

    def first(leaf: Leaf) -> tuple[LeafMasks, Memory]:
        key = jax.random.fold_in(leaf.key, jnp.uint32(_SIGNS))
        coin = jax.random.bernoulli(key, shape=leaf.shape)
        negative = (leaf.value < 0) | ((leaf.value == 0) & coin)
        return base.init(leaf)[0], 1 - 2 * negative.astype(jnp.int8)

    def walk(update: Array, leaf: View, signs: Memory) -> Array:
        assert leaf.learning_rate is not None  # needs_learning_rate, below
        eta, s = leaf.learning_rate, signs.astype(update.dtype)
        nu = noise(leaf.key, leaf.shape, update.dtype)
        pull = jnp.asarray(eta * at_step(l1, leaf.step), update.dtype)
        heat = at_step(temperature, leaf.step)
        push = jnp.asarray(jnp.sqrt(2 * eta * heat), update.dtype)
        return update - pull * s + push * (s * nu)

    def alive(leaf: Leaf, signs: Memory) -> Any:
        theta = signs.astype(leaf.value.dtype) * leaf.value
        stays = leaf.forward & (theta > 0 if strict else theta >= 0)
        return leaf.top(magnitude(leaf), leaf.size, among=stays)

    def rewired(leaf: Leaf, kept: Any, revived: Any) -> LeafMasks:
        chosen = leaf.union(kept, revived)
        return leaf.masks(chosen, chosen, fresh=revived)

    def refresh_masks(leaf: Leaf, signs: Memory, step: Any) -> tuple[LeafMasks, Memory]:
        kept = alive(leaf, signs)
        dead = leaf.counts.forward - leaf.count(kept)
        return rewired(leaf, kept, leaf.draw(dead, outside=kept)), signs

    def across(
        leaves: list[Leaf], signs: list[Memory], step: Any
    ) -> list[tuple[LeafMasks, Memory]]:
        kept = [alive(leaf, s) for leaf, s in zip(leaves, signs, strict=True)]
        dead = jnp.int32(0)
        for leaf, k in zip(leaves, kept, strict=True):
            dead += jnp.sum(leaf.count(leaf.forward) - leaf.count(k))
        dormant = [~leaf.marks(k) for leaf, k in zip(leaves, kept, strict=True)]
        equal = [jnp.zeros_like(leaf.value, jnp.float32) for leaf in leaves]
        revived = top_k_tree(equal, dead, dormant, leaves[0].key)
        rows = zip(leaves, kept, revived, signs, strict=True)
        return [(rewired(leaf, k, new), s) for leaf, k, new, s in rows]

    network = scope == "network"
    return base._replace(
        name="deep_r",
        init=first,
        refresh=refresh_masks,
        due=refresh,
        adjust=walk,
        needs_learning_rate=True,
        across=across if network else None,
        fixed=not network,
        entrywise=True,
    )


def noise(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """nu of one parameter in one step, from the leaf's key; the same on any mesh."""
    return jax.random.normal(jax.random.fold_in(key, jnp.uint32(_NOISE)), shape, dtype)
