"""Magnitude family: A is the top k(t) of some score.

Gradual magnitude pruning (Zhu & Gupta, arXiv 1710.01878), SNIP (1810.02340), GraNet
(2106.10404). `dense` has those that train all of theta.

A count is round((1 - sparsity) * size), halves to even, per leaf or over all leaves.
"""

from collections.abc import Callable, Mapping

import numpy as np
from oracle import Array, Due, Inner, Rate, at, every, top_k

from oracles.loop import (
    Arrays,
    Count,
    Gradient,
    Masks,
    Run,
    Snapshot,
    global_top_k,
    nnz,
    train,
)


# Schedules
def cubic(step: int, start: int, end: int, final: float, initial: float = 0.0) -> float:
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_end - t_0))^3, constant outside."""
    progress = min(max((step - start) / (end - start), 0.0), 1.0)
    return final + (initial - final) * (1 - progress) ** 3


def kept_count(size: int, sparsity: float) -> int:
    return round((1 - sparsity) * size)


# Scores
def saliency(theta: Array, grad: Array) -> Array:
    """|theta * g|: first-order change of the loss when the weight is set to zero."""
    return abs(theta * grad)


def snip(
    theta: Mapping[str, Array], grads: list[Mapping[str, Array]], average="gradient"
) -> Arrays:
    """|theta * g| at initialisation, g at the dense weights; one batch or several.

    The paper has one batch. Over several, `average="gradient"` means |theta * mean g|,
    "score" the mean of |theta * g|. Its division by the sum of all scores changes no
    ranking and is left out.
    """
    if average == "gradient":
        return {
            path: saliency(value, np.mean([g[path] for g in grads], axis=0))
            for path, value in theta.items()
        }
    return {
        path: np.mean([saliency(value, g[path]) for g in grads], axis=0)
        for path, value in theta.items()
    }


# Selections
def prune(
    scores: Mapping[str, Array],
    sparsity: float,
    among: Masks | None = None,
    scope: str = "layer",
) -> Masks:
    """Top (1 - sparsity) of the scores, per leaf or over all leaves together.

    With `among` = A what was pruned never returns (weights off A are zero here). Zhu &
    Gupta's code keeps the last value of a pruned weight, which may return. A count
    above |A| keeps A.
    """
    if scope == "global":
        k = kept_count(sum(np.size(s) for s in scores.values()), sparsity)
        return global_top_k(scores, k if among is None else min(k, nnz(among)), among)
    masks = {}
    for path, s in scores.items():
        inside = np.ones(np.shape(s), bool) if among is None else among[path]
        k = min(kept_count(np.size(s), sparsity), int(inside.sum()))
        masks[path] = top_k(s, k, among=inside)
    return masks


one_shot = prune  # Once, by |theta|; the same function, named for what it is used for.


def granet(
    theta: Mapping[str, Array],
    forward: Masks,
    grad: Mapping[str, Array],
    sparsity: float,
    drop_fraction: float,
    scope: str = "global",
    count: Count = round,
) -> Masks:
    """Prunes to the cubic density, then drops a further fraction and regrows as many.

    First the top (1 - sparsity) by |theta| among A: global as in the paper and the
    authors' code, or per layer. Then per layer n = count(drop_fraction * |A|) smallest
    are dropped and the n largest |grad| off A grow; whatever was pruned or dropped in
    either part may grow again, as in the code. An entry that does so keeps its value
    here; the code keeps it for the second part, but zeroes what the first part pruned.
    The code rounds n up (`math.ceil`), and by its strict threshold keeps one entry less
    in the first part: not taken.
    """
    size = {path: abs(theta[path]) for path in forward}
    pruned = prune(size, sparsity, forward, scope)
    new = {}
    for path, mask in pruned.items():
        k = int(mask.sum())
        n = min(count(drop_fraction * k), mask.size - k)
        kept = top_k(size[path], k - n, among=mask)
        new[path] = kept | top_k(abs(grad[path]), n, among=~kept)
    return new


# Runs
Sparsity = Callable[[int], float]


def pruning(
    params: Mapping[str, Array],
    inner: Inner,
    grad: Gradient,
    *,
    due: Due,
    sparsity: Sparsity,
    score: Callable[[Run, str], Array] | None = None,
    scope: str = "layer",
    sparse: tuple[str, ...] | None = None,
    **options,
) -> list[Snapshot]:
    """Gradual pruning from dense: magnitude, or any `score(run, path)`.

    Saliency: lambda run, path: saliency(run.theta[path], run.grads[path]). Random
    pruning: injected scores. One-shot: a `due` that fires once and a constant sparsity.
    """
    paths = tuple(params) if sparse is None else sparse
    score = score or (lambda run, path: abs(run.theta[path]))

    def choose(run: Run) -> Masks:
        scores = {path: score(run, path) for path in paths}
        return prune(scores, sparsity(run.step), run.forward, scope)

    dense = {path: np.ones(np.shape(params[path]), bool) for path in paths}
    return train(params, dense, inner, grad, choose, due=due, **options)


def fixed(
    params: Mapping[str, Array], forward: Masks, inner: Inner, grad: Gradient, **options
) -> list[Snapshot]:
    """Masks given before the first step and never changed: SNIP, one-shot at init."""
    never = every(1, stop=0)
    return train(
        params, forward, inner, grad, lambda run: run.forward, due=never, **options
    )


def granet_run(
    params: Mapping[str, Array],
    forward: Masks,
    inner: Inner,
    grad: Gradient,
    *,
    due: Due,
    sparsity: Sparsity,
    drop_fraction: Rate = 0.5,
    scope: str = "global",
    count: Count = round,
    **options,
) -> list[Snapshot]:
    """GraNet from masks of the initial sparsity; regrowth goes on after the cubic."""

    def choose(run: Run) -> Masks:
        return granet(
            run.theta,
            run.forward,
            run.grads,
            sparsity(run.step),
            at(drop_fraction, run.step),
            scope,
            count,
        )

    return train(params, forward, inner, grad, choose, due=due, **options)
