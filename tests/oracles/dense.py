"""Methods that train all of theta, always or in phases.

Straight-through (all of theta moves, A is what the forward pass sees), its soft form,
and AC/DC (arXiv 2106.12379).
"""

from collections.abc import Callable, Mapping

import numpy as np
from oracle import Array, Due, Inner, top_k

from oracles.loop import Arrays, Gradient, Masks, Run, Snapshot, only, train
from oracles.pruning import prune


def soft_threshold(theta: Array, k: int) -> tuple[Array, Array]:
    """sign(theta) max(|theta| - tau, 0) and tau, the (k + 1)-th largest magnitude.

    Not the k-th: then the k-th itself would become zero and k - 1 be left. With the
    (k + 1)-th exactly the top k are nonzero (fewer where magnitudes tie with tau). For
    k = size tau is 0. The weights are continuous in theta, unlike those of the hard
    form. Gradients pass straight through to all theta.
    """
    magnitude = np.sort(abs(theta), axis=None)[::-1]
    tau = magnitude[k] if k < theta.size else theta.dtype.type(0)
    return np.sign(theta) * np.maximum(abs(theta) - tau, 0), tau


def straight_through(
    params: Mapping[str, Array],
    inner: Inner,
    grad: Gradient,
    *,
    due: Due,
    k: Mapping[str, int],
    soft: bool = False,
    **options,
) -> list[Snapshot]:
    """B is everything, A the top k of |theta|; the gradient at alpha moves all theta.

    `soft`: alpha is the soft threshold of theta. Between refreshes A and tau are held,
    so alpha on A is sign(theta) max(|theta| - tau, 0); with due = every(1) both are
    those of the moment.
    """
    full = {path: np.ones(np.shape(params[path]), bool) for path in k}
    taus: Arrays = {}

    def choose(run: Run) -> tuple[Masks, Masks]:
        taus.update({p: soft_threshold(run.theta[p], n)[1] for p, n in k.items()})
        return {p: top_k(abs(run.theta[p]), n) for p, n in k.items()}, full

    def view(run: Run) -> Arrays:
        alpha = {p: only(run.forward.get(p), v) for p, v in run.theta.items()}
        if soft:
            for path, tau in taus.items():
                short = np.maximum(abs(alpha[path]) - tau, 0)
                alpha[path] = np.sign(alpha[path]) * short
        return alpha

    dtype = options.get("dtype", np.float32)
    first = {path: np.array(params[path], dtype) for path in k}
    taus.update({p: soft_threshold(first[p], n)[1] for p, n in k.items()})
    forward = {path: top_k(abs(first[path]), n) for path, n in k.items()}
    return train(
        params,
        forward,
        inner,
        grad,
        choose,
        due=due,
        backward=full,
        view=view,
        **options,
    )


def acdc_phase(step: int, warmup: int, compressed: int, dense: int, last: int) -> str:
    """ "dense" or "compressed": which phase `step` belongs to.

    Dense while step < warmup, then compressed and dense alternate with the given
    lengths; from `last` on compressed to the end. So the first phase is dense and the
    last compressed, which is what the paper asks for.
    """
    if step < warmup:
        return "dense"
    if step >= last:
        return "compressed"
    inside = (step - warmup) % (compressed + dense)
    return "compressed" if inside < compressed else "dense"


def acdc(
    params: Mapping[str, Array],
    inner: Inner,
    grad: Gradient,
    *,
    phase: Callable[[int], str],
    sparsity: float,
    scope: str = "global",
    sparse: tuple[str, ...] | None = None,
    reset: str = "moved",
    **options,
) -> list[Snapshot]:
    """Masks change where the phase does: compressed A = top k of |theta|, dense A = all.

    A compressed phase zeroes and freezes what is off A, so a dense phase continues from
    the sparse weights with those entries at zero. Global magnitude as in the paper,
    "layer" for its uniform variant. Moments of entries that enter or leave are zeroed;
    `reset="all"` zeroes all of them when a dense phase begins.
    """
    paths = tuple(params) if sparse is None else sparse
    full = {path: np.ones(np.shape(params[path]), bool) for path in paths}
    assert phase(0) == "dense"

    def turns(step: int) -> bool:
        return phase(step) != phase(step - 1)

    def choose(run: Run) -> Masks:
        if phase(run.step) == "dense":
            return full
        return prune({p: abs(run.theta[p]) for p in paths}, sparsity, scope=scope)

    def whole(run: Run) -> bool:
        return reset == "all" and phase(run.step) == "dense"

    return train(
        params, full, inner, grad, choose, due=turns, reset_all=whole, **options
    )
