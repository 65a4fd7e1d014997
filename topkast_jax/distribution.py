"""How a sparsity becomes a number of entries for each parameter, on the host.

A distribution is `(shapes, sparsity, copies) -> {path: k}`. `shapes` holds the shape of
one slice in canonical form, (window..., inputs, outputs), and `copies` how many slices a
parameter stacks (1 if left out); k counts the entries kept in each slice. Past this
module there are only counts.
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from types import MappingProxyType
from typing import TypeAlias

import numpy as np

from topkast_jax._trees import Pattern, first_match, parameters
from topkast_jax._types import Counts, PyTree

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Copies: TypeAlias = Mapping[str, int]
Distribution: TypeAlias = Callable[[Shapes, float, Copies], dict[str, int]]

ONE_SLICE: Copies = MappingProxyType({})
"""No parameter is stacked."""


def require_sparsity(sparsity: float, name: str = "sparsity") -> None:
    """Raises ValueError unless a sparsity lies in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
        raise ValueError(f"{name} must be a number in [0, 1), got {sparsity!r}")
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"{name}={sparsity} must lie in [0, 1): the fraction of zeros, so 0.9 keeps "
            "a tenth of the weights"
        )


def uniform(
    shapes: Shapes, sparsity: float, copies: Copies = ONE_SLICE
) -> dict[str, int]:
    """The same sparsity everywhere: k = int(round((1 - sparsity) * size)).

    Args:
      shapes: `{path: slice shape}`.
      sparsity: fraction of zeros, in [0, 1).
      copies: slices per parameter; they do not matter here.
    Returns:
      `{path: k per slice}`.
    Example:
      >>> uniform({"a": (4, 5), "b": (10, 10)}, 0.9)
      {'a': 2, 'b': 10}
    """
    del copies
    require_sparsity(sparsity)
    return {p: round((1 - sparsity) * math.prod(s)) for p, s in shapes.items()}


def erdos_renyi(
    shapes: Shapes,
    sparsity: float,
    copies: Copies = ONE_SLICE,
) -> dict[str, int]:
    """Density in proportion to (inputs + outputs) / (inputs * outputs), at most 1.

    The window of a convolution counts toward its inputs, as in GSE (arXiv 2401.06898).
    The counts add up to round((1 - sparsity) * total) exactly; with stacked parameters,
    whose slices all get the same k, to the nearest reachable number below.

    Args:
      shapes: `{path: slice shape}`.
      sparsity: fraction of zeros over all parameters together, in [0, 1).
      copies: slices per parameter.
    Returns:
      `{path: k per slice}`.
    Example:
      >>> erdos_renyi({"wide": (10, 100), "small": (10, 10)}, 0.8)
      {'wide': 186, 'small': 34}

    Reference:
      Mocanu et al., 2018, arXiv 1707.04780.
    """
    raw = {
        p: Fraction(math.prod(s[:-1]) + s[-1], math.prod(s)) for p, s in shapes.items()
    }
    return _proportional(shapes, raw, sparsity, copies)


def erk(shapes: Shapes, sparsity: float, copies: Copies = ONE_SLICE) -> dict[str, int]:
    """Erdős–Rényi-Kernel: density in proportion to the sum of the axes over their product.

    As `erdos_renyi`, but the axes of a convolution's window are added, not multiplied
    into the inputs; the two agree on matrices.

    Example:
      >>> erk({"conv": (3, 3, 8, 16), "head": (16, 10)}, 0.5)
      {'conv': 496, 'head': 160}

    Reference:
      Evci et al., "Rigging the Lottery", 2020, arXiv 1911.11134.
    """
    raw = {p: Fraction(sum(s), math.prod(s)) for p, s in shapes.items()}
    return _proportional(shapes, raw, sparsity, copies)


def _proportional(
    shapes: Shapes, raw: Mapping[str, Fraction], sparsity: float, copies: Copies
) -> dict[str, int]:
    """Counts in proportion to raw densities, capped at dense, with an exact total."""
    require_sparsity(sparsity)
    copies = {p: copies.get(p, 1) for p in shapes}
    sizes = {p: math.prod(s) for p, s in shapes.items()}
    budget = round((1 - sparsity) * sum(sizes[p] * copies[p] for p in shapes))
    dense: set[str] = set()
    while True:  # whoever exceeds density 1 becomes dense; the rest share what is left
        rest = budget - sum(sizes[p] * copies[p] for p in dense)
        weight = sum(raw[p] * sizes[p] * copies[p] for p in shapes if p not in dense)
        scale = Fraction(rest) / weight if weight else Fraction(0)
        above = [p for p in shapes if p not in dense and scale * raw[p] > 1]
        if not above:
            break
        most = max(raw[p] for p in above)
        dense.update(p for p in above if raw[p] == most)
    exact = {
        p: Fraction(sizes[p]) if p in dense else scale * raw[p] * sizes[p]
        for p in shapes
    }
    counts = {p: int(exact[p]) for p in shapes}
    left = budget - sum(counts[p] * copies[p] for p in shapes)
    by_remainder = sorted(shapes, key=lambda p: counts[p] - exact[p])
    for p in by_remainder:
        if copies[p] <= left and counts[p] < sizes[p]:
            counts[p] += 1
            left -= copies[p]
    return counts


