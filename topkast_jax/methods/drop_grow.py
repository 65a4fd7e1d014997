"""Drop the smallest weights, grow others: SET, RigL and RigL-ITOP."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from topkast_jax import distribution as distribution_lib
from topkast_jax._trees import Where, kernels
from topkast_jax._types import (
    Due,
    Entries,
    Leaf,
    LeafMasks,
    Memory,
    Method,
    Schedule,
)
from topkast_jax.distribution import Distribution
from topkast_jax.methods.initial import Init
from topkast_jax.methods.static import beginning
from topkast_jax.schedule import every
from topkast_jax.score import gradient, magnitude
from topkast_jax.structure import Structure, unstructured

Grow = Callable[[Leaf, Any, Entries], Entries]


def set_(
    sparsity: float | Schedule,
    *,
    drop_fraction: float | Schedule = 0.3,
    refresh: Due = every(100),
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure = unstructured,
    where: Where = kernels,
    init: Init = "random",
) -> Method:
    """SET, sparse evolutionary training: drop by magnitude, grow at random.

    At a refresh with n = round(drop_fraction * k): keep the k - n largest |theta| of A,
    grow n random entries outside those kept. A = B, weights off A are zero. As in the
    RigL authors' SET, what was just dropped may be drawn again and then keeps its
    value; other grown weights start at zero. (The paper drops the positive and negative
    weights closest to zero in equal shares; magnitude is what later work compares.)

    Args:
      sparsity: fraction of zeros, in [0, 1), or a schedule of it by step, which refreshes
        follow; then for layout="masked".
      drop_fraction: share of A to replace, in [0, 1], or a schedule of it by step.
      refresh: steps at which masks change.
      distribution: how sparsity is spread over parameters.
      structure: which patterns the masks have, as `tk.blocks(8, 128)`.
      where: which parameters are sparse.
      init: the first A, "random", "magnitude" (the largest weights, for a network that
        was trained before) or a tree of masks like the parameters.
    Returns:
      A `Method`.
    Raises:
      ValueError: a number out of range.
    Example:
      >>> import optax, topkast_jax as tk
      >>> tx = tk.sparse(optax.sgd(0.1), tk.set_(0.75, refresh=tk.every(1)))
      >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4)}
      >>> state = tx.init(params)
      >>> _, after = tx.update(params, state, params)
      >>> before, now = (tk.masks(s).forward["kernel"] for s in (state, after))
      >>> int(now.sum()), int((now & ~before).sum())  # one of four was replaced
      (4, 1)

    Reference:
      Mocanu et al., 2018, arXiv 1707.04780.
    """

    def grow(leaf: Leaf, n: Any, kept: Entries) -> Entries:
        return leaf.draw(n, outside=kept)

    base = beginning(
        sparsity, distribution=distribution, structure=structure, where=where, init=init
    )
    method = _drop_grow(base, drop_fraction, refresh, grow)
    return method._replace(name="set")


def rigl(
    sparsity: float | Schedule,
    *,
    drop_fraction: float | Schedule = 0.3,
    refresh: Due = every(100),
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure = unstructured,
    where: Where = kernels,
    init: Init = "random",
) -> Method:
    """RigL: drop by magnitude, grow where the dense gradient is largest.

    As `set_`, but grows the n entries of largest |gradient| outside those kept, seen in
    the step before the refresh (the probe set P is everything then, and nothing
    otherwise). Equal gradients are taken in random order. The paper anneals
    `drop_fraction` with `tk.cosine(0.3, stop)` and refreshes `tk.every(100, stop=stop)`
    up to three quarters of training.

    Args:
      sparsity: fraction of zeros, in [0, 1), or a schedule of it by step, which refreshes
        follow; then for layout="masked".
      drop_fraction: share of A to replace, in [0, 1], or a schedule of it by step.
      refresh: steps at which masks change.
      distribution: how sparsity is spread over parameters.
      structure: which patterns the masks have, as `tk.blocks(8, 128)`.
      where: which parameters are sparse.
      init: the first A, "random", "magnitude" (the largest weights, for a network that
        was trained before) or a tree of masks like the parameters.
    Returns:
      A `Method`.
    Raises:
      ValueError: a number out of range.
    Example:
      >>> import optax, topkast_jax as tk
      >>> tx = tk.sparse(optax.sgd(0.1), tk.rigl(0.75, refresh=tk.every(1)))
      >>> params = {"kernel": jnp.zeros((4, 4))}
      >>> state = tx.init(params)
      >>> bool(tk.masks(state).probe["kernel"])  # step 1 is due: see every gradient
      True

    Reference:
      Evci et al., "Rigging the Lottery", 2020, arXiv 1911.11134.
    """

    base = beginning(
        sparsity, distribution=distribution, structure=structure, where=where, init=init
    )
    method = _drop_grow(base, drop_fraction, refresh, by_gradient)
    return method._replace(name="rigl", probe=True)


def rigl_itop(
    sparsity: float | Schedule,
    *,
    drop_fraction: float | Schedule = 0.5,
    refresh: Due = every(1000),
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure = unstructured,
    where: Where = kernels,
    init: Init = "random",
) -> Method:
    """RigL-ITOP: RigL, refreshed so seldom that grown weights can grow large.

    Masks are those of `rigl` under the same schedule. What "in-time
    over-parameterization" adds is a measure, and the advice to raise it: R_s, the share
    of all entries that were ever in A, from `tk.metrics.exploration_rate`. Many
    refreshes explore, but a weight must be given time between two of them; so the paper
    drops more (0.5) and waits longer than RigL, trains with small batches, and refreshes
    to the end. The memory is a bool array of the parameter's shape, in every layout.

    Args:
      sparsity: fraction of zeros, in [0, 1), or a schedule of it by step, which refreshes
        follow; then for layout="masked".
      drop_fraction: share of A to replace, in [0, 1], or a schedule of it by step.
      refresh: steps at which masks change.
      distribution: how sparsity is spread over parameters; the paper's is `tk.erk`.
      structure: which patterns the masks have, as `tk.blocks(8, 128)`.
      where: which parameters are sparse.
      init: the first A, "random", "magnitude" or a tree of masks like the parameters.
    Returns:
      A `Method`.
    Raises:
      ValueError: a number out of range.
    Example:
      >>> import optax, topkast_jax as tk
      >>> tx = tk.sparse(optax.sgd(0.1), tk.rigl_itop(0.75, refresh=tk.every(1)))
      >>> params = {"kernel": jnp.zeros((4, 4))}
      >>> state = tx.init(params)
      >>> float(tk.metrics.exploration_rate(state))
      0.25

    Reference:
      Liu et al., "Do We Actually Need Dense Over-Parameterization?", 2021,
      arXiv 2102.02887.
    """
    base = rigl(
        sparsity,
        drop_fraction=drop_fraction,
        refresh=refresh,
        distribution=distribution,
        structure=structure,
        where=where,
        init=init,
    )

    def first(leaf: Leaf) -> tuple[LeafMasks, Memory]:
        masks, _ = base.init(leaf)
        return masks, leaf.marks(masks.forward)

    def refresh_masks(leaf: Leaf, ever: Memory, step: Any) -> tuple[LeafMasks, Memory]:
        masks, _ = base.refresh(leaf, (), step)
        return masks, ever | leaf.marks(masks.forward)

    return base._replace(name="rigl_itop", init=first, refresh=refresh_masks)


def share_of(fraction: float | Schedule, name: str = "drop_fraction") -> Schedule:
    """A share of A as a function of the step, in [0, 1].

    Raises:
      ValueError: a number out of range.
    """
    if not callable(fraction) and not 0 <= fraction <= 1:
        raise ValueError(f"{name}={fraction} must lie in [0, 1]")

    def share(step: Any) -> Any:
        if callable(fraction):
            return jnp.clip(jnp.asarray(fraction(step)), 0, 1)
        return fraction

    return share


def _drop_grow(
    base: Method, drop_fraction: float | Schedule, refresh: Due, grow: Grow
) -> Method:
    """A method with A = B of the size asked for that starts from the masks of `base`."""
    share = share_of(drop_fraction)

    def refresh_masks(
        leaf: Leaf, memory: Memory, step: Any
    ) -> tuple[LeafMasks, Memory]:
        k = leaf.counts.forward
        return exchanged(leaf, leaf.forward, k, share(step), grow), memory

    return base._replace(refresh=refresh_masks, due=refresh)


def exchanged(
    leaf: Leaf, present: Entries, k: Any, share: Any, grow: Grow
) -> LeafMasks:
    """A = B of k units: the largest |theta| among those present, and others grown.

    Args:
      leaf: the parameter.
      present: out of which units are kept.
      k: units of the new A.
      share: of k that is grown, and what else is missing where k is traced.
      grow: `(leaf, n, kept) -> entries`, n units outside those kept.
    """
    n = leaf.portion(share, k)
    kept = leaf.top(magnitude(leaf), k - n, among=present)
    missing = n if isinstance(k, int) else k - leaf.count(kept)
    chosen = leaf.union(kept, grow(leaf, missing, kept))
    return leaf.masks(chosen, chosen)


def by_gradient(leaf: Leaf, n: Any, kept: Entries) -> Entries:
    """Growth of RigL: the largest |gradient|."""
    return leaf.grow(gradient, n, outside=kept)
