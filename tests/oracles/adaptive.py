"""Methods that move entries between layers at random while the total is constant.

DSR, dynamic sparse reparameterization (Mostafa & Wang, arXiv 1902.05967), and Deep
Rewiring (Bellec et al., arXiv 1711.05136).
"""

from collections.abc import Callable, Mapping

import numpy as np
from oracle import Array, Due, Inner, Mask, Rate, at, every

from oracles.loop import (
    Arrays,
    Draw,
    Gradient,
    Masks,
    Run,
    Snapshot,
    apportion,
    nnz,
    only,
    train,
)

DrawAll = Callable[[int, int, Masks], Masks]  # (step, k, allowed): k True in all


# DSR
def next_threshold(h: float, pruned: int, target: int, tolerance: float) -> float:
    """H doubles below (1 - delta) N_p pruned, halves above (1 + delta) N_p."""
    if pruned < (1 - tolerance) * target:
        return 2 * h
    if pruned > (1 + tolerance) * target:
        return h / 2
    return h


def dsr_prune(theta: Mapping[str, Array], forward: Masks, h: float) -> Masks:
    """What stays: |theta| >= H in every layer, one H for all."""
    return {path: mask & (abs(theta[path]) >= h) for path, mask in forward.items()}


def dsr_growth(kept: Masks, total: int, free: Masks | None = None) -> dict[str, int]:
    """Entries to grow per layer: in proportion to the surviving R_l, adding up exactly.

    G_l = R_l / sum R * K, rounded by largest remainders; what exceeds the room of a
    layer goes to the others in proportion; equally if nothing survived.
    """
    free = free or {path: ~mask for path, mask in kept.items()}
    room = {path: int(mask.sum()) for path, mask in free.items()}
    weights = {path: int(mask.sum()) for path, mask in kept.items()}
    return apportion(total - nnz(kept), weights, room)


def dsr(
    theta: Mapping[str, Array],
    forward: Masks,
    h: float,
    *,
    target: int,
    tolerance: float,
    draw: Callable[[str, int, Mask], Mask],
    regrow: bool = True,
) -> tuple[Masks, float]:
    """New A and the H of the next refresh; the sum of |A| is constant.

    Pruning uses the H it is given, the number pruned then moves H. Growth is at random
    among everything off A, just pruned ones included unless `regrow` is False.
    """
    kept = dsr_prune(theta, forward, h)
    free = {path: ~(kept if regrow else forward)[path] for path in forward}
    total = nnz(forward)
    grow = dsr_growth(kept, total, free)
    grown = {path: draw(path, grow[path], free[path]) for path in forward}
    new = {path: kept[path] | grown[path] for path in forward}
    assert nnz(new) == total
    return new, next_threshold(h, total - nnz(kept), target, tolerance)


def dsr_run(
    params: Mapping[str, Array],
    forward: Masks,
    inner: Inner,
    grad: Gradient,
    *,
    due: Due,
    threshold: float,
    target: int,
    draw: Draw,
    tolerance: float = 0.1,
    regrow: bool = True,
    memory: dict | None = None,
    **options,
) -> list[Snapshot]:
    """memory["H"] lists the threshold that each refresh used, and the next one last."""
    memory = {} if memory is None else memory
    memory["H"] = [threshold]

    def choose(run: Run) -> Masks:
        new, h = dsr(
            run.theta,
            run.forward,
            memory["H"][-1],
            target=target,
            tolerance=tolerance,
            draw=lambda path, k, free: draw(run.step, path, k, free),
            regrow=regrow,
        )
        memory["H"].append(h)
        return new

    return train(
        params, forward, inner, grad, choose, due=due, memory=memory, **options
    )


