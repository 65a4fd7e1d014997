"""What a refresh of packed arrays reads and chooses, on the host."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax import _trees
from topkast_jax._types import LeafMasks, Mixture, PyTree, SparseState
from topkast_jax.layouts import selections
from topkast_jax.layouts import share as shares
from topkast_jax.layouts.host import HostLeaf
from topkast_jax.layouts.packed import Index, PackedLeaf
from topkast_jax.layouts.share import Share
from topkast_jax.layouts.store import Store
from topkast_jax.packing import host_leaf, wide
from topkast_jax.plan import Site
from topkast_jax.transformation import Recipe


class Choice(NamedTuple):
    """What a selection found for one parameter.

    Attributes:
      numbers: int32 [slices, n_B] of the new `Index`.
      source: int64 [slices, n_B], where each unit stood in B before; -1: it enters.
      masks: A and B as sets of the host.
      memory: of the method.
    """

    numbers: np.ndarray
    source: np.ndarray
    masks: LeafMasks
    memory: Any


class Job:
    """The packed parameters of one moment, on the host.

    Attributes:
      state: of `tk.sparse`.
      flat, treedef: the parameters.
      memory: of the method, by parameter.
      seed: of the random draws.
      step: updates made.
      indices: by parameter, for those that are sparse: as they are.
      sites: likewise.
      shares: the slices that this process holds.
      numbers: [own, n_B] units of B.
      values: [own, n_B, *unit].
    """

    def __init__(
        self, recipe: Recipe, theta: PyTree, opt_state: PyTree, found: PyTree
    ) -> None:
        states = _trees.find_states(opt_state)
        if len(states) != 1:
            raise ValueError(
                f"{len(states)} states of tk.sparse in this optimizer state; a refresh "
                "serves the one that tk.start made"
            )
        self.state: SparseState = states[0]
        self.flat, self.treedef = _trees.parameters(theta)
        indices = self.treedef.flatten_up_to(self.state.sparse_masks.forward)
        # Copies: the next update may be given the arrays themselves.
        memory = jax.tree.map(np.array, self.state.sparse_memory)
        self.memory = self.treedef.flatten_up_to(memory)
        self.seed = np.array(self.state.sparse_seed)
        self.found = [None] * len(self.flat)
        if found is None and recipe.method.needs_gradient:
            raise ValueError(
                f"{recipe.method.name} chooses by the gradient of the entries in A: "
                "pass found=tk.probe(...), made in the step before the refresh"
            )
        if found is not None:
            self.found = self.treedef.flatten_up_to(found)
        self.step = int(self.state.sparse_step)
        self.indices = {i: x for i, x in enumerate(indices) if x is not None}
        self.sites: dict[int, Site] = {}
        self.shares: dict[int, Share] = {}
        self.numbers: dict[int, np.ndarray] = {}
        self.values: dict[int, np.ndarray] = {}
        for i, index in enumerate(indices):
            if index is None:
                continue
            path, array = self.flat[i].path, self.flat[i].array
            share = shares.of(index.grid, index.index.sharding)
            self.sites[i], self.shares[i] = _site(i, path, index, recipe), share
            self.numbers[i] = share.read(index.index)
            self.values[i] = share.read(array)
            if not _all_finite(array, self.values[i]):
                raise ValueError(
                    f"{path!r} holds NaN or Inf at step {self.step}; masks chosen from "
                    "it would mean nothing"
                )

    def units(self, i: int, store: Store) -> np.ndarray:
        """The reservoir of a parameter, [own, units, *unit]."""
        share, path = self.shares[i], self.sites[i].path
        shape = (len(share.own), share.grid.count, *share.grid.unit)
        return store.array(path, shape, share.of)

    def write_back(self, store: Store) -> None:
        """Brings the reservoir up to date."""
        for i, site in self.sites.items():
            if not site.method.reservoir:
                continue
            units = self.units(i, store)
            at = wide(self.numbers[i], units)
            np.put_along_axis(units, at, self.values[i], axis=1)

    def select(self, recipe: Recipe, store: Store) -> dict[int, Choice]:
        """Brings the reservoir up to date, and chooses."""
        self.write_back(store)
        choices = {}
        for i, site in self.sites.items():
            due = site.method.due
            if isinstance(recipe.method, Mixture) and not (due and due(self.step)):
                continue
            if site.method.reservoir:
                units = self.units(i, store)
                leaf = host_leaf(
                    site, self.seed, self.step, units, self.shares[i], units.dtype
                )
            else:
                leaf = self._listed(i)
            masks, memory = site.method.refresh(leaf, self.memory[i], self.step)
            numbers = selections.numbered(site.grid, masks, len(self.numbers[i]))
            source = source_of(self.numbers[i], numbers)
            choices[i] = Choice(numbers, source, masks, memory)
        return choices

    def left(self, i: int, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Units that leave B: (own slice * units + number, values)."""
        numbers, values = self.numbers[i], self.values[i]
        slices, kept = numbers.shape
        first = kept * np.arange(slices)[:, None]
        leaves = np.ones(slices * kept, bool)
        leaves[(first + source)[source >= 0]] = False
        at = np.flatnonzero(leaves)
        rows = at // kept if kept else at
        places = rows * self.sites[i].grid.count + numbers.reshape(-1)[at]
        return places, values.reshape(-1, *values.shape[2:])[at]

    def _listed(self, i: int) -> HostLeaf:
        """A leaf over the units of A alone."""
        site, value, found = self.sites[i], self.values[i], self.found[i]
        grid, share = site.grid, self.shares[i]
        places, order = selections.selection_places(grid, self.numbers[i], share.own)
        flat = value.reshape(-1, *grid.unit)[order]
        grad, candidates, seen = np.zeros_like(flat), None, None
        if found is not None:
            grad = share.read(found.grad).reshape(-1, *grid.unit)[order]
        if found is not None and found.index is not None:
            numbers, others = (
                np.asarray(x)[share.own] for x in (found.index, found.candidates)
            )
            there, place = selections.selection_places(grid, numbers, share.own)
            candidates = (there, others.reshape(-1, *grid.unit)[place])
            if found.seen is not None:
                real = np.asarray(found.seen)[share.own].reshape(-1)[place]
                rows = selections.rows_of(grid, share.own)
                seen = np.sort((there + grid.size * rows[:, None])[real])
        marks = np.ones(flat.shape[:2], bool)
        return HostLeaf(
            grid=grid,
            counts=site.counts,
            path=site.path,
            key=_trees.leaf_key(self.seed, site.path, self.step),
            rows=selections.rows_of(grid, share.own),
            places=places,
            value=flat,
            grad=grad,
            forward=marks,
            backward=marks,
            candidates=candidates,
            seen=seen,
        )


def _site(i: int, path: str, index: Index, recipe: Recipe) -> Site:
    counts = PackedLeaf(index.index, index.index, index, path, index.index).counts
    return Site(i, path, index.grid, counts, counts, recipe.method_of(path))


def source_of(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Where each unit of `new` stands in `old`, -1 where it does not; [slices, n]."""
    found = [selections.find(*pair) for pair in zip(old, new, strict=True)]
    return np.stack(found) if found else np.full(new.shape, -1, np.int64)


def _all_finite(x: Any, own: np.ndarray) -> bool:
    """Whether an array is finite on every process, from what this one holds of it."""
    if getattr(x, "is_fully_addressable", True):
        return bool(np.isfinite(own.astype(np.float32, copy=False)).all())
    return bool(_finite(x))  # all of them must raise, or none


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()
