"""Guided stochastic exploration (arXiv 2401.06898; algorithm 2 of its supplement).

Every T steps up to T_end, per layer with weights theta of shape (n_in, n_out):

    S = sample(f, g, ceil(gamma |A|)) less A      pairs with replacement, i ~ f, j ~ g
    k = min(ceil(alpha_t |A|), |S|)               distinct pairs
    G = the k largest |grad| on S,  P = the k smallest |theta| on A
    A = (A less P) with G                         new weights zero

S excludes A, so what was just pruned does not grow again. The pseudocode replaces the
SGD step by the update; here, as in the authors' code, both happen. That code draws
int(gamma |A|) pairs instead, and takes everything as candidates in layers of at most 50
percent sparsity; both are for the caller to do, who hands in S.
"""

from collections.abc import Callable, Mapping
from math import cos, pi
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from oracle import Array, Due, Inner, Mask

from oracles.loop import (
    Gradient,
    Masks,
    Positions,
    Run,
    Snapshot,
    at_positions,
    ceil_count,
    global_top_k,
    nnz,
    train,
)


class Observed(NamedTuple):
    """What a linear layer sees: inputs h [n_in, B], cotangents delta [n_out, B]."""

    h: Array
    delta: Array


def cosine(step: int, alpha: float, t_end: int) -> float:
    """alpha_t = alpha/2 (1 + cos(pi t / T_end)); zero from T_end on."""
    return alpha / 2 * (1 + cos(pi * min(step, t_end) / t_end))


def er_count(n_in: int, n_out: int, epsilon: float) -> int:
    """ceil(epsilon (n_in + n_out)) edges of the initial graph, at most all of them."""
    return min(ceil_count(epsilon, n_in + n_out), n_in * n_out)


# Where candidates come from
def uniform(h: Array, delta: Array) -> tuple[Array, Array]:
    return _normal(np.ones(len(h))), _normal(np.ones(len(delta)))


def grabo(h: Array, delta: Array) -> tuple[Array, Array]:
    """f ~ |h| 1, g ~ |delta| 1 for h [n_in, B], delta [n_out, B]: row-wise L1 norms.

    By the triangle inequality |h delta^T| <= (|h| 1)(|delta| 1)^T, equal for B = 1.
    """
    return _normal(abs(h).sum(1)), _normal(abs(delta).sum(1))


def graest(h: Array, delta: Array, signs: Array) -> tuple[Array, Array]:
    """f ~ |h s|, g ~ |delta s| with ONE sign vector s in {-1, 1}^B for both.

    E[(h s)(delta s)^T] = h delta^T, the gradient. The authors' code multiplies only the
    first row of delta by the signs in its convolution branch; the paper is taken.
    """
    return _normal(abs(h @ signs)), _normal(abs(delta @ signs))


def sketch(h: Array, delta: Array, signs: Array) -> Array:
    """(h s)(delta s)^T: unbiased for h delta^T over uniform signs."""
    return np.outer(h @ signs, delta @ signs)


def patches(x: Array, kernel: tuple[int, int], strides=(1, 1), padding=0) -> Array:
    """h of a convolution: unfolded patches [kh * kw * c, batch * rows * columns].

    x is [batch, height, width, c]; the rows of h are in the order of a kernel stored as
    (kh, kw, c, out), so theta reads as the matrix kernel.reshape(-1, out). `padding` is
    one number for all four sides.
    """
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    kh, kw = kernel
    rows = range(0, x.shape[1] - kh + 1, strides[0])
    columns = range(0, x.shape[2] - kw + 1, strides[1])
    cut = [[x[:, r : r + kh, c : c + kw] for c in columns] for r in rows]
    cut = np.array(cut)  # [rows, columns, batch, kh, kw, c]
    return cut.transpose(3, 4, 5, 2, 0, 1).reshape(kh * kw * x.shape[3], -1)


def positions_of_outputs(delta: Array) -> Array:
    """delta of a convolution, [batch, rows, columns, out] -> [out, batch * ...]."""
    return delta.reshape(-1, delta.shape[-1]).T


def _normal(weights: Array) -> Array:
    """Adds up to one; uniform where all are zero (the paper does not say)."""
    weights = np.asarray(weights, np.float64)
    total = weights.sum()
    return weights / total if total else np.full(len(weights), 1 / len(weights))


def inverse_cdf(probabilities: Array, uniforms: Array) -> NDArray[np.intp]:
    """First index whose cumulative probability exceeds u in [0, 1)."""
    cumulative = np.cumsum(np.asarray(probabilities, np.float64))
    return np.searchsorted(cumulative / cumulative[-1], uniforms, side="right")


