"""One Method, two stores: lists of positions and values beside dense arrays.

A prototype of the packed layout, only as large as the proof needs: the same `Method` of
Top-KAST and of SET runs on lists and must choose the same entries as on masks, bit for
bit, at the start and at every refresh.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import topkast_jax as tk
from topkast_jax._trees import leaf_key
from topkast_jax._types import Axes, Counts, Leaf, LeafMasks
from topkast_jax.draw import position_of
from topkast_jax.grid import Grid
from topkast_jax.layouts.masked import MaskedLeaf

SHAPE = (12, 15)
SIZE = 180
ROLES = Axes((), (), (0,), (1,))


def _sorted_top(scores, positions, k, among) -> np.ndarray:
    """Positions of the k largest, ties to the lowest position."""
    allowed = np.flatnonzero(among)
    best = allowed[np.lexsort((positions[allowed], -scores[allowed]))]
    return np.sort(positions[best[: int(k)]])


@dataclasses.dataclass(frozen=True)
class ListLeaf:
    """A `Leaf` over lists: entries of B, or all of theta for a host-side reservoir."""

    positions: np.ndarray
    value: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    grad: np.ndarray
    counts: Counts
    key: jax.Array
    path: str = "kernel"
    shape: tuple[int, ...] = SHAPE
    axes: Axes = ROLES
    learning_rate: float | None = None
    size: int = SIZE

    def top(self, scores: Any, k: Any, among: Any = None) -> np.ndarray:
        among = np.ones(len(self.positions), bool) if among is None else among
        return _sorted_top(np.asarray(scores), self.positions, k, np.asarray(among))

    def grow(self, score: Any, k: Any, outside: Any) -> np.ndarray:
        raise NotImplementedError("gradients of absent entries need tk.probe")

    def draw(self, k: Any, outside: Any = None) -> np.ndarray:
        """Walks along the random order and rejects: as many ranks as it takes, no more."""
        key = jax.random.fold_in(self.key, 0)
        taken = set() if outside is None else set(outside.tolist())
        found: list[int] = []
        rank, chunk = 0, 16
        while len(found) < k:
            ranks = jnp.arange(rank, rank + chunk)
            for position in np.asarray(position_of(key, ranks, SIZE)).tolist():
                if position < SIZE and position not in taken and len(found) < k:
                    found.append(position)
            rank += chunk
        return np.sort(np.array(found, np.int64))

    def portion(self, share: Any, k: int) -> int:
        return round(float(share) * k)

    def union(self, first: Any, second: Any) -> np.ndarray:
        return np.union1d(first, second).astype(np.int64)

    def where(self, condition: Any, first: Any, second: Any) -> np.ndarray:
        return first if condition else second

    def masks(self, forward: Any, backward: Any) -> LeafMasks:
        return LeafMasks(forward, backward)


def masked_leaf(theta, masks, counts, step) -> MaskedLeaf:
    key = leaf_key(jnp.uint32(5), "kernel", step)
    zeros = jnp.zeros(SHAPE)
    grid = Grid(SHAPE, ROLES, tk.unstructured)
    return MaskedLeaf(theta, *masks, zeros, "kernel", grid, counts, key)


def list_leaf(theta, masks, counts, step, everything) -> ListLeaf:
    """Of all of theta where the method keeps a reservoir (on the host), else of B."""
    flat = np.asarray(theta).ravel()
    positions = np.arange(SIZE) if everything else masks.backward
    return ListLeaf(
        positions,
        flat[positions],
        np.isin(positions, masks.forward),
        np.isin(positions, masks.backward),
        np.zeros(len(positions)),
        counts,
        leaf_key(jnp.uint32(5), "kernel", step),
    )


def positions(mask) -> np.ndarray:
    return np.flatnonzero(np.asarray(mask))


METHODS = {
    "top_kast": tk.top_kast(0.9, 0.8, refresh=tk.every(1), stop=6),
    "top_kast_random": tk.top_kast(0.9, 0.8, refresh=tk.every(1), explore="random"),
    "set": tk.set_(0.9, refresh=tk.every(1), drop_fraction=0.4),
    "set_cosine": tk.set_(0.9, refresh=tk.every(1), drop_fraction=tk.cosine(0.5, 8)),
}


@pytest.mark.parametrize("name", METHODS)
def test_same_entries_in_both_layouts(name):
    method = METHODS[name]
    counts = method.counts({"kernel": SHAPE}, {})["kernel"]
    random = np.random.default_rng(0)
    theta = jnp.asarray(random.normal(size=SHAPE).round(1), jnp.float32)  # with ties
    empty = LeafMasks(jnp.zeros(SHAPE, bool), jnp.zeros(SHAPE, bool))
    none = LeafMasks(np.zeros(0, np.int64), np.zeros(0, np.int64))

    dense, _ = method.init(masked_leaf(theta, empty, counts, 0))
    packed, _ = method.init(list_leaf(theta, none, counts, 0, method.reservoir))
    changed = 0
    for step in range(1, 9):
        np.testing.assert_array_equal(positions(dense.forward), packed.forward)
        np.testing.assert_array_equal(positions(dense.backward), packed.backward)
        assert len(packed.forward) == counts.forward
        theta += jnp.asarray(random.normal(size=SHAPE).round(1), jnp.float32)
        if not method.reservoir:
            theta = jnp.where(dense.backward, theta, 0)
        before = packed.forward
        fresh = masked_leaf(theta, dense, counts, step)
        listed = list_leaf(theta, packed, counts, step, method.reservoir)
        assert isinstance(fresh, Leaf)
        assert isinstance(listed, Leaf)
        dense, _ = method.refresh(fresh, (), step)
        packed, _ = method.refresh(listed, (), step)
        changed += not np.array_equal(before, packed.forward)
    assert changed >= 5
