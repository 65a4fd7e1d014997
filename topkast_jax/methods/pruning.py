"""Gradual pruning: A = B shrinks from everything, or much, to k entries."""

from topkast_jax import distribution as distribution_lib
from topkast_jax import levels
from topkast_jax import score as scores
from topkast_jax._trees import Where, kernels
from topkast_jax._types import Due, Leaf, LeafMasks, Memory, Method, Score
from topkast_jax.distribution import Distribution
from topkast_jax.methods.initial import Init, starting_set
from topkast_jax.methods.shrinking import (
    Ramp,
    Scope,
    between,
    counts_between,
    require_scope,
    shrinking,
)
from topkast_jax.methods.static import static
from topkast_jax.schedule import every
from topkast_jax.structure import Structure, unstructured


def magnitude(
    sparsity: float,
    *,
    start: int,
    stop: int,
    initial_sparsity: float = 0.0,
    refresh: Due = every(100),
    ramp: Ramp = "cubic",
    scope: Scope = "layer",
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure = unstructured,
    where: Where = kernels,
    init: Init = "magnitude",
) -> Method:
    """Gradual magnitude pruning, from a dense network to a sparse one.

    A = B = everything before `start`; then at each refresh t the k(t) largest |theta|
    of A stay, per parameter (per slice of a stacked one), with k_i and k_f the counts
    of the two sparsities and

        k(t) = round(k_f + (k_i - k_f) (1 - (t - start) / (stop - start))^3)

    The paper's s_t = s_f + (s_i - s_f) (1 - ...)^3, as an exact integer at any size.
    `stop` is itself due and the last refresh, so that training ends with k_f. Weights
    off A are zero, get no gradient, and do not return. (The authors' code keeps their
    last value, and lets them return where it exceeds what has decayed since.)

    Corner cases: masks do not change at refreshes before `start`, and at `start` itself
    only to k_i. Under "global" the parameters compete for round((1 - s) * total size)
    entries, and one of them may lose all of its own: as in the literature that is
    allowed, and seen in `tk.metrics.sparsity`; keep small layers out with `where`. What
    an `initial_sparsity` zeroes at the start is chosen per parameter under both.

    Args:
      sparsity: fraction of zeros at the end, in [0, 1).
      start: first step at which something is pruned.
      stop: last step at which something is pruned.
      initial_sparsity: fraction of zeros before `start`, in [0, sparsity].
      refresh: steps between the two at which masks change.
      ramp: "cubic"; "linear"; or a function of progress in [0, 1] to the share of the
        way, which rises from 0 to 1.
      scope: "layer", or "global", where parameters compete with each other.
      distribution: how sparsity is spread over parameters.
      structure: which patterns the masks have, as `tk.blocks(8, 128)`.
      where: which parameters are sparse.
      init: the first A where `initial_sparsity` is not 0: "magnitude", "random", or a
        tree of masks like the parameters.
    Returns:
      A `Method`, for layout="masked": its sets change in size.
    Raises:
      ValueError: a number out of range or order, or a structure that cannot compete.
    Example:
      >>> import jax.numpy as jnp, optax, topkast_jax as tk
      >>> method = tk.magnitude(0.75, start=0, stop=2, refresh=tk.every(1))
      >>> tx = tk.sparse(optax.sgd(0.1), method)
      >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4)}
      >>> state, left = tx.init(params), []
      >>> for _ in range(3):
      ...     left.append(int(tk.masks(state).forward["kernel"].sum()))
      ...     _, state = tx.update(params, state, params)
      >>> left  # 4 + 12 * (1/2)^3, rounded to even, after one of two steps
      [16, 6, 4]

    Reference:
      Zhu and Gupta, "To prune, or not to prune", 2017, arXiv 1710.01878.
    """
    return _gradual(
        "magnitude", scores.magnitude, sparsity, start, stop, initial_sparsity, refresh,
        ramp, scope, distribution, structure, where, init,
    )  # fmt: skip


