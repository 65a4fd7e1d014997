"""Gradients of packed parameters over a mesh, each device with the rows that it has.

Left to itself, XLA sums the dense gradient of an expanded weight over the devices, and
gathers the weight in its dense form. Here both travel as they are stored. (`tk.probe` is
left to XLA: it asks for dense gradients, one parameter at a time.)
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import topkast_jax as tk
from experiments import mesh as meshes
from experiments.tasks import Task

PyTree = Any


def gradient(
    task: Task,
    shardings: PyTree,
    params: PyTree,
    opt_state: PyTree,
    carry: PyTree,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    zeros: PyTree,
) -> Any:
    """`((loss, (carry, aux)), (gradients, statistics))` of the task's loss.

    Args:
      task: gives the loss, a mean over what counts in the batch, and that count.
      shardings: of the parameters.
      params: packed, cut as `shardings` says.
      opt_state: holds the masks, cut likewise.
      carry: cut by rows.
      batch: cut by rows.
      key: for dropout and signs; every device draws its own.
      zeros: from `tk.taps`; their gradients are the statistics.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    cut = tk.sharding_specs(shardings, meshes.AXES)
    masks = tk.masks(opt_state)
    of_state = tk.state_shardings(opt_state, params, shardings, meshes.replicated(mesh))
    cut_masks = tk.sharding_specs(tk.masks(of_state), meshes.AXES)

    def local(
        params: PyTree, masks: Any, carry: PyTree, batch: Any, key: Any, zeros: PyTree
    ) -> Any:
        own = jax.random.fold_in(key, jax.lax.axis_index(meshes.AXES))
        count = _count(task, batch)
        share = count / jax.lax.psum(count, meshes.AXES)

        def objective(params: PyTree, zeros: PyTree) -> Any:
            whole, everywhere = tk.gather_groups(params, masks, shardings, meshes.AXES)
            weights = tk.sparsify(whole, everywhere, expanded=not task.by_unit)
            weights = tk.tap(weights, zeros, own)
            loss, (new, aux) = task.loss(weights, carry, batch, own)
            return loss * share, (new, jax.tree.map(lambda x: x * share, aux))

        both = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
        (loss, (new, aux)), (found, stats) = both(params, zeros)
        found = tk.reduce_gradients(found, shardings, meshes.AXES)
        return (*jax.lax.psum((loss, aux, stats), meshes.AXES), new, found)

    loss, aux, stats, carry, found = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(cut, cut_masks, _rows(carry), _rows(batch), P(), P()),
        out_specs=(P(), P(), P(), _rows(carry), cut),
        check_vma=False,
    )(params, masks, carry, batch, key, zeros)
    return (loss, (carry, aux)), (found, stats)


def _rows(tree: PyTree) -> PyTree:
    """Specs of arrays that are cut by rows; scalars are everywhere."""
    rows: Any = P(meshes.AXES)
    return jax.tree.map(lambda x: rows if x.ndim else P(), tree)


def _count(task: Task, batch: Mapping[str, jax.Array]) -> jax.Array:
    if task.count is not None:
        return task.count(batch)
    return jnp.float32(len(jax.tree.leaves(batch)[0]))
