"""Top-KAST: Top-K Always Sparse Training (Jayakumar et al., arXiv 2106.03517)."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array

from topkast_jax import distribution as distribution_lib
from topkast_jax import levels
from topkast_jax._trees import Where, kernels
from topkast_jax._types import Due, Leaf, LeafMasks, Memory, Method, Schedule, View
from topkast_jax.distribution import Copies, Distribution, Shapes
from topkast_jax.methods.initial import Init, starting_set
from topkast_jax.methods.static import following
from topkast_jax.schedule import at_step, every, require_at_least
from topkast_jax.score import magnitude
from topkast_jax.structure import Structure, unstructured

Norm = Literal["l2", "l1"]
PenaltyMode = Literal["gradient", "decoupled"]
Explore = Literal["top", "random"]


def top_kast(
    forward_sparsity: float | Schedule,
    backward_sparsity: float | Schedule,
    *,
    refresh: Due = every(100),
    penalty: float | Schedule = 1e-4,
    penalty_norm: Norm = "l2",
    penalty_mode: PenaltyMode = "gradient",
    stop: int | None = None,
    explore: Explore = "top",
    distribution: Distribution = distribution_lib.uniform,
    structure: Structure = unstructured,
    where: Where = kernels,
    init: Init = "magnitude",
) -> Method:
    """Top-KAST: forward with the k_A largest weights, train the k_B largest.

    At a refresh, per parameter (per slice of a stacked one):

        A = the k_A largest |theta|        used forward and for activation gradients
        B = the k_B largest |theta|        updated by the gradient at alpha; A within B

    The rest, the reservoir, keeps its value: not used, not updated, not decayed. It
    comes back because the exploration penalty shrinks A and B,

        R(theta_i) = |theta_i|_p on A,  |theta_i|_p / D on B \\ A,  0 elsewhere,

    with D = k_A / size, the forward density (of units, where a structure is given). The
    paper prints the L1 norm and calls it L2; L2 is `lambda / 2 * theta^2` here, so its
    gradient is lambda * theta.

    Corner cases: equal sparsities give A = B; `backward_sparsity=0` gives B =
    everything. `stop=0` fixes the initial selection.

    Args:
      forward_sparsity: fraction of zeros in the forward pass, in [0, 1).
      backward_sparsity: fraction of weights not updated, in [0, forward_sparsity]. Either
        may be a schedule by step, which refreshes follow; then for layout="masked".
      refresh: steps at which A and B are chosen anew.
      penalty: lambda, at least 0, or a schedule of it.
      penalty_norm: "l2" or "l1".
      penalty_mode: "gradient" adds the penalty's gradient before the inner optimizer;
        "decoupled" subtracts learning rate times it after, as AdamW does with weight
        decay. Adam divides out the factor 1/D of the first form. The second needs
        `tk.sparse(..., learning_rate=...)`.
      stop: at this step A is chosen for the last time, and B := A from then on (the
        paper's refinement phase). None never stops.
      explore: "top", or "random" for the paper's ablation: B is A plus random entries,
        drawn anew at each refresh.
      distribution: how sparsity is spread over parameters.
      structure: which patterns the masks have, as `tk.blocks(8, 128)`.
      where: which parameters are sparse.
      init: the first A, until the first refresh: "magnitude", as at every refresh;
        "random"; or a tree of masks like the parameters.
    Returns:
      A `Method`.
    Raises:
      ValueError: sparsities out of range or order, an unknown option, a negative value,
        an `init` that makes no sense.
    Example:
      >>> import optax, topkast_jax as tk
      >>> tx = tk.sparse(optax.sgd(0.1), tk.top_kast(0.5, 0.25, penalty=0.0))
      >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]])}
      >>> masks = tk.masks(tx.init(params))
      >>> masks.forward["kernel"].astype(int).tolist()
      [[0, 0], [1, 1]]
      >>> masks.backward["kernel"].astype(int).tolist()
      [[0, 1], [1, 1]]
    """
    forward_first = levels.first_value(forward_sparsity, "forward_sparsity")
    backward_first = levels.first_value(backward_sparsity, "backward_sparsity")
    if backward_first > forward_first:
        raise ValueError(
            f"backward_sparsity={backward_first} is above forward_sparsity="
            f"{forward_first}: B must contain A; lower the backward sparsity"
        )
    for name, value, options in (
        ("penalty_norm", penalty_norm, ("l2", "l1")),
        ("penalty_mode", penalty_mode, ("gradient", "decoupled")),
        ("explore", explore, ("top", "random")),
    ):
        if value not in options:
            raise ValueError(f"{name}={value!r} is not one of {options}")
    require_at_least(0, penalty=penalty)
    if stop is not None and stop < 0:
        raise ValueError(f"stop={stop} must not be negative")

    first_set = starting_set(init)

    def counts(shapes: Shapes, copies: Copies) -> Any:
        first = distribution(shapes, forward_first, copies)
        second = distribution(shapes, backward_first, copies)
        return distribution_lib.forward_and_backward(
            first, first if stop == 0 else second, shapes
        )

    def due(step: Any) -> Any:
        if stop is None:
            return refresh(step)
        return (refresh(step) & (step < stop)) | (step == stop)

    def select(leaf: Leaf, last: Any) -> LeafMasks:
        k_forward, k_backward = leaf.counts
        forward = leaf.top(magnitude(leaf), k_forward)
        if explore == "top":
            backward = leaf.top(magnitude(leaf), k_backward)
        else:
            others = leaf.draw(k_backward - k_forward, outside=forward)
            backward = leaf.union(forward, others)
        return leaf.masks(forward, leaf.where(last, forward, backward))

    def init_masks(leaf: Leaf) -> tuple[LeafMasks, Memory]:
        if isinstance(init, str) and init == "magnitude":
            return select(leaf, stop == 0), ()
        k_forward, k_backward = leaf.counts
        forward, more = first_set(leaf, k_forward), k_backward - k_forward
        if explore == "top":
            rest = leaf.draw(leaf.size - k_forward, outside=forward)
            others = leaf.top(magnitude(leaf), more, among=rest)
        else:
            others = leaf.draw(more, outside=forward)
        return leaf.masks(forward, leaf.union(forward, others)), ()

    def refresh_masks(
        leaf: Leaf, memory: Memory, step: Any
    ) -> tuple[LeafMasks, Memory]:
        return select(leaf, False if stop is None else step == stop), memory

    def penalty_gradient(leaf: View) -> Array:
        density = leaf.counts.forward / leaf.size
        theta = leaf.value if penalty_norm == "l2" else jnp.sign(leaf.value)
        on_forward = at_step(penalty, leaf.step) * theta
        return jnp.where(leaf.forward, on_forward, on_forward / density)

    def decay(update: Array, leaf: View, memory: Memory) -> Array:
        del memory
        assert leaf.learning_rate is not None  # needs_learning_rate, below
        return update - leaf.learning_rate * penalty_gradient(leaf)

    decoupled = penalty_mode == "decoupled"
    return Method(
        name="top_kast",
        counts=counts,
        init=init_masks,
        refresh=refresh_masks,
        due=due,
        where=where,
        structure=structure,
        reservoir=True,
        penalty=penalty_gradient if penalty and not decoupled else None,
        adjust=decay if penalty and decoupled else None,
        needs_learning_rate=bool(penalty and decoupled),
        **following(forward_sparsity, backward_sparsity, distribution),
    )
