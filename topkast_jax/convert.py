"""A trained state from one layout into another."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from topkast_jax import _trees, forward
from topkast_jax import plan as plan_lib
from topkast_jax._trees import Parameter
from topkast_jax._types import LeafMasks, PyTree, SparseState
from topkast_jax.layouts import selections
from topkast_jax.layouts import share as shares
from topkast_jax.layouts import store as stores
from topkast_jax.layouts.packed import Index
from topkast_jax.layouts.store import Folder, Store
from topkast_jax.packing import indexed, state_of, taken, wide
from topkast_jax.transformation import Recipe, recipe_of


def convert(
    tx: optax.GradientTransformation,
    params: PyTree,
    opt_state: optax.OptState,
    store: Store | None = None,
    reservoir: Folder | None = None,
) -> tuple[PyTree, optax.OptState, Store]:
    """Moves parameters and optimizer state into the layout of another transformation.

    Masks, step, seed, moments and, where both keep it, the reservoir are the same after
    it. What a layout has no place for is lost, or begins as `inner.init` makes it:
    moments off B, and factored ones.

    Args:
      tx: `tk.sparse(...)` of the layout to move to, else made as the one that trained.
      params: of any layout.
      opt_state: that belongs to them.
      store: the reservoir, if they are packed.
      reservoir: folder of files in which the new reservoir is to live; None: in memory.
    Returns:
      params, opt_state and store for `tx`; an empty store in the masked layout.
    Raises:
      ValueError: another method, masks that are chosen and not yet in force, or
        parameters over several processes.
    Example:
      >>> import topkast_jax as tk
      >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]])}
      >>> method = tk.top_kast(0.5, 0.25)
      >>> masked, packed = (
      ...     tk.sparse(optax.adam(0.1), method, layout=layout)
      ...     for layout in ("masked", "packed")
      ... )
      >>> theta, state, store = convert(packed, params, masked.init(params))
      >>> theta["kernel"].tolist()
      [3.0, -4.0, -2.0]
      >>> convert(masked, theta, state, store)[0]["kernel"].tolist()
      [[1.0, -2.0], [3.0, -4.0]]
    """
    recipe = recipe_of(tx, "tk.convert")
    for p in _trees.parameters(params)[0]:
        if not getattr(p.array, "is_fully_addressable", True):
            raise ValueError(
                f"tk.convert: {p.path!r} lies on devices of several processes; save a "
                "checkpoint, and convert it in one process"
            )
    states = _trees.find_states(opt_state)
    if len(states) != 1:
        raise ValueError(f"tk.convert: {len(states)} states of tk.sparse, not one")
    (state,) = states
    kept = jax.tree_util.tree_flatten_with_path(state.sparse_reservoir)[0]
    if any(
        bool(there) != recipe.method_of(_trees.path_name(keys)).reservoir
        for keys, there in kept
    ):
        raise ValueError(
            f"tk.convert: {recipe.method.name} is not the method that trained: one of "
            "both keeps a reservoir"
        )
    _require_settled(state)
    if recipe.layout != "masked" and _is_packed(state):
        here = store or Store()
        if reservoir is None or here.folder == pathlib.Path(reservoir):
            return params, _multiplied(opt_state, state, recipe), here
    dense, masked = _dense(recipe, params, state, store)
    if recipe.layout == "masked":
        return dense, _trees.replace_state(opt_state, masked), Store()
    theta, packed, new = _packed(recipe, dense, masked, reservoir)
    return theta, _trees.replace_state(opt_state, packed), new


def _is_packed(state: SparseState) -> bool:
    nodes = jax.tree.leaves(state.sparse_masks.forward, is_leaf=_is_index)
    return any(map(_is_index, nodes))


def _is_index(node: Any) -> bool:
    return isinstance(node, Index)


def _multiplied(opt_state: PyTree, state: SparseState, recipe: Recipe) -> PyTree:
    """Packed and block store the same: nothing moves but what the lists say of it."""
    by_unit = recipe.layout == "block"

    def one(node: Any) -> Any:
        return (
            dataclasses.replace(node, multiplied=by_unit) if _is_index(node) else node
        )

    forward = jax.tree.map(one, state.sparse_masks.forward, is_leaf=_is_index)
    masks = state.sparse_masks._replace(forward=forward)
    return _trees.replace_state(opt_state, state._replace(sparse_masks=masks))


def _require_settled(state: SparseState) -> None:
    coming = state.sparse_next
    if coming is None:
        return
    pairs = zip(
        jax.tree.leaves(state.sparse_masks[:2]),
        jax.tree.leaves(coming[:2]),
        strict=True,
    )
    if any((np.asarray(one) != np.asarray(two)).any() for one, two in pairs):
        raise ValueError(
            "tk.convert: masks are chosen that are not yet in force (refresh_delay), "
            "and would be lost; go on until they are"
        )


def _dense(
    recipe: Recipe, params: PyTree, state: SparseState, store: Store | None
) -> tuple[PyTree, SparseState]:
    """Parameters and state of the masked layout."""
    flat, treedef = _trees.parameters(params)
    indices = treedef.flatten_up_to(state.sparse_masks.forward)
    if not any(map(_is_index, indices)):
        return params, state
    leaves = []
    for p, index in zip(flat, indices, strict=True):
        if not isinstance(index, Index):
            leaves.append(p.array)
            continue
        grid = index.grid
        units = np.zeros((grid.whole[0], grid.count, *grid.unit), p.array.dtype)
        if recipe.method_of(p.path).reservoir:
            own = shares.whole(grid).of
            units = np.array((store or Store()).array(p.path, units.shape, own))
        leaves.append(jnp.asarray(_put(units, p.array, index)))
    dense = treedef.unflatten(leaves)
    nothing = treedef.unflatten([None] * len(flat))
    settled = forward.dense_masks(state)._replace(probe=nothing, shrink=nothing)
    drawn = treedef.flatten_up_to(state.sparse_masks.probe)
    probes: list[Any] = [None] * len(flat)
    for i, index in enumerate(indices):
        method = None if index is None else recipe.method_of(flat[i].path)
        if method is not None and method.probe:
            due = method.due is not None and method.due(int(state.sparse_step) + 1)
            probes[i] = jnp.asarray(bool(due) or method.probe == "always")
            if method.candidates is not None:
                probes[i] = forward.listed(index, drawn[i])
    sparse = settled._replace(probe=treedef.unflatten(probes))

    def slot(old: Any, new: Any, index: Index) -> Any:
        grid = index.grid
        return jnp.asarray(_put(np.array(grid.to_units(np.asarray(new))), old, index))

    inner = _inner(
        recipe, state.sparse_inner, flat, dense, dict(enumerate(indices)), slot
    )
    return dense, state._replace(
        sparse_masks=sparse,
        sparse_inner=inner,
        sparse_next=settled if recipe.delay else None,
    )


def _packed(
    recipe: Recipe, dense: PyTree, state: SparseState, folder: Folder | None
) -> tuple[PyTree, SparseState, Store]:
    """theta, state and store of a packed layout, from the masked one."""
    flat, treedef = _trees.parameters(dense)
    forward_, backward = (treedef.flatten_up_to(t) for t in state.sparse_masks[:2])
    store = stores.create(folder if recipe.method.reservoir else None)
    theta: list[Any] = [p.array for p in flat]
    indices: dict[int, Index] = {}
    for site in plan_lib.sites(recipe.method, recipe.axes, flat):
        i = site.index
        pair = (np.asarray(m[i]) for m in (forward_, backward))
        sets = LeafMasks(*(selections.set_of(site.grid, mask) for mask in pair))
        share = shares.whole(site.grid)
        numbers = selections.numbered(site.grid, sets, len(share.own))
        indices[i] = indexed(numbers, sets, share, recipe)
        units = site.grid.to_units(np.asarray(flat[i].array))
        if site.method.reservoir:
            units = stores.add(store, site.path, units)
        theta[i] = taken(units, numbers, share)
    packed = treedef.unflatten(theta)

    def slot(old: Any, new: Any, index: Index) -> Any:
        del new
        numbers = np.asarray(index.index).reshape(index.grid.whole[0], -1)
        units = index.grid.to_units(np.asarray(old))
        moved = np.take_along_axis(units, wide(numbers, units), 1)
        return jnp.asarray(moved.reshape(index.stored))

    inner = _inner(recipe, state.sparse_inner, flat, packed, indices, slot)
    memory = dict(enumerate(treedef.flatten_up_to(state.sparse_memory)))
    made = state_of(recipe, state.sparse_seed, treedef, indices, memory, packed)
    masks = made.sparse_masks
    if jax.tree.leaves(masks.probe):
        trees = (masks.forward, state.sparse_masks.probe, masks.probe)
        rows = zip(*map(treedef.flatten_up_to, trees), strict=True)
        probe = [None if row[2] is None else _numbers(*row) for row in rows]
        masks = masks._replace(probe=treedef.unflatten(probe))
    return (
        packed,
        state._replace(sparse_masks=masks, sparse_inner=inner, sparse_next=None),
        store,
    )


def _numbers(index: Index, mask: Any, like: Any) -> Any:
    """A mask of units as numbers [*stack, c] by selection, the rest -1."""
    grid = index.grid
    units = grid.to_units(np.asarray(mask))
    slices, at = np.nonzero(units[(..., *(0 for _ in grid.unit))])
    row = slices * grid.selections + grid.selection_of(at)
    order = np.argsort(row, kind="stable")
    row, at = row[order], at[order]
    rows = grid.whole[0] * grid.selections
    found = np.full((rows, like.size // rows), -1, np.int32)
    found[row, np.arange(len(row)) - np.searchsorted(row, row)] = at
    return jnp.asarray(found.reshape(like.shape))


def _put(units: np.ndarray, values: Any, index: Index) -> np.ndarray:
    """Units with the packed values in their places, in the shape of the parameter."""
    grid = index.grid
    numbers = np.asarray(index.index).reshape(grid.whole[0], -1)
    shaped = np.asarray(values).reshape(*numbers.shape, *grid.unit)
    np.put_along_axis(units, wide(numbers, units), shaped, axis=1)
    return np.asarray(grid.from_units(units))


def _inner(
    recipe: Recipe,
    state: PyTree,
    flat: list[Parameter],
    params: PyTree,
    indices: dict[int, Any],
    slot: Any,
) -> PyTree:
    """State of the inner optimizer for other parameters: slots by `slot(old, new, index)`.

    What is no slot stays as it is where its shape does, and else begins anew.
    """
    fresh = recipe.inner.init(params)
    leaves, treedef = _trees.flatten(state)
    news = treedef.flatten_up_to(fresh)
    owners = _trees.slots(state, flat)
    out = []
    for old, new, owner in zip(leaves, news, owners, strict=True):
        index = None if owner is None else indices.get(owner)
        if isinstance(index, Index):
            out.append(slot(old, new, index))
        else:
            out.append(old if jnp.shape(old) == jnp.shape(new) else new)
    return treedef.unflatten(out)
