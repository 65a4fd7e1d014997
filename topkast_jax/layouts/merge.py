"""Groups that one device holds together, as the one matrix that they are parts of."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from topkast_jax._types import Masks, PyTree
from topkast_jax.layouts.packed import Index


def merge_groups(theta: PyTree, masks: Masks) -> tuple[PyTree, Masks]:
    """Packed parameters of several groups as parameters of one.

    Products work group by group, so that devices which hold different groups compute
    their own; the gradient of the activations is then one array for every group before
    they are summed. A device that holds all groups, after `gather_groups`, saves those
    arrays: with 256 groups they are 256 times the activations.

    For a step's products, not for `tk.refresh`: within a list units are by group. What
    cannot be merged is passed on: fan-in and windows that are cut along the inputs, axes
    in another order than inputs before outputs.

    Args:
      theta: packed parameters.
      masks: theirs.
    Returns:
      theta and masks, differentiable in theta.
    Example:
      >>> import optax, topkast_jax as tk
      >>> method = tk.static(0.5, structure=tk.groups_of(2))
      >>> tx = tk.sparse(optax.sgd(0.1), method, layout="packed")
      >>> theta, state, _ = tk.start(tx, {"kernel": jnp.arange(1.0, 9).reshape(2, 4)})
      >>> whole, masks = merge_groups(theta, tk.masks(state))
      >>> theta["kernel"].shape, whole["kernel"].shape
      ((2, 2), (4,))
      >>> bool((tk.sparsify(whole, masks)["kernel"] == tk.export(theta, state)["kernel"]).all())
      True
    """
    flat = jax.tree.leaves(theta)
    treedef: Any = jax.tree.structure(theta)
    forward = treedef.flatten_up_to(masks.forward)
    for i, index in enumerate(forward):
        if isinstance(index, Index) and _mergeable(index):
            flat[i] = _joined(flat[i], index)
            forward[i] = _merged(index)
    return treedef.unflatten(flat), masks._replace(forward=treedef.unflatten(forward))


def _mergeable(index: Index) -> bool:
    grid = index.grid
    axes, structure = grid.axes, grid.structure
    ordered = axes.within == (*axes.window, *axes.inputs, *axes.outputs)
    whole = math.prod(grid.units[1:]) * structure.parts < 2**31
    along_inputs = structure.along == "inputs"
    apart = along_inputs and (bool(axes.window) or structure.scope == "column")
    return structure.parts > 1 and whole and not apart and (ordered or not grid.plain)


def _joined(x: Array, index: Index) -> Array:
    """[*stack, parts, n, ...] as [*stack, parts * n, ...], A of all groups first."""
    at = index.index.ndim - 2
    parts = [
        jax.lax.slice_in_dim(x, begin, end, axis=at + 1)
        for begin, end in ((0, index.k_forward), (index.k_forward, x.shape[at + 1]))
    ]
    flat = [p.reshape(*p.shape[:at], -1, *p.shape[at + 2 :]) for p in parts]
    return jnp.concatenate(flat, axis=at)


def _merged(index: Index) -> Index:
    grid = index.grid
    structure = grid.structure
    _, *rows, columns = grid.units if not grid.plain else (0, *grid.whole[1:])
    height = math.prod(rows)
    group: Any = jnp.arange(structure.parts, dtype=jnp.int32)[:, None]
    row, column = index.index // columns, index.index % columns
    if structure.along == "inputs":
        numbers = (row + group * height) * columns + column
    else:
        numbers = row * (columns * structure.parts) + group * columns + column
    return Index(
        _joined(numbers, index),
        dataclasses.replace(grid, structure=structure._replace(parts=1)),
        index.k_forward * structure.parts,
        index.multiplied,
    )