# Deep Rewiring
def deep_r_update(
    update: Array,
    signs: Array,
    eta: float,
    l1: float,
    temperature: float,
    noise: Array,
) -> Array:
    """Of the weights w = s theta: u - eta alpha s + sqrt(2 eta T) s nu.

    In terms of theta this is the paper's -eta dE/dtheta - eta alpha + sqrt(2 eta T) nu,
    with u = -eta dE/dw or what an inner optimizer makes of the gradient. nu is standard
    normal. Summed from left to right in the dtype of `update`; s is 1 or -1, so both
    forms round alike.
    """
    kind = update.dtype.type
    s, nu = signs.astype(kind), noise.astype(kind)
    return update - kind(eta * l1) * s + kind(np.sqrt(2 * eta * temperature)) * (s * nu)


def deep_r_alive(
    weights: Array, forward: Mask, signs: Array, strict: bool = False
) -> Mask:
    """Active ones with theta = s w >= 0 stay; `strict`: > 0, as in the authors' code."""
    size = signs * weights
    return forward & ((size > 0) if strict else (size >= 0))


def deep_r(
    weights: Array,
    forward: Mask,
    signs: Array,
    draw: Callable[[int, Mask], Mask],
    *,
    regrow: bool = True,
    strict: bool = False,
) -> tuple[Array, Mask]:
    """Rewires one matrix after its step: weights, and A with as many entries as before.

    `signs` are fixed for every entry, dormant ones too. Entries whose theta fell below
    zero go dormant, and as many dormant ones, drawn at random, revive at theta = 0 with
    their own sign (the code: 1e-12). What has just gone dormant may be drawn unless
    `regrow` is False; it too would start at zero.
    """
    alive = deep_r_alive(weights, forward, signs, strict)
    revived = draw(int(forward.sum() - alive.sum()), ~(alive if regrow else forward))
    assert alive.sum() + revived.sum() == forward.sum() == (alive | revived).sum()
    return only(alive, weights), alive | revived


def deep_r_run(
    params: Mapping[str, Array],
    forward: Masks,
    inner: Inner,
    grad: Gradient,
    *,
    signs: Mapping[str, Array],
    learning_rate: Rate,
    l1: float,
    temperature: float,
    noise: Callable[[int, str], Array],
    draw: Draw | None = None,
    draw_all: DrawAll | None = None,
    due: Due | None = None,
    regrow: bool = True,
    strict: bool = False,
    **options,
) -> list[Snapshot]:
    """Rewiring at the end of every step, unless `due` says otherwise.

    `noise(step, path)` and the learning rate are those of the step taken, draws those
    of the step that the masks are for, one later. With `draw` each layer keeps its
    count; with `draw_all` the total is kept and any dormant entry of any layer may
    revive, since the paper's K is over the network. An entry that went dormant and is
    revived at once was never outside A for the moments, but starts at zero. Between
    rewirings (`due`) an entry below zero stays in A.
    """
    for path, mask in forward.items():
        assert (signs[path] * params[path] >= 0)[mask].all(), path

    def adjust(run: Run, updates: Arrays) -> Arrays:
        t = run.step - 1
        eta = at(learning_rate, t)
        moved = {
            path: deep_r_update(
                updates[path], signs[path], eta, l1, temperature, noise(t, path)
            )
            for path in run.forward
        }
        return updates | moved

    def choose(run: Run) -> Masks:
        if draw_all is None:
            new = {}
            for path, mask in run.forward.items():
                run.theta[path], new[path] = deep_r(
                    run.theta[path],
                    mask,
                    signs[path],
                    lambda k, free, path=path: draw(run.step, path, k, free),
                    regrow=regrow,
                    strict=strict,
                )
            return new
        alive = {
            path: deep_r_alive(run.theta[path], mask, signs[path], strict)
            for path, mask in run.forward.items()
        }
        free = {p: ~(alive if regrow else run.forward)[p] for p in alive}
        revived = draw_all(run.step, nnz(run.forward) - nnz(alive), free)
        run.theta |= {path: only(alive[path], run.theta[path]) for path in alive}
        new = {path: alive[path] | revived[path] for path in alive}
        assert nnz(new) == nnz(run.forward)
        return new

    return train(
        params,
        forward,
        inner,
        grad,
        choose,
        due=due or every(1),
        adjust=adjust,
        **options,
    )
