"""The start of training with packed arrays: what is made of dense parameters."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from topkast_jax import _trees
from topkast_jax import plan as plan_lib
from topkast_jax._types import PyTree, SparseState
from topkast_jax.layouts import selections
from topkast_jax.layouts import share as shares
from topkast_jax.layouts import store as stores
from topkast_jax.layouts.packed import Index
from topkast_jax.layouts.share import Share
from topkast_jax.layouts.store import Store
from topkast_jax.moments import require_slots
from topkast_jax.packing import host_leaf, indexed, recipe_for, state_of, taken
from topkast_jax.sharding import packed_sharding, state_shardings

P: Any = PartitionSpec


def fan_in_normal(key: jax.Array, index: Index, dtype: Any) -> Array:
    """Normal draws of variance 1 / inputs, the dense layer's; see `tk.start`.

    Args:
      key: PRNG key.
      index: which units are drawn; `index.stored` is the shape to return.
      dtype: of the values.
    """
    scale = index.grid.matrix_shape[0] ** -0.5
    return scale * jax.random.normal(key, index.stored, dtype)


def start(
    tx: optax.GradientTransformation,
    params: PyTree,
    initial: Callable[[jax.Array, Index, Any], Array] = fan_in_normal,
    reservoir: str | os.PathLike[str] | None = None,
    shardings: PyTree = None,
) -> tuple[PyTree, optax.OptState, Store]:
    """Packs parameters: what is trained, its optimizer state, and the reservoir.

    Packed parameters have fewer axes than dense ones. Masks and labels of the inner
    optimizer that go by `ndim` (which weights decay) must be made from the dense ones.

    With several processes, all of them call it, and say where the dense parameters would
    lie. Each then makes its own shards, selects in the slices that its devices hold, and
    keeps their theta; what is returned lies over all devices.

    Args:
      tx: `tk.sparse(..., layout="packed")`.
      params: the dense parameters, arrays of NumPy or JAX; or a function without
        arguments that makes them under jit, whose leaves are then made one at a time,
        so that they never exist all together. Without a reservoir a sparse leaf may be
        a jax.ShapeDtypeStruct: nothing as large as it is made, here or later.
      initial: `(key, index, dtype) -> values` of sparse leaves that are only shapes.
      reservoir: folder of files that are mapped into memory, for a theta larger than
        that; None keeps it in memory. A reservoir that is there is overwritten. Each of
        several processes has a folder of its own inside.
      shardings: tree of NamedSharding that the dense parameters would have; None leaves
        theta wherever JAX puts it, or takes those of parameters over several processes.
    Returns:
      theta: tree like `params`, sparse leaves [*stack, k_B] in place of dense arrays.
      opt_state: the state that `tx.update` takes.
      store: theta in host memory, for methods with a reservoir.
    Raises:
      ValueError: another layout, a shape where values are needed, shardings that cut a
        parameter elsewhere than between its groups, or as `tx.init`.
    Example:
      >>> import topkast_jax as tk
      >>> tx = tk.sparse(optax.adam(0.1), tk.top_kast(0.5, 0.25), layout="packed")
      >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]])}
      >>> theta, opt_state, store = tk.start(tx, params)
      >>> theta["kernel"].tolist()  # A, then the rest of B
      [3.0, -4.0, -2.0]
    """
    recipe = recipe_for(tx, "tk.start")
    shapes = jax.eval_shape(params) if callable(params) else params
    flat, treedef = _trees.parameters(shapes)
    found = plan_lib.sites(recipe.method, recipe.axes, flat)
    sites = {site.index: site for site in found}
    seed = jnp.asarray(recipe.seed, jnp.uint32)
    theta: list[Any] = []
    indices: dict[int, Index] = {}
    memory: dict[int, Any] = {}
    if reservoir is not None:
        reservoir = stores.of_process(reservoir)
    store = stores.create(reservoir if recipe.method.reservoir else None)
    lies = _dense_shardings(flat, treedef, shardings)
    for i, parameter in enumerate(flat):
        dense = parameter.array
        if callable(params):
            dense = _made(params, treedef, i, lies[i])
        only_shape = isinstance(dense, jax.ShapeDtypeStruct)
        if only_shape and (i not in sites or sites[i].method.reservoir):
            why = "the reservoir keeps them" if i in sites else "it is kept dense"
            raise ValueError(
                f"{parameter.path!r} is only a shape, but its values are needed: {why}"
            )
        if i not in sites:
            placed = (
                jnp.asarray(dense) if lies[i] is None else shares.put(dense, lies[i])
            )
            theta.append(placed)
            continue
        site, share = sites[i], shares.whole(sites[i].grid)
        if lies[i] is not None:
            share = shares.of(site.grid, packed_sharding(site.path, site.grid, lies[i]))
        units = None if only_shape else share.units(dense, lies[i])
        if site.method.reservoir and units is not None:
            units = stores.add(store, site.path, units, share.of)
        del dense
        leaf = host_leaf(site, seed, 0, units, share, parameter.array.dtype)
        masks, own = site.method.init(leaf)
        memory[i] = jax.tree.map(jnp.asarray, own)
        numbers = selections.numbered(site.grid, masks, len(share.own))
        indices[i] = indexed(numbers, masks, share, recipe)
        if units is None:
            key = jax.random.fold_in(leaf.key, _INITIAL)
            theta.append(_drawn(initial, key, indices[i], leaf.value.dtype, share))
        else:
            theta.append(taken(units, numbers, share))
    packed = treedef.unflatten(theta)
    require_slots(recipe, shapes, packed, [flat[i] for i in sites])

    def state(packed: PyTree) -> SparseState:
        return state_of(recipe, seed, treedef, indices, memory, packed)

    if not any(lies):
        return packed, state(packed), store
    everywhere = NamedSharding(lies[0].mesh, P())
    of_theta = jax.tree.map(lambda x: x.sharding, packed)
    abstract = jax.eval_shape(state, packed)
    of_state = state_shardings(abstract, packed, of_theta, everywhere)
    inner = of_state.sparse_inner
    made = state_of(recipe, seed, treedef, indices, memory, packed, inner)
    return packed, jax.tree.map(_put_unless_there, made, of_state), store


def _put_unless_there(x: Any, sharding: Any) -> Any:
    there = isinstance(x, jax.Array) and x.sharding == sharding
    return x if there else shares.put(x, sharding)


def _dense_shardings(
    flat: list[_trees.Parameter], treedef: Any, shardings: PyTree
) -> list[Any]:
    """NamedSharding of every dense parameter, None for each where none were given."""
    lie = [getattr(p.array, "sharding", None) for p in flat]
    if shardings is not None:
        lie = treedef.flatten_up_to(shardings)
    elif all(getattr(p.array, "is_fully_addressable", True) for p in flat):
        return [None] * len(flat)
    for p, sharding in zip(flat, lie, strict=True):
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"tk.start: the sharding of {p.path!r} is {sharding}, which tells of no "
                "mesh; give every parameter a jax.sharding.NamedSharding of one mesh"
            )
    return lie


_INITIAL = 2**32 - 2
"""Folded into a leaf's key for initial values; no slice has this number."""


def _drawn(
    initial: Callable[[jax.Array, Index, Any], Array],
    key: jax.Array,
    index: Index,
    dtype: Any,
    share: Share,
) -> Array:
    """Initial values, made where they will lie; no mesh changes them."""
    if share.sharding is None:
        return initial(key, index, dtype)

    def make(key: jax.Array, index: Index) -> Array:
        return initial(key, index, dtype)

    return jax.jit(make, out_shardings=share.sharding)(key, index)


def _made(make: Callable[[], PyTree], treedef: Any, i: int, sharding: Any) -> Any:
    """Leaf `i` of the tree that `make` makes; XLA leaves out all the others."""

    def leaf() -> Any:
        return treedef.flatten_up_to(make())[i]

    if sharding is None:
        return np.asarray(jax.jit(leaf)())
    return jax.jit(leaf, out_shardings=sharding)()
