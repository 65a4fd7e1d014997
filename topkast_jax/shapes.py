"""The shapes of packed arrays and of their state, without computing anything."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from topkast_jax import _trees
from topkast_jax import plan as plan_lib
from topkast_jax._types import LeafMasks, Masks, PyTree, SparseState
from topkast_jax.layouts.packed import Index
from topkast_jax.packing import first_masks, recipe_for, state_of
from topkast_jax.plan import Site
from topkast_jax.sets import tree_of, view


def shapes(
    tx: optax.GradientTransformation,
    params: PyTree,
    sizes: Mapping[str, tuple[int, int]] | None = None,
) -> tuple[PyTree, optax.OptState]:
    """Shapes of theta and opt_state, as `tk.start` makes them; nothing is computed.

    For compiling ahead of time, and for restoring a checkpoint.

    Args:
      tx: `tk.sparse(..., layout="packed")`.
      params: the dense parameters, or their shapes.
      sizes: `{path: (n_A, n_B)}` per slice where they are not those of the start, as
        after the `stop` of Top-KAST; see `tk.Index`.
    Returns:
      Trees of jax.ShapeDtypeStruct.
    Example:
      >>> import topkast_jax as tk
      >>> tx = tk.sparse(optax.adam(0.1), tk.static(0.9), layout="packed")
      >>> theta, opt_state = shapes(tx, {"kernel": jnp.ones((30, 10))})
      >>> theta["kernel"].shape
      (30,)
    """
    recipe = recipe_for(tx, "tk.shapes")
    flat, treedef = _trees.parameters(params)
    struct: Any = jax.ShapeDtypeStruct
    theta = [struct(jnp.shape(p.array), p.array.dtype) for p in flat]
    indices: dict[int, Index] = {}
    found = plan_lib.sites(recipe.method, recipe.axes, flat)
    dense = [theta[site.index] for site in found]
    if unknown := sorted(set(sizes or {}) - {site.path for site in found}):
        raise ValueError(f"tk.shapes: sizes for {unknown[0]!r}, which is not sparse")
    for site in found:
        each = site.grid.selections
        first, second = (each * k for k in site.counts)
        first, second = (sizes or {}).get(site.path, (first, second))
        shape = (*site.grid.stack, second)
        index = struct(shape, jnp.int32)
        indices[site.index] = Index(index, site.grid, first, recipe.layout == "block")
        theta[site.index] = struct((*shape, *site.grid.unit), theta[site.index].dtype)
    packed = treedef.unflatten(theta)

    def remembered(site: Site, value: Array) -> Any:
        """The memory of a method: of one form in every layout."""
        nothing = LeafMasks(*[jnp.zeros_like(value, bool)] * 2)
        seed = jnp.asarray(recipe.seed, jnp.uint32)
        return site.method.init(view(site, value, nothing, value, seed, 0))[1]

    def state(packed: PyTree) -> SparseState:
        seed = jnp.asarray(recipe.seed, jnp.uint32)
        memory = {
            site.index: remembered(site, jnp.zeros(shape.shape, shape.dtype))
            for site, shape in zip(found, dense, strict=True)
        }
        return state_of(recipe, seed, treedef, {}, memory, packed)

    def drawn() -> Any:
        seed = jnp.asarray(recipe.seed, jnp.uint32)
        return first_masks(recipe, seed, treedef, indices, packed).probe

    sets = (tree_of(treedef, indices), tree_of(treedef, {}), jax.eval_shape(drawn))
    masks = Masks(*sets)
    return packed, jax.eval_shape(state, packed)._replace(sparse_masks=masks)
