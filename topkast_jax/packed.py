"""Training with packed arrays: its update.

The device holds B alone, and so does the optimizer. What a method keeps beyond B, its
reservoir, lives in a `Store` in host memory. Masks change the arrays themselves, so a
refresh is a function of its own, between two updates: refresh.py; start.py makes the
first ones.
"""

from typing import Any

import jax.numpy as jnp
import optax

from topkast_jax import _trees, faults
from topkast_jax._types import PyTree, SparseState
from topkast_jax.layouts.packed import PackedLeaf
from topkast_jax.packing import draws, recipe_for
from topkast_jax.sets import statistics, tree_of
from topkast_jax.transformation import Recipe, Sparse


def transformation(recipe: Recipe) -> Sparse:
    """`tk.sparse` in the packed layout; its state comes from `tk.start`."""
    inner = recipe.inner

    def init_fn(params: PyTree) -> Any:
        del params
        raise ValueError(
            f"layout={recipe.layout!r} changes the arrays that are trained: begin with "
            "theta, opt_state, store = tk.start(tx, params), not with tx.init; nothing "
            "can enclose this transformation, so MultiSteps and the like go inside"
        )

    def update_fn(
        updates: PyTree,
        state: SparseState,
        params: PyTree = None,
        *,
        stats: PyTree = None,
        **extra: Any,
    ) -> tuple[PyTree, SparseState]:
        if params is None:
            raise ValueError("tk.sparse: update needs the parameters")
        flat, treedef = _trees.parameters(params)
        raw = treedef.flatten_up_to(updates)
        indices = treedef.flatten_up_to(state.sparse_masks.forward)
        memory = treedef.flatten_up_to(state.sparse_memory)
        step = state.sparse_step
        sparse = [i for i, index in enumerate(indices) if index is not None]
        methods = {i: recipe.method_of(flat[i].path) for i in sparse}
        given = statistics(methods.values(), treedef, stats)

        def leaf(i: int) -> PackedLeaf:
            path = flat[i].path
            key = _trees.leaf_key(state.sparse_seed, path, step)
            rate = recipe.rate(step)
            theta = jnp.asarray(flat[i].array)
            return PackedLeaf(
                theta, raw[i], indices[i], path, key, memory[i], rate, step=step
            )

        inward = list(raw)
        for i, method in methods.items():
            if method.observe is not None:
                memory[i] = method.observe(raw[i], memory[i], step)
            if method.penalty is not None:
                inward[i] = raw[i] + method.penalty(leaf(i)).astype(raw[i].dtype)
        outward, inner_state = inner.update(
            treedef.unflatten(inward), state.sparse_inner, params, **extra
        )
        u = treedef.flatten_up_to(outward)
        for i, method in methods.items():
            if method.adjust is not None:
                u[i] = method.adjust(u[i], leaf(i), memory[i])
        bad = jnp.stack([faults.count(g)[0] for g in raw])
        drawn = draws(recipe, flat, indices, state.sparse_seed, step + 1, given)
        masks = state.sparse_masks._replace(probe=tree_of(treedef, drawn))
        return treedef.unflatten(u), state._replace(
            sparse_step=jnp.asarray(optax.safe_increment(step)),
            sparse_masks=masks,
            sparse_memory=treedef.unflatten(memory),
            sparse_inner=inner_state,
            **faults.first_nonfinite(state, flat, bad),
        )

    return Sparse(init_fn, update_fn, recipe)


def due(tx: optax.GradientTransformation, step: int) -> bool:
    """Whether the masks change before step `step`: whether to call `tk.refresh` now.

    With a `refresh_delay` of d, `tk.choose` is to be called where this holds for step + d.

    Args:
      tx: `tk.sparse(..., layout="packed")`.
      step: number of updates made so far.
    """
    recipe = recipe_for(tx, "tk.due")
    schedule, begun = recipe.method.due, step - recipe.delay
    return schedule is not None and begun > 0 and bool(schedule(begun))