def by_path(
    rules: Mapping[Pattern, float],
    rest: Distribution = uniform,
    keep_total: bool = False,
) -> Distribution:
    """Sparsities of one's own for some parameters; the first matching rule wins.

    A rule holds for A and B alike: a parameter with a rule has k_A = k_B. Sparsity 0
    is a dense exception.

    Args:
      rules: `{pattern: sparsity}`; a pattern is a glob or a compiled regex.
      rest: distribution of the parameters that no rule covers.
      keep_total: whether `rest` is asked for the sparsity at which all parameters
        together, those with a rule included, reach the sparsity of the method.
    Returns:
      A distribution. It raises ValueError if a pattern matches nothing, or if
      `keep_total` asks for what cannot be reached; the error names the maximum.
    Example:
      >>> rule = by_path({"head/*": 0.0})
      >>> rule({"body/kernel": (10, 10), "head/kernel": (10, 2)}, 0.9)
      {'body/kernel': 10, 'head/kernel': 20}
    """
    for pattern, sparsity in rules.items():
        require_sparsity(sparsity, f"by_path: {pattern!r}")

    def distribution(
        shapes: Shapes,
        sparsity: float,
        copies: Copies = ONE_SLICE,
    ) -> dict[str, int]:
        require_sparsity(sparsity)
        ruled = first_match(rules, shapes, "by_path")
        counts = {p: uniform({p: shapes[p]}, ruled[p])[p] for p in shapes if p in ruled}
        others = {p: s for p, s in shapes.items() if p not in ruled}
        if others:
            asked = sparsity
            if keep_total:
                asked = _remaining_sparsity(shapes, counts, sparsity, copies)
            counts |= rest(others, asked, copies)
        return {p: counts[p] for p in shapes}

    return distribution


def of_masks(masks: PyTree) -> Distribution:
    """As many entries as masks have, whatever the sparsity of the method.

    With `init=masks` the masks are kept as they are; A = B then, also where a method
    asks for two sparsities.

    Args:
      masks: tree of bool arrays like the parameters, or `{path: mask}`.
    Returns:
      A distribution. It raises ValueError where a mask is missing, or is empty, or the
      slices of a stacked parameter cannot have the same number of entries.
    Example:
      >>> of_masks({"kernel": np.eye(4, dtype=bool)})({"kernel": (4, 4)}, 0.9, {})
      {'kernel': 4}
    """
    counts = {p.path: int(np.sum(p.array)) for p in parameters(masks)[0]}

    def distribution(
        shapes: Shapes, sparsity: float, copies: Copies = ONE_SLICE
    ) -> dict[str, int]:
        del sparsity
        found = {}
        for path in shapes:
            if path not in counts:
                raise ValueError(
                    f"of_masks: no mask for {path!r}; there are {', '.join(counts)}"
                )
            each, odd = divmod(counts[path], copies.get(path, 1))
            if odd:
                raise ValueError(
                    f"of_masks: {path!r} stacks {copies[path]} slices, and its mask has "
                    f"{counts[path]} entries: every slice must have the same number"
                )
            found[path] = each
        return found

    return distribution


def _remaining_sparsity(
    shapes: Shapes, fixed: Mapping[str, int], sparsity: float, copies: Copies
) -> float:
    sizes = {p: math.prod(s) * copies.get(p, 1) for p, s in shapes.items()}
    total, held = (
        sum(sizes.values()),
        sum(k * copies.get(p, 1) for p, k in fixed.items()),
    )
    free = sum(size for p, size in sizes.items() if p not in fixed)
    keep = (1 - sparsity) * total - held
    if not 0 < keep <= free:
        least = 1 - (held + free) / total
        raise ValueError(
            f"by_path: total sparsity {sparsity} cannot be reached: the parameters with "
            f"a rule hold {held} of {total} entries, so it must lie in "
            f"[{least:.6g}, {1 - held / total:.6g}), the reachable maximum excluded"
        )
    return 1 - keep / free


def forward_and_backward(
    forward: Mapping[str, int], backward: Mapping[str, int], shapes: Shapes
) -> dict[str, Counts]:
    """Counts of A and B per parameter, or an error before anything is built.

    Raises:
      ValueError: a parameter that keeps nothing, or whose A is larger than its B.
    """
    for path, shape in shapes.items():
        size = math.prod(shape)
        if forward[path] < 1:
            raise ValueError(
                f"{path!r} of {size} entries per slice would keep k={forward[path]}: a "
                "dead layer; lower the sparsity, exclude it with where, or give it a "
                "sparsity of its own with tk.by_path"
            )
        if forward[path] > backward[path]:
            raise ValueError(
                f"{path!r}: the forward set ({forward[path]}) is larger than the "
                f"backward set ({backward[path]}); A must lie within B"
            )
    return {path: Counts(forward[path], backward[path]) for path in shapes}
