"""Drop and grow at a constant count: SNFS and RigL-ITOP.

SNFS (Dettmers & Zettlemoyer, arXiv 1907.04840), RigL (1911.11134) with ITOP's
exploration rate (2102.02887). `mest` has MEST, `neurons` SRigL, `adaptive` DSR and Deep
Rewiring.

A number to drop is count(fraction * |A|): `round`, halves to even, unless `math.ceil`
(codes of SNFS, ITOP, GraNet) is handed in. What was just dropped may grow again in all
of these methods; `regrow=False` bars it.
"""

from collections.abc import Callable, Mapping

import numpy as np
from oracle import Array, Due, Inner, Mask, Rate, at, top_k

from oracles.loop import (
    Count,
    Gradient,
    Masks,
    Run,
    Snapshot,
    apportion,
    nnz,
    train,
)


# Sparse momentum (SNFS)
def smoothed(momentum: Array, grad: Array, beta: float = 0.9) -> Array:
    """M = beta M + (1 - beta) g over ALL entries, every step."""
    return beta * momentum + (1 - beta) * grad


def mean_momentum(momentum: Mapping[str, Array], forward: Masks) -> dict[str, float]:
    """Mean |M| over the active entries of each layer, in float64."""
    return {
        path: float(np.mean(abs(momentum[path][mask]), dtype=np.float64))
        if mask.any()
        else 0.0
        for path, mask in forward.items()
    }


def snfs(
    theta: Mapping[str, Array],
    forward: Masks,
    momentum: Mapping[str, Array],
    drop_fraction: float,
    *,
    redistribute: bool = True,
    regrow: bool = True,
    count: Count = round,
) -> Masks:
    """Every layer drops its smallest |theta|; the sum regrows by share of momentum.

    Shares are the layers' mean |M| over A *before* the drop. A layer's share of the
    total is rounded by largest remainders, and what exceeds its room goes to the others
    in proportion (the code: equally, and never more than .99 of the room). Within a
    layer the largest |M| off A grow. `redistribute=False` gives each layer back its own.
    """
    share = mean_momentum(momentum, forward)
    kept, free, dropped = {}, {}, {}
    for path, mask in forward.items():
        dropped[path] = count(drop_fraction * int(mask.sum()))
        k = int(mask.sum()) - dropped[path]
        kept[path] = top_k(abs(theta[path]), k, among=mask)
        free[path] = ~(kept[path] if regrow else mask)
    room = {path: int(mask.sum()) for path, mask in free.items()}
    grow = apportion(sum(dropped.values()), share, room) if redistribute else dropped
    return {
        path: kept[path] | top_k(abs(momentum[path]), grow[path], among=free[path])
        for path in forward
    }


def snfs_run(
    params: Mapping[str, Array],
    forward: Masks,
    inner: Inner,
    grad: Gradient,
    *,
    due: Due,
    drop_fraction: Rate = 0.5,
    beta: float = 0.9,
    dtype: type = np.float32,
    regrow: bool = True,
    redistribute: bool = True,
    count: Count = round,
    **options,
) -> list[Snapshot]:
    """The momentum is a memory of its own, from zero, untouched by refreshes."""
    momentum = {p: np.zeros(np.shape(params[p]), dtype) for p in forward}

    def observe(run: Run) -> None:
        for path in momentum:
            momentum[path] = smoothed(momentum[path], run.grads[path], beta)

    def choose(run: Run) -> Masks:
        return snfs(
            run.theta,
            run.forward,
            momentum,
            at(drop_fraction, run.step),
            redistribute=redistribute,
            regrow=regrow,
            count=count,
        )

    return train(
        params,
        forward,
        inner,
        grad,
        choose,
        due=due,
        observe=observe,
        memory={"momentum": momentum},
        dtype=dtype,
        **options,
    )


# RigL and its exploration
def rigl(
    theta: Array,
    forward: Mask,
    grad: Array,
    drop_fraction: float,
    *,
    regrow: bool = True,
    count: Count = round,
    ranks: Array | None = None,
) -> Mask:
    """Keep the largest |theta| of A, grow as many as were dropped by |grad|.

    Ties among gradients by `ranks`, the linear index unless given.
    """
    k = int(forward.sum())
    n = count(drop_fraction * k)
    if not regrow:
        n = min(n, forward.size - k)
    kept = top_k(abs(theta), k - n, among=forward)
    free = ~(kept if regrow else forward)
    return kept | top_k(abs(grad), n, among=free, ranks=ranks)


def explored(history: list[Snapshot]) -> list[tuple[int, int]]:
    """(ever active, size) over the sparse leaves for each snapshot; R_s is the ratio."""
    ever = {path: np.zeros_like(mask) for path, mask in history[0].forward.items()}
    size = sum(mask.size for mask in ever.values())
    counts = []
    for snapshot in history:
        ever = {path: ever[path] | snapshot.forward[path] for path in ever}
        counts.append((nnz(ever), size))
    return counts


def exploration_rate(history: list[Snapshot]) -> float:
    """R_s: share of the weights that have ever been active."""
    active, size = explored(history)[-1]
    return active / size


def rigl_itop_run(
    params: Mapping[str, Array],
    forward: Masks,
    inner: Inner,
    grad: Gradient,
    *,
    due: Due,
    drop_fraction: Rate = 0.5,
    regrow: bool = True,
    count: Count = round,
    order: Callable[[int, str], Array] | None = None,
    **options,
) -> list[Snapshot]:
    """RigL's own refresh: ITOP changes how often and how much, and measures R_s."""

    def choose(run: Run) -> Masks:
        return {
            path: rigl(
                run.theta[path],
                mask,
                run.grads[path],
                at(drop_fraction, run.step),
                regrow=regrow,
                count=count,
                ranks=order(run.step, path) if order else None,
            )
            for path, mask in run.forward.items()
        }

    return train(params, forward, inner, grad, choose, due=due, **options)
