"""Packed arrays of one moment: on the host, on the device, and in a state."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from topkast_jax import _trees, faults
from topkast_jax._types import LeafMasks, Masks, PyTree, SparseState
from topkast_jax.layouts import selections
from topkast_jax.layouts.host import HostLeaf
from topkast_jax.layouts.packed import Index, PackedLeaf
from topkast_jax.layouts.share import Share
from topkast_jax.plan import Site
from topkast_jax.sets import is_due, tree_of
from topkast_jax.transformation import Recipe, recipe_of


def recipe_for(tx: optax.GradientTransformation, caller: str) -> Recipe:
    """The recipe of a transformation, which must be one of packed arrays."""
    recipe = recipe_of(tx, caller)
    if recipe.layout == "masked":
        raise ValueError(
            f'{caller} is for layout="packed"; with layout="masked" the masks change '
            "inside tx.update, which starts from tx.init"
        )
    return recipe


def host_leaf(
    site: Site,
    seed: Any,
    step: int,
    units: np.ndarray | None,
    share: Share,
    dtype: Any,
) -> HostLeaf:
    """A leaf over all of theta, [own, units, *unit], or without any entries."""
    rows = selections.rows_of(site.grid, share.own)
    value, places = np.zeros((len(rows), 0, *site.grid.unit), dtype), None
    if units is None:
        places = np.zeros((len(rows), 0), np.int64)
    else:
        value = selections.by_selection(site.grid, units, share.own)
    marks = np.zeros(value.shape[:2], bool)
    return HostLeaf(
        grid=site.grid,
        counts=site.counts,
        path=site.path,
        key=_trees.leaf_key(seed, site.path, step),
        rows=rows,
        places=places,
        value=value,
        grad=np.zeros((0,), dtype),
        forward=marks,
        backward=marks,
    )


def indexed(
    numbers: np.ndarray, masks: LeafMasks, share: Share, recipe: Recipe
) -> Index:
    """A and B as a state keeps them, from what `selections.numbered` gives."""
    k_forward = len(masks.forward) // len(numbers)
    by_unit = recipe.layout == "block"
    return Index(share.place(numbers), share.grid, k_forward, by_unit)


def taken(units: np.ndarray, numbers: np.ndarray, share: Share) -> Array:
    """Some of [own, units, *unit], as packed parameters are stored."""
    return share.place(np.take_along_axis(units, wide(numbers, units), 1))


def wide(index: np.ndarray, units: np.ndarray) -> np.ndarray:
    """An index [slices, n] that take_along_axis can use on units with a shape."""
    return index.reshape(*index.shape, *(1 for _ in units.shape[2:])).astype(np.int64)


def state_of(
    recipe: Recipe,
    seed: Array,
    treedef: Any,
    indices: dict[int, Index],
    memory: dict[int, Any],
    theta: PyTree,
    shardings: PyTree = None,
) -> SparseState:
    """A state of step 0; `shardings` are of its inner state, where it lies on a mesh."""
    init = recipe.inner.init
    if shardings is not None:
        init = jax.jit(init, out_shardings=shardings)
    paths = [p.path for p in _trees.parameters(theta)[0]]
    reservoirs = {
        i: jnp.asarray(recipe.method_of(paths[i]).reservoir) for i in indices or memory
    }
    return SparseState(
        sparse_step=jnp.int32(0),
        sparse_seed=seed,
        sparse_masks=first_masks(recipe, seed, treedef, indices, theta),
        sparse_memory=tree_of(treedef, memory),
        sparse_reservoir=tree_of(treedef, reservoirs),
        leaks=jnp.int32(0),
        nonfinite_step=jnp.int32(-1),
        nonfinite_leaf=jnp.uint32(0),
        nonfinite_count=jnp.int32(0),
        sparse_inner=init(theta),
    )


def first_masks(
    recipe: Recipe, seed: Any, treedef: Any, indices: dict[int, Index], theta: PyTree
) -> Masks:
    """A, B and P of step 0."""
    flat = _trees.parameters(theta)[0]
    each = [indices.get(i) for i in range(len(flat))]
    drawn = draws(recipe, flat, each, seed, 0, [None] * len(flat))
    return Masks(*(tree_of(treedef, found) for found in (indices, {}, drawn)))


def draws(
    recipe: Recipe,
    flat: list[_trees.Parameter],
    indices: Sequence[Any],
    seed: Any,
    step: Any,
    stats: Sequence[Any],
) -> dict[int, Array]:
    """P of a step as `Masks` keeps it, -1 throughout where no refresh comes after it."""
    found = {}
    for i, index in enumerate(indices):
        method = recipe.method_of(flat[i].path) if isinstance(index, Index) else None
        if method is None or method.candidates is None:
            continue
        now = is_due(method, jnp.int32(1) + step)
        key = _trees.leaf_key(seed, flat[i].path, step)
        leaf = PackedLeaf(None, None, index, flat[i].path, key, stats=stats[i])
        made = functools.partial(method.candidates, leaf, (), step)
        nothing = jnp.full(jax.eval_shape(made).shape, -1, jnp.int32)
        turn = functools.partial(lambda made, _: made(), made)
        found[i] = faults.when(now, turn, nothing)
    return found
