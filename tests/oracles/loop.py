"""The steps that all methods share, and small helpers.

One step: gradient at alpha, cut to B; inner optimizer; theta moves on B and is zero off
B; then, where due, new sets from the weights just made.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import isclose
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from oracle import Array, Due, Inner, Mask, Moments, top_k

Arrays = dict[str, Array]
Masks = dict[str, Mask]
Gradient = Callable[[Arrays, int], Mapping[str, Array]]  # (alpha, step)
Draw = Callable[[int, str, int, Mask], Mask]  # (step, path, k, allowed) -> k True
Count = Callable[[float], int]  # round: halves to even; math.ceil in some codes


class Snapshot(NamedTuple):
    """What step `index in the history` starts from; the first is the initial state."""

    theta: Arrays
    forward: Masks
    backward: Masks
    alpha: Arrays
    moments: dict[str, Moments]


@dataclass
class Run:
    """One simulated run; a refresh reads it and returns the new A, or (A, B)."""

    step: int  # The step that the sets are chosen for.
    theta: Arrays
    forward: Masks  # A, sparse leaves only
    backward: Masks  # B
    moments: dict[str, Moments]
    grads: Arrays = field(default_factory=dict)  # Dense, as seen in step - 1.
    memory: dict = field(default_factory=dict)


Refresh = Callable[[Run], Masks | tuple[Masks, Masks]]


def train(
    params: Mapping[str, Array],
    forward: Masks,
    inner: Inner,
    grad: Gradient,
    refresh: Refresh,
    *,
    due: Due,
    steps: int = 50,
    backward: Masks | None = None,
    observe: Callable[[Run], None] | None = None,
    adjust: Callable[[Run, Arrays], Arrays] | None = None,
    view: Callable[[Run], Arrays] | None = None,
    reset: str = "init",
    reset_all: Callable[[Run], bool] | None = None,
    memory: dict | None = None,
    dtype: type = np.float32,
) -> list[Snapshot]:
    """History of `steps` + 1 snapshots.

    A path of `params` without a mask in `forward` is a dense leaf. `observe` sees every
    step's dense gradient before a refresh; `adjust` replaces the inner optimizer's
    update; `view` makes the forward pass's weights where they are not theta on A;
    `reset="keep"` leaves the moments of entries that enter or leave B as they are;
    `reset_all` says after which refresh all moments of the sparse leaves are zeroed.
    """
    theta = {path: np.array(value, dtype) for path, value in params.items()}
    run = Run(
        0,
        theta,
        dict(forward),
        dict(backward or forward),
        {p: {s: np.zeros_like(t) for s in inner.slots} for p, t in theta.items()},
        memory={} if memory is None else memory,
    )
    view = view or visible
    history = [_snapshot(run, view(run))]
    for t in range(steps):
        run.grads = {
            path: np.asarray(g, dtype) for path, g in grad(view(run), t).items()
        }
        updates = {}
        for path, value in run.theta.items():
            g = only(run.backward.get(path), run.grads[path])
            updates[path], run.moments[path] = inner.update(
                g, run.moments[path], value, t
            )
        run.step = t + 1
        if adjust:
            updates = adjust(run, updates)
        for path, update in updates.items():
            b = run.backward.get(path)
            run.theta[path] = only(b, run.theta[path] + only(b, update))
            assert run.theta[path].dtype == np.dtype(dtype), path
        if observe:
            observe(run)
        if due(t + 1):
            before = run.backward
            chosen = refresh(run)
            run.forward, run.backward = (
                chosen if isinstance(chosen, tuple) else (chosen, chosen)
            )
            everything = bool(reset_all and reset_all(run))
            for path, b in run.backward.items():
                same = (before[path] == b) & (not everything)
                run.theta[path] = only(b, run.theta[path])
                if reset == "keep" and not everything:
                    continue
                moments = run.moments[path]
                run.moments[path] = {s: only(same, m) for s, m in moments.items()}
        history.append(_snapshot(run, view(run)))
    return history


def visible(run: Run) -> Arrays:
    """alpha: theta on A, zero elsewhere."""
    return {path: only(run.forward.get(path), v) for path, v in run.theta.items()}


def _snapshot(run: Run, alpha: Arrays) -> Snapshot:
    copies = [{p: v.copy() for p, v in tree.items()} for tree in (run.theta, alpha)]
    moments = {path: dict(m) for path, m in run.moments.items()}
    return Snapshot(copies[0], run.forward, run.backward, copies[1], moments)


def only(mask: Mask | None, x: Array) -> Array:
    """x on the mask, zero elsewhere; x where there is no mask."""
    return x if mask is None else np.where(mask, x, np.zeros_like(x))


# Selections
def global_top_k(
    scores: Mapping[str, Array], k: int, among: Mapping[str, Mask] | None = None
) -> Masks:
    """The k largest over all leaves; of equal ones the leaf named first, then index."""
    flat = np.concatenate([np.ravel(s) for s in scores.values()])
    allowed = None
    if among is not None:
        allowed = np.concatenate([np.ravel(among[path]) for path in scores])
    ends = np.cumsum([np.size(s) for s in scores.values()])[:-1]
    parts = np.split(top_k(flat, k, among=allowed), ends)
    return {
        path: part.reshape(np.shape(scores[path]))
        for path, part in zip(scores, parts, strict=True)
    }


def by_scores(scores: Array) -> Callable[[int, Mask], Mask]:
    """A draw for one matrix: the k allowed entries whose injected score is largest."""
    return lambda k, allowed: top_k(scores, k, among=allowed)


def nnz(masks: Mapping[str, Mask]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


# Counts
def ceil_count(rate: float, n: int) -> int:
    """ceil(rate * n), where a product within one part in a million of an integer is it.

    In floating point .07 * 100 is above 7, and differently so in float32.
    """
    product = rate * n
    nearest = round(product)
    if isclose(product, nearest, rel_tol=1e-6, abs_tol=1e-9):
        return nearest
    return int(np.ceil(product))


def apportion(
    total: int, weights: Mapping[str, float], room: Mapping[str, int]
) -> dict[str, int]:
    """Integers in proportion to `weights` that add up to `total`, none above its room.

    Exact arithmetic; largest remainders, ties to the path named first. What does not
    fit a path goes to those with room, again in proportion, or equally among them if
    all their weights are zero.
    """
    given = dict.fromkeys(weights, 0)
    while (left := total - sum(given.values())) > 0:
        rest = [path for path in weights if given[path] < room[path]]
        if not rest:
            raise ValueError(f"{total} entries, room for {sum(room.values())}")
        share = {path: Fraction(float(weights[path])) for path in rest}
        if not sum(share.values()):
            share = dict.fromkeys(rest, Fraction(1))
        exact = {path: left * share[path] / sum(share.values()) for path in rest}
        extra = {path: int(exact[path]) for path in rest}
        short = left - sum(extra.values())
        for path in sorted(rest, key=lambda p: extra[p] - exact[p])[:short]:
            extra[path] += 1
        for path in rest:
            given[path] = min(given[path] + extra[path], room[path])
    return given


Positions = NDArray[np.integer]


def at_positions(positions: Positions, shape: tuple[int, ...]) -> Mask:
    """Mask of a multiset of linear positions."""
    mask = np.zeros(shape, bool)
    mask.flat[np.asarray(positions, np.int64).ravel()] = True
    return mask