def sample_pairs(f: Array, g: Array, uniforms: Array) -> Positions:
    """Linear positions i * n_out + j, with repeats: i from u[:, 0], j from u[:, 1]."""
    i, j = inverse_cdf(f, uniforms[:, 0]), inverse_cdf(g, uniforms[:, 1])
    return i * len(g) + j


# Refresh
def refresh(
    theta: Array,
    forward: Mask,
    candidates: Positions | None,
    grad: Array,
    alpha_t: float,
    regrow: bool = False,
) -> Mask:
    """New A of one layer; `candidates` is the multiset S of positions, None for all.

    Candidates that repeat or lie in A count once or not at all. With `regrow` what was
    just pruned may grow again if it is a candidate (RigL's rule; then everything as
    candidates is RigL with a count rounded up): k is then the largest for which k
    candidates lie outside what stays.
    """
    return refresh_global(
        {"": theta}, {"": forward}, {"": candidates}, {"": grad}, alpha_t, regrow
    )[""]


def refresh_global(
    theta: Mapping[str, Array],
    forward: Masks,
    candidates: Mapping[str, Positions | None],
    grad: Mapping[str, Array],
    alpha_t: float,
    regrow: bool = False,
) -> Masks:
    """New A, grown and pruned over all layers at once; the sum of |A| is constant.

    The default of the authors' code, which grows first and then prunes back with the
    grown edges protected: the same sets as pruning first, since S excludes A.
    """
    total = nnz(forward)
    drawn = {
        path: np.ones(mask.shape, bool)
        if candidates[path] is None
        else at_positions(candidates[path], mask.shape)
        for path, mask in forward.items()
    }
    size = {path: abs(theta[path]) for path in forward}
    slope = {path: abs(grad[path]) for path in forward}
    for k in range(min(ceil_count(alpha_t, total), total), -1, -1):
        kept = global_top_k(size, total - k, forward)
        barred = kept if regrow else forward
        allowed = {path: drawn[path] & ~barred[path] for path in forward}
        if nnz(allowed) >= k:
            break
    grown = global_top_k(slope, k, allowed)
    return {path: kept[path] | grown[path] for path in forward}


def gse(
    params: Mapping[str, Array],
    forward: Masks,
    inner: Inner,
    grad: Gradient,
    *,
    due: Due,
    alpha: float,
    t_end: int,
    candidates: Callable[[int, str, Run], Positions | None],
    scope: str = "layer",
    regrow: bool = False,
    **options,
) -> list[Snapshot]:
    """A run; alpha_t is 0 from T_end on. `candidates(step, path, run)` gives S."""

    def choose(run: Run) -> Masks:
        drawn = {path: candidates(run.step, path, run) for path in run.forward}
        rate = cosine(run.step, alpha, t_end)
        if scope == "global":
            return refresh_global(
                run.theta, run.forward, drawn, run.grads, rate, regrow
            )
        return {
            path: refresh(
                run.theta[path], mask, drawn[path], run.grads[path], rate, regrow
            )
            for path, mask in run.forward.items()
        }

    return train(params, forward, inner, grad, choose, due=due, **options)


def sampled(
    observed: Callable[[int, str], Observed],
    uniforms: Callable[[int, str, int], Array],
    gamma: float,
    signs: Callable[[int, str], Array] | None = None,
) -> Callable[[int, str, Run], Positions]:
    """`candidates` of `gse`: ceil(gamma |A|) pairs by GraBo or, with `signs`, GraEst.

    All three are asked for the refresh at `step`: for h and delta, for n pairs of
    numbers in [0, 1), and for one sign of each column of h and delta. In the paper h
    and delta are those of the batch whose gradient is compared, the one of step - 1.
    """

    def draw(step: int, path: str, run: Run) -> Positions:
        n = ceil_count(gamma, int(run.forward[path].sum()))
        h, delta = observed(step, path)
        f, g = grabo(h, delta) if signs is None else graest(h, delta, signs(step, path))
        return sample_pairs(f, g, uniforms(step, path, n))

    return draw


def perceptron(
    x: Array, wanted: Array, one: Array, shift: Array, two: Array
) -> tuple[Observed, Observed]:
    """h and delta of both layers of tanh(x W1 + b) W2, in float64.

    x is [B, n_in]; the loss is the mean of all squares of the distance from `wanted`.
    """
    x, wanted, one, shift, two = (
        np.asarray(a, np.float64) for a in (x, wanted, one, shift, two)
    )
    hidden = np.tanh(x @ one + shift)
    last = 2 * (hidden @ two - wanted) / wanted.size
    first = (last @ two.T) * (1 - hidden**2)
    return Observed(x.T, first.T), Observed(hidden.T, last.T)


def gradient(h: Array, delta: Array) -> Array:
    """Of a linear layer: h delta^T, [n_in, n_out]."""
    return h @ delta.T


def everything(step: int, path: str, run: Run) -> None:
    """All positions as candidates."""
