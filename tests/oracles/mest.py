"""MEST: memory-economic sparse training (arXiv 2110.14032), with elastic mutation."""

from collections.abc import Callable, Mapping

from oracle import Array, Due, Inner, Mask, Rate, at, top_k

from oracles.loop import Count, Draw, Gradient, Masks, Run, Snapshot, train


def mest_score(theta: Array, grad: Array, weight: float) -> Array:
    """|theta| + lambda |g|: importance of an active weight."""
    return abs(theta) + weight * abs(grad)


def mest(
    theta: Array,
    forward: Mask,
    grad: Array,
    weight: float,
    keep: int,
    total: int,
    draw: Callable[[int, Mask], Mask],
    regrow: bool = True,
) -> Mask:
    """Keeps `keep` of A by importance and grows at random to `total`.

    Hard memory bound: total = |A|. Soft bound (EM&S): keep is the target count, and
    total what may be exceeded until the next refresh.
    """
    kept = top_k(mest_score(theta, grad, weight), keep, among=forward)
    grown = draw(total - keep, ~(kept if regrow else forward))
    assert not (grown & kept).any() and grown.sum() == total - keep
    return kept | grown


def elastic(step: int, rates: tuple[float, ...], milestones: tuple[int, ...]) -> float:
    """Elastic mutation (EM): the fraction mutated falls at milestones, r_0, r_1, ..."""
    return rates[sum(step >= milestone for milestone in milestones)]


def mest_run(
    params: Mapping[str, Array],
    forward: Masks,
    inner: Inner,
    grad: Gradient,
    *,
    due: Due,
    fraction: Rate,
    draw: Draw,
    weight: float = 0.01,
    soft: bool = False,
    regrow: bool = True,
    count: Count = round,
    **options,
) -> list[Snapshot]:
    """`fraction` of the initial |A| mutates; EM hands in `elastic`.

    Hard: keep |A| - n, grow n. Soft (EM&S): keep the initial |A|, grow n beyond it; at
    the refresh where n is zero the target is reached exactly.
    """
    target = {path: int(mask.sum()) for path, mask in forward.items()}

    def choose(run: Run) -> Masks:
        new = {}
        for path, mask in run.forward.items():
            k = target[path]
            n = count(at(fraction, run.step) * k)
            keep, total = (k, k + n) if soft else (k - n, k)
            new[path] = mest(
                run.theta[path],
                mask,
                run.grads[path],
                weight,
                keep,
                total,
                lambda n, free, path=path: draw(run.step, path, n, free),
                regrow,
            )
        return new

    return train(params, forward, inner, grad, choose, due=due, **options)
