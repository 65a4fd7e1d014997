"""Gradients of absent entries for the packed layouts, one parameter at a time."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from topkast_jax import _trees
from topkast_jax._types import PyTree
from topkast_jax.layouts.packed import Index, Probed, scatter
from topkast_jax.select import top_k

P: Any = PartitionSpec


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["index", "candidates", "grad"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Found:
    """What `probe` saw of one parameter.

    A method that reads the gradient of A alone (`tk.mest`) is content with that of the
    step: `Found(None, None, grad)`.

    Attributes:
      index: int32 [slices, c], units outside A of largest gradient, as many as A has.
      candidates: [slices, c, *unit], their gradients.
      grad: gradient of the packed values.
    """

    index: Any
    candidates: Any
    grad: Any


def probe(
    loss: Callable[..., Any], theta: PyTree, opt_state: optax.OptState, *args: Any
) -> PyTree:
    """The entries outside A whose gradient is largest, for `tk.refresh`.

    One compiled backward pass for each sparse parameter, with respect to a zero that is
    added to its alpha; so no more than one dense gradient exists at a time. Call it in
    the step before a refresh, with the parameters of that step: before the update.

    Args:
      loss: `loss(theta, opt_state, *args) -> scalar`, which sees theta through
        `tk.sparsify(theta, tk.masks(opt_state))`. It is compiled once for each
        parameter, and again where another function is given.
      theta: packed parameters.
      opt_state: from `tk.start` or an update.
      *args: the batch, and what else the loss needs.
    Returns:
      Tree like `theta`, a `Found` at each sparse leaf; hand it to `tk.refresh`.
    """
    masks = _trees.masks(opt_state)
    flat, treedef = _trees.parameters(theta)
    (state,) = _trees.find_states(opt_state)
    found: list[Found | None] = []
    for i, index in enumerate(treedef.flatten_up_to(masks.forward)):
        if not isinstance(index, Index):
            found.append(None)
            continue
        key = _trees.leaf_key(state.sparse_seed, flat[i].path, state.sparse_step + 1)
        one = probe_leaf(loss, i, theta, opt_state, index, key, args)
        one.grad.block_until_ready()  # so that two never overlap
        found.append(_readable(one, index))
    return treedef.unflatten(found)


def _readable(found: Found, index: Index) -> Found:
    """What was found, where every process can read its slices of it."""
    lies = index.index.sharding
    if lies.is_fully_addressable:
        return found
    everywhere = NamedSharding(lies.mesh, P())
    return Found(
        jax.device_put(found.index, everywhere),
        jax.device_put(found.candidates, everywhere),
        jax.device_put(found.grad, lies),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def probe_leaf(
    loss: Callable[..., Any],
    i: int,
    theta: PyTree,
    opt_state: optax.OptState,
    index: Index,
    key: jax.Array,
    args: tuple[Any, ...],
) -> Found:
    """The part of `probe` that is compiled: one parameter.

    Args:
      loss: as for `probe`.
      i: place of the parameter in the flattened tree.
      theta: packed parameters.
      opt_state: that belongs to them.
      index: of the parameter.
      key: for ties.
      args: passed on to the loss.
    """
    leaves, treedef = _trees.flatten(theta)
    grid = index.grid

    def of_leaf(values: Array, delta: Array) -> Any:
        changed = [*leaves[:i], Probed(values, delta), *leaves[i + 1 :]]
        return loss(treedef.unflatten(changed), opt_state, *args)

    zero = jnp.zeros(grid.shape, leaves[i].dtype)
    grad, dense = jax.grad(of_leaf, argnums=(0, 1))(leaves[i], zero)
    units = grid.to_units(dense)  # [slices, units, *unit]
    present = jnp.broadcast_to(index.in_forward, index.stored)
    absent = ~grid.of_entries(scatter(present, index))
    k = index.k_forward // grid.selections
    k = min(k, grid.size - k)
    array = grid.scores(jnp.abs(dense))
    chosen = top_k(array, k, grid.roles.within, absent, key)
    marks = chosen.reshape(len(units), -1)
    if grid.plain:
        marks = grid.to_units(chosen)
    count = k * grid.selections
    numbers = jax.vmap(lambda m: jnp.nonzero(m, size=count)[0])(marks)
    at = numbers.reshape(*numbers.shape, *(1 for _ in grid.unit))
    return Found(numbers.astype(jnp.int32), jnp.take_along_axis(units, at, 1), grad)