def saliency(
    sparsity: float,
    *,
    start: int,
    stop: int,
    initial_sparsity: float = 0.0,
    refresh: Due = every(100),
    ramp: Ramp = "cubic",
    scope: Scope = "layer",
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure = unstructured,
    where: Where = kernels,
    init: Init = "magnitude",
) -> Method:
    """Gradual pruning by |theta * dL/dtheta|, the change of the loss to first order.

    As `tk.magnitude`, but what stays is where setting the weight to zero would change
    the loss most, by the gradient of the step before the refresh: one batch, as in
    jaxpruner. Where that gradient is zero all scores tie, and the first positions stay.

    Args:
      sparsity: fraction of zeros at the end, in [0, 1).
      start: first step at which something is pruned.
      stop: last step at which something is pruned.
      initial_sparsity: fraction of zeros before `start`, in [0, sparsity].
      refresh: steps between the two at which masks change.
      ramp: "cubic", "linear" or a function; see `tk.magnitude`.
      scope: "layer", or "global", where parameters compete with each other.
      distribution: how sparsity is spread over parameters.
      structure: which patterns the masks have, as `tk.blocks(8, 128)`.
      where: which parameters are sparse.
      init: the first A where `initial_sparsity` is not 0; there is no gradient yet.
    Returns:
      A `Method`, for layout="masked": its sets change in size.
    Raises:
      ValueError: as `tk.magnitude`.
    Example:
      >>> import jax.numpy as jnp, optax, topkast_jax as tk
      >>> method = tk.saliency(0.5, start=0, stop=1)
      >>> tx = tk.sparse(optax.sgd(0.0), method)
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
      >>> grads = {"kernel": jnp.array([[9.0, 2.0], [2.0, 1.0]])}
      >>> _, state = tx.update(grads, tx.init(params), params)
      >>> tk.masks(state).forward["kernel"].astype(int).tolist()
      [[1, 0], [1, 0]]

    Reference:
      Molchanov et al., "Pruning convolutional neural networks for resource efficient
      inference", 2017, arXiv 1611.06440.
    """
    return _gradual(
        "saliency", scores.saliency, sparsity, start, stop, initial_sparsity, refresh,
        ramp, scope, distribution, structure, where, init,
    )  # fmt: skip


def random_pruning(
    sparsity: float,
    *,
    start: int,
    stop: int,
    initial_sparsity: float = 0.0,
    refresh: Due = every(100),
    ramp: Ramp = "cubic",
    scope: Scope = "layer",
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure = unstructured,
    where: Where = kernels,
    init: Init = "random",
) -> Method:
    """Gradual pruning at random: what every score must beat.

    As `tk.magnitude`, but which k(t) of A stay is drawn from the seed.

    Args:
      sparsity: fraction of zeros at the end, in [0, 1).
      start: first step at which something is pruned.
      stop: last step at which something is pruned.
      initial_sparsity: fraction of zeros before `start`, in [0, sparsity].
      refresh: steps between the two at which masks change.
      ramp: "cubic", "linear" or a function; see `tk.magnitude`.
      scope: "layer", or "global": drawn out of all parameters together.
      distribution: how sparsity is spread over parameters.
      structure: which patterns the masks have, as `tk.blocks(8, 128)`.
      where: which parameters are sparse.
      init: the first A where `initial_sparsity` is not 0.
    Returns:
      A `Method`, for layout="masked": its sets change in size.
    Raises:
      ValueError: as `tk.magnitude`.
    Example:
      >>> import jax.numpy as jnp, optax, topkast_jax as tk
      >>> tx = tk.sparse(optax.sgd(0.1), tk.random_pruning(0.75, start=0, stop=1))
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> int(tk.masks(state).forward["kernel"].sum())
      4
    """
    return _gradual(
        "random_pruning", None, sparsity, start, stop, initial_sparsity, refresh,
        ramp, scope, distribution, structure, where, init,
    )  # fmt: skip


def _gradual(
    name: str,
    score: Score | None,
    sparsity: float,
    start: int,
    stop: int,
    initial_sparsity: float,
    refresh: Due,
    ramp: Ramp,
    scope: Scope,
    distribution: Distribution,
    structure: Structure,
    where: Where,
    init: Init,
) -> Method:
    budget, due = between(refresh, start, stop, ramp)
    base = falling(
        sparsity, initial_sparsity, scope, distribution, structure, where, init
    )
    pair = (initial_sparsity, sparsity)
    method = shrinking(base, name, budget, due, score, sparsities=pair, scope=scope)
    compete = "; all parameters compete for the sum" if scope == "global" else ""
    note = f"k_B entries of A and B before step {start}, k_A from step {stop} on"
    return method._replace(note=note + compete)


def falling(
    sparsity: float,
    initial_sparsity: float,
    scope: Scope,
    distribution: Distribution,
    structure: Structure,
    where: Where,
    init: Init,
) -> Method:
    """What a method with A = B of a falling size begins with: counts and first masks.

    Raises:
      ValueError: sparsities out of range or order, a structure that cannot compete.
    """
    levels.refuse(
        "pruning",
        "it is reached at one step and kept; the way there, if any, is `ramp`",
        sparsity=sparsity,
        initial_sparsity=initial_sparsity,
    )
    distribution_lib.require_sparsity(sparsity)
    distribution_lib.require_sparsity(initial_sparsity, "initial_sparsity")
    if initial_sparsity > sparsity:
        raise ValueError(
            f"initial_sparsity={initial_sparsity} is above sparsity={sparsity}: sets "
            "only shrink; begin with more entries"
        )
    require_scope(scope, structure)
    first = starting_set(init)

    def init_masks(leaf: Leaf) -> tuple[LeafMasks, Memory]:
        chosen = first(leaf, leaf.counts.backward)
        return leaf.masks(chosen, chosen), ()

    base = static(sparsity, distribution=distribution, structure=structure, where=where)
    counts = counts_between(distribution, initial_sparsity, sparsity, scope)
    return base._replace(counts=counts, init=init_masks, fixed=False)
