"""Oracle of the sparse training methods: plain NumPy, written from the papers.

Top-KAST (arXiv 2106.03517), SET (1707.04780), RigL (1911.11134). Nothing here imports
the library or JAX. One step is written out in the order in which it happens, weights
are dense arrays, masks are bool arrays, and every random choice is handed in by the
caller, so a test can feed the draws of the implementation under test.

Clock: `Oracle.count` is the step t about to be taken, from 0. Masks held before that
step are those used in it. A refresh *at* step s happens at the end of step s - 1.
Arithmetic runs in the dtype given to `Oracle`, float32 unless asked otherwise.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from fractions import Fraction
from math import floor, prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Mask = NDArray[np.bool_]
Moments = dict[str, Array]
Due = Callable[[int], bool]
Shapes = Mapping[str, tuple[int, ...]]
Rate = float | Callable[[int], float]


# Selection
def top_k(
    scores: Array, k: int, *, among: Mask | None = None, ranks: NDArray | None = None
) -> Mask:
    """Mask of the `k` largest `scores` where `among`; NaN last; ties by lowest rank.

    `ranks` are distinct numbers and default to the linear (C-order) index.
    """
    scores = np.asarray(scores, np.float64)
    allowed = np.ones(scores.shape, bool) if among is None else among
    candidates = np.flatnonzero(allowed)
    if not 0 <= k <= candidates.size:
        raise ValueError(f"k={k} of {candidates.size} candidates")
    if ranks is not None:
        candidates = candidates[np.argsort(np.ravel(ranks)[candidates])]
    # Descending and stable: equal scores stay in the order of their rank.
    best = np.argsort(-scores.ravel()[candidates], kind="stable")[:k]
    mask = np.zeros(scores.size, bool)
    mask[candidates[best]] = True
    return mask.reshape(scores.shape)


# Counts
def uniform(shapes: Shapes, sparsity: float) -> dict[str, int]:
    """The same sparsity everywhere, rounded leaf by leaf, halves to even."""
    return {path: round((1 - sparsity) * prod(s)) for path, s in shapes.items()}


def erdos_renyi(
    shapes: Shapes, sparsity: float, *, kernel: bool = False
) -> dict[str, int]:
    """Counts of the Erdős-Rényi rule; they add up to round((1 - sparsity) * total).

    Density is epsilon * (n_in + n_out) / (n_in * n_out) over the last two axes; with
    `kernel` (ERK) epsilon * sum(shape) / prod(shape). A leaf that would exceed density
    1 is made dense and epsilon is solved again for the others (RigL, section 3).
    Exact rational arithmetic; what is left after rounding down goes to the largest
    remainders, ties to the leaf named first.
    """
    size = {path: prod(shape) for path, shape in shapes.items()}
    used = {path: shape if kernel else shape[-2:] for path, shape in shapes.items()}
    raw = {path: Fraction(sum(s), prod(s)) for path, s in used.items()}
    budget = round((1 - sparsity) * sum(size.values()))
    exact = {path: Fraction(n) for path, n in size.items()}  # Dense until solved.
    rest = list(size)
    while rest:
        left = budget - sum(size[path] for path in size if path not in rest)
        epsilon = Fraction(left) / sum(raw[path] * size[path] for path in rest)
        largest = max(raw[path] for path in rest)
        if epsilon * largest <= 1:
            exact |= {path: epsilon * raw[path] * size[path] for path in rest}
            break
        rest = [path for path in rest if raw[path] < largest]
    counts = {path: floor(value) for path, value in exact.items()}
    short = budget - sum(counts.values())
    for path in sorted(size, key=lambda p: counts[p] - exact[p])[:short]:
        counts[path] += 1
    return counts


# Clock
def every(n: int, start: int | None = None, stop: int | None = None) -> Due:
    """Due at start (default n), start + n, ... while below stop; never at step 0."""
    first = n if start is None else start

    def due(step: int) -> bool:
        in_range = step >= max(first, 1) and (stop is None or step < stop)
        return in_range and (step - first) % n == 0

    return due


def at(rate: Rate, step: int) -> float:
    """Value of a constant or a schedule."""
    return float(rate(step) if callable(rate) else rate)


# Inner optimizers
class Inner(NamedTuple):
    slots: tuple[str, ...]
    # (gradient, moments, theta, step) -> (update, moments)
    update: Callable[[Array, Moments, Array, int], tuple[Array, Moments]]


def sgd(learning_rate: Rate, momentum: float | None = None) -> Inner:
    """-lr * g, or -lr * trace with trace = g + momentum * trace."""

    def update(g, moments, theta, step):
        trace = g if momentum is None else g + momentum * moments["trace"]
        slots = {} if momentum is None else {"trace": trace}
        return -at(learning_rate, step) * trace, slots

    return Inner(() if momentum is None else ("trace",), update)


def adamw(learning_rate: Rate, weight_decay: float = 1e-4) -> Inner:
    """Adam (b1 .9, b2 .999, eps 1e-8, one count for all entries), decoupled decay."""
    b1, b2, eps = 0.9, 0.999, 1e-8

    def update(g, moments, theta, step):
        # Powers in the dtype of the weights: 1 - .999 in float32 is off by 1e-5.
        one = g.dtype.type(1)
        mu = (1 - b1) * g + b1 * moments["mu"]
        nu = (1 - b2) * g**2 + b2 * moments["nu"]
        mu_hat = mu / (one - (one * b1) ** (step + 1))
        nu_hat = nu / (one - (one * b2) ** (step + 1))
        direction = mu_hat / (np.sqrt(nu_hat) + eps) + weight_decay * theta
        return -at(learning_rate, step) * direction, {"mu": mu, "nu": nu}

    return Inner(("mu", "nu"), update)


def adam(learning_rate: Rate) -> Inner:
    return adamw(learning_rate, weight_decay=0.0)


# Methods
def penalty_gradient(theta, forward, backward, weight, norm, density) -> Array:
    """lambda * s on A, lambda * s / D on B less A, 0 elsewhere; s = theta or sign."""
    slope = weight * {"l2": theta, "l1": np.sign(theta)}[norm]
    zero = np.zeros_like(theta)
    return np.where(forward, slope, np.where(backward, slope / density, zero))


@dataclass
class Leaf:
    """One weight array; masks are for step `Oracle.count`."""

    theta: Array
    forward: Mask  # A
    backward: Mask  # B; dense leaves have both True everywhere
    moments: Moments
    k: tuple[int, int] | None  # Entries in A and in B; None for a dense leaf.


@dataclass
class Oracle:
    """One simulated run over named leaves: `step` takes the dense gradients."""

    params: Mapping[str, Array]  # Initial weights, dense.
    method: str  # "top_kast", "static", "set" or "rigl"
    inner: Inner
    _: KW_ONLY
    forward: Mapping[str, int]  # k_A by path; a path left out is a dense leaf.
    backward: Mapping[str, int] | None = None  # k_B by path, top_kast only.
    due: Due | None = None
    drop_fraction: Rate = 0.3  # A schedule is read at the step of the refresh.
    # top_kast. The learning rate serves the decoupled penalty.
    penalty: float = 1e-4
    penalty_norm: str = "l2"
    penalty_mode: str = "gradient"
    learning_rate: Rate = 0.0
    stop: int | None = None
    explore: str = "top"
    # Random choices: masks with k True, and distinct numbers of which the lowest wins.
    initial: Callable[[str, int], Mask] | None = None
    draw: Callable[[int, str, int, Mask], Mask] | None = None
    order: Callable[[int, str], NDArray] | None = None
    reset: str = "init"  # Moments of entries that enter or leave B: zero, or "keep".
    dtype: type = np.float32
    count: int = 0
    leaves: dict[str, Leaf] = field(default_factory=dict)

    def __post_init__(self):
        for path, value in self.params.items():
            theta = np.array(value, self.dtype)
            full = np.ones(theta.shape, bool)
            moments = {slot: np.zeros_like(theta) for slot in self.inner.slots}
            leaf = self.leaves[path] = Leaf(theta, full, full, moments, None)
            if path in self.forward:
                leaf.k = self.forward[path], (self.backward or self.forward)[path]
                if self.method == "top_kast":
                    leaf.forward, leaf.backward = self._top_kast(0, path, leaf)
                else:
                    leaf.forward = leaf.backward = self.initial(path, leaf.k[0])
                assert leaf.forward.sum() == leaf.k[0]

    @property
    def probe(self) -> bool:
        """Whether step `count` must see the gradient off B (RigL, before a refresh)."""
        return self.method == "rigl" and self.refreshes(self.count + 1)

    def theta(self) -> dict[str, Array]:
        return {path: leaf.theta for path, leaf in self.leaves.items()}

    def alpha(self) -> dict[str, Array]:
        """The weights of the forward pass: theta on A, exact zeros elsewhere."""
        leaves = self.leaves.items()
        return {path: _only(leaf.forward, leaf.theta) for path, leaf in leaves}

    def refreshes(self, step: int) -> bool:
        """Whether masks are chosen anew for `step`; `stop` is itself such a step."""
        if self.method == "top_kast" and self.stop is not None and step >= self.stop:
            return step == self.stop
        return self.method != "static" and bool(self.due and self.due(step))

    def step(self, grads: Mapping[str, Array]) -> dict[str, Array]:
        """Takes step `count` with the gradients at `alpha()`; returns theta."""
        for path, leaf in self.leaves.items():
            theta, b = leaf.theta, leaf.backward
            seen = np.asarray(grads[path], self.dtype)
            gradient, decay = _only(b, seen), np.zeros_like(theta)
            if self.method == "top_kast" and leaf.k:
                weight, density = self.penalty, leaf.k[0] / theta.size
                pull = penalty_gradient(
                    theta, leaf.forward, b, weight, self.penalty_norm, density
                )
                if self.penalty_mode == "gradient":
                    gradient = gradient + pull
                else:
                    decay = at(self.learning_rate, self.count) * pull
            update, leaf.moments = self.inner.update(
                gradient, leaf.moments, theta, self.count
            )
            leaf.theta = theta + _only(b, update - decay)
            if self.method != "top_kast":  # No reservoir: land on the mask.
                leaf.theta = _only(b, leaf.theta)
            if leaf.k and self.refreshes(self.count + 1):
                self._refresh(self.count + 1, path, leaf, seen)
            assert {leaf.theta.dtype} | {m.dtype for m in leaf.moments.values()} == {
                np.dtype(self.dtype)
            }
        self.count += 1
        return self.theta()

    def _refresh(self, step: int, path: str, leaf: Leaf, gradient: Array) -> None:
        before = leaf.backward
        if self.method == "top_kast":
            leaf.forward, leaf.backward = self._top_kast(step, path, leaf)
        else:
            k = leaf.k[0]
            n = round(at(self.drop_fraction, step) * k)
            kept = top_k(abs(leaf.theta), k - n, among=leaf.forward)
            if self.method == "set":
                grown = self._drawn(step, path, n, ~kept)
            else:
                ranks = self.order(step, path)
                grown = top_k(abs(gradient), n, among=~kept, ranks=ranks)
            leaf.forward = leaf.backward = kept | grown
            # Entries new to B were zero already; those that left it land now.
            leaf.theta = _only(leaf.backward, leaf.theta)
        if self.reset == "init":
            same = before == leaf.backward
            leaf.moments = {slot: _only(same, m) for slot, m in leaf.moments.items()}

    def _top_kast(self, step: int, path: str, leaf: Leaf) -> tuple[Mask, Mask]:
        k_forward, k_backward = leaf.k
        forward = top_k(abs(leaf.theta), k_forward)
        if self.stop is not None and step >= self.stop:
            return forward, forward
        if self.explore == "top":
            return forward, top_k(abs(leaf.theta), k_backward)
        extra = self._drawn(step, path, k_backward - k_forward, ~forward)
        return forward, forward | extra

    def _drawn(self, step: int, path: str, k: int, allowed: Mask) -> Mask:
        mask = self.draw(step, path, k, allowed)
        assert mask.sum() == k and not (mask & ~allowed).any()
        return mask


def _only(mask: Mask, x: Array) -> Array:
    return np.where(mask, x, np.zeros_like(x))
