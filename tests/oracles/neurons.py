"""SRigL: constant fan-in with ablation of neurons (Lasby et al., arXiv 2305.02299)."""

from collections.abc import Mapping

import numpy as np
from oracle import Array, Due, Inner, Mask, Rate, at, top_k

from oracles.loop import Count, Gradient, Masks, Run, Snapshot, train


def salient(
    theta: Array, forward: Mask, grad: Array, n: int, everywhere: bool = False
) -> Mask:
    """The |A| - n largest |theta| of A, with the n largest |grad| off A.

    The authors' code takes the gradients over all entries, active ones too:
    `everywhere`.
    """
    kept = top_k(abs(theta), int(forward.sum()) - n, among=forward)
    return kept | top_k(abs(grad), n, among=None if everywhere else ~forward)


def ablated(
    counts: np.ndarray, threshold: float, budget: int, n_in: int, dead: Mask
) -> Mask:
    """Neurons with fewer than `threshold` salient weights, and those `dead` before.

    At least ceil(budget / n_in) neurons stay, else the budget would not fit: those with
    the most salient weights, ties to the first (dead ones last of all).
    """
    least = -(-budget // n_in)
    stay = (counts >= threshold) & ~dead
    if stay.sum() < least:
        stay = top_k(np.where(dead, -1, counts), least)
    return ~stay


def srigl(
    theta: Array,
    forward: Mask,
    grad: Array,
    drop_fraction: float,
    *,
    gamma: float,
    budget: int | None = None,
    dead: Mask | None = None,
    everywhere: bool = False,
    floor: bool = False,
    count: Count = round,
) -> Mask:
    """New A of theta [..., n_out]; a neuron is an output, its fan-in all other axes.

    1. n = count(drop_fraction |A|) weights will go (the code rounds down: `int`).
    2. A neuron with fewer than gamma * k salient weights is ablated, k the constant
       fan-in that the budget allows over all neurons. `floor`: max(1, int(gamma k)), as
       in the code.
    3. The new fan-in is k' = budget // active neurons, at most n_in.
    4. The |A| - n largest |theta| stay, over the layer, among active neurons; a neuron
       that has more than k' of them keeps its k' largest (the code: arbitrary ones).
    5. Each active neuron grows its largest |grad| up to k'; what was just dropped may
       grow again.

    `budget` defaults to |A|, but then falls by what k' * neurons leaves over, so a run
    hands in the target. `dead`: neurons ablated before that stay so; None gives each a
    new chance, as in the code.
    """
    n_out = theta.shape[-1]
    flat, grads = theta.reshape(-1, n_out), grad.reshape(-1, n_out)
    active = forward.reshape(-1, n_out)
    n_in = len(flat)
    nnz = int(active.sum())
    budget = nnz if budget is None else budget
    dead = np.zeros(n_out, bool) if dead is None else dead
    n = count(drop_fraction * nnz)
    n = min(n, active.size - nnz)
    threshold = gamma * (budget // n_out)
    if floor:
        threshold = max(1, int(threshold))
    counts = salient(flat, active, grads, n, everywhere).sum(0)
    gone = ablated(counts, threshold, budget, n_in, dead)
    fan_in = min(budget // int((~gone).sum()), n_in)
    living = active & ~gone
    kept = top_k(abs(flat), min(nnz - n, int(living.sum())), among=living)
    new = np.zeros_like(active)
    for j in np.flatnonzero(~gone):
        column = kept[:, j]
        if column.sum() > fan_in:
            column = top_k(abs(flat[:, j]), fan_in, among=column)
        more = fan_in - int(column.sum())
        new[:, j] = column | top_k(abs(grads[:, j]), more, among=~column)
    return new.reshape(theta.shape)


def fan_in(mask: Mask) -> np.ndarray:
    """Active inputs of every neuron."""
    return mask.reshape(-1, mask.shape[-1]).sum(0)


def srigl_run(
    params: Mapping[str, Array],
    forward: Masks,
    inner: Inner,
    grad: Gradient,
    *,
    due: Due,
    gamma: float = 0.3,
    drop_fraction: Rate = 0.3,
    permanent: bool = False,
    everywhere: bool = False,
    floor: bool = False,
    count: Count = round,
    **options,
) -> list[Snapshot]:
    """The budget is the initial |A|; `permanent`: an ablated neuron never returns."""
    budget = {path: int(mask.sum()) for path, mask in forward.items()}

    def choose(run: Run) -> Masks:
        return {
            path: srigl(
                run.theta[path],
                mask,
                run.grads[path],
                at(drop_fraction, run.step),
                gamma=gamma,
                budget=budget[path],
                dead=fan_in(mask) == 0 if permanent else None,
                everywhere=everywhere,
                floor=floor,
                count=count,
            )
            for path, mask in run.forward.items()
        }

    return train(params, forward, inner, grad, choose, due=due, **options)
