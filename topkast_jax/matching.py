"""Masks of two networks compared up to a permutation of their neurons.

Two seeds may find the same network with its hidden units in another order, and then the
plain overlap of their masks is that of chance. Here hidden units are matched first.
"""

import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from topkast_jax import _trees
from topkast_jax._types import PyTree


class Matched(NamedTuple):
    """Overlap |a and b| / |a or b| of one parameter.

    Attributes:
      plain: as the networks stand.
      matched: with the hidden units of the second in the order of the first.
      chance: what two random masks with these numbers of entries have.
    """

    plain: float
    matched: float
    chance: float


def matched_overlap(a: PyTree, b: PyTree, chain: Sequence[str]) -> dict[str, Matched]:
    """Overlap of masks before and after matching hidden units, layer by layer; host.

    The outputs of a layer are the inputs of the next. From the first layer on, with its
    inputs in the order already found, its outputs are matched so that as many entries
    as possible lie on each other (an assignment problem, solved exactly); the inputs of
    the first layer and the outputs of the last stay as they are. Greedy from layer to
    layer: a lower bound of what the best permutation of all layers together reaches.

    Random masks gain by matching too, the more the fewer inputs a unit has: compare with
    masks of two untrained networks, not with `chance` alone.

    Args:
      a: tree of bool arrays, as `tk.dense_masks(opt_state).forward`.
      b: of another network of the same shapes.
      chain: paths of the layers in order, matrices [inputs, outputs] or convolutions
        [..., inputs, outputs].
    Returns:
      `{path: Matched}`.
    Raises:
      ValueError: a path without a mask, or layers that do not follow each other.
    Example:
      >>> first = {"one": np.eye(4, dtype=bool), "two": np.eye(4, dtype=bool)}
      >>> order = [2, 0, 3, 1]  # the hidden units of the same network
      >>> second = {"one": first["one"][:, order], "two": first["two"][order]}
      >>> found = matched_overlap(first, second, ["one", "two"])
      >>> found["one"].plain, found["one"].matched, found["two"].matched
      (0.0, 1.0, 1.0)
    """
    one, two = (_named(tree, chain) for tree in (a, b))
    found: dict[str, Matched] = {}
    order = np.arange(one[chain[0]].shape[-2])
    for i, path in enumerate(chain):
        first, second = one[path], two[path]
        if first.shape != second.shape:
            raise ValueError(
                f"{path!r} is {first.shape} in one and {second.shape} in the other"
            )
        if first.shape[-2] != len(order):
            raise ValueError(
                f"{path!r} has {first.shape[-2]} inputs, and the layer before it "
                f"{len(order)} outputs: the chain is not one"
            )
        moved = second[..., order, :]
        outputs = first.shape[-1]
        order = np.arange(outputs)
        if i + 1 < len(chain):
            flat, other = (
                x.reshape(-1, outputs).astype(np.float64) for x in (first, moved)
            )
            _, order = linear_sum_assignment(flat.T @ other, maximize=True)
        density, against = first.mean(), second.mean()
        both = density * against
        found[path] = Matched(
            _overlap(first, second),
            _overlap(first, moved[..., order]),
            float(both / (density + against - both)),
        )
    return found


class Agreement(NamedTuple):
    """Overlap of one parameter's masks, means over all pairs of networks.

    Attributes:
      plain: as the networks stand.
      matched: after matching hidden units.
      random: what `matched` is for random masks with as many entries. What is above it
        was learnt.
    """

    plain: float
    matched: float
    random: float


def mask_agreement(
    masks: Sequence[PyTree], chain: Sequence[str], *, seed: int = 0
) -> dict[str, Agreement]:
    """Whether several runs of one method find the same network, up to its neurons; host.

    Compare methods by it: with masks of RigL over some seeds, and of Top-KAST over the
    same seeds.

    Args:
      masks: two networks or more, each as `matched_overlap` takes it.
      chain: paths of layers that follow each other, see `matched_overlap`.
      seed: of the random masks.
    Returns:
      `{path: Agreement}`.
    Raises:
      ValueError: fewer than two networks, or as `matched_overlap`.
    Example:
      >>> draw = np.random.default_rng(0)
      >>> one, other = ({"w": draw.random((64, 64)) < 0.1} for _ in range(2))
      >>> found = mask_agreement([one, one, other], ["w"])["w"]
      >>> 1 / 3 < found.plain < 0.5  # one pair of three is equal
      True
    """
    if len(masks) < 2:
        raise ValueError(f"agreement is between two networks or more, not {len(masks)}")
    draw = np.random.default_rng(seed)
    named = [_named(tree, chain) for tree in masks]
    shuffled = [
        {path: draw.permuted(each[path].ravel()).reshape(each[path].shape) for path in chain}
        for each in named
    ]  # fmt: skip
    found: dict[str, list[tuple[float, float, float]]] = {path: [] for path in chain}
    for i, j in itertools.combinations(range(len(masks)), 2):
        learnt = matched_overlap(named[i], named[j], chain)
        chance = matched_overlap(shuffled[i], shuffled[j], chain)
        for path, pairs in found.items():
            each = learnt[path]
            pairs.append((each.plain, each.matched, chance[path].matched))
    return {
        path: Agreement(*map(statistics.fmean, zip(*pairs, strict=True)))
        for path, pairs in found.items()
    }


def _named(tree: PyTree, chain: Sequence[str]) -> dict[str, np.ndarray]:
    masks = {p.path: np.asarray(p.array) for p in _trees.parameters(tree)[0]}
    for path in chain:
        if path not in masks or masks[path].ndim < 2:
            raise ValueError(
                f"matched_overlap: there is no matrix of masks at {path!r}; there are "
                f"{', '.join(masks)}"
            )
    return masks


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max(1, (a | b).sum()))
