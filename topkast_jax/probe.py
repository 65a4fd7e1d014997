"""Gradients of absent entries for the packed layouts.

Of all of them, one parameter at a time, where a method asks for the largest; of a few
that it has drawn, all parameters at once, as entries of B that are zero: a product by
units makes nothing dense of them, and one that expands a layer's gradient at a time.
"""

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
    data_fields=["index", "candidates", "grad", "seen"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Found:
    """What `probe` saw of one parameter.

    A method that reads the gradient of A alone (`tk.mest`) is content with that of the
    step: `Found(None, None, grad)`.

    Attributes:
      index: int32 [slices, c], units outside A: those of largest gradient, as many as A
        has; or those that the method has drawn, filled up with others.
      candidates: [slices, c, *unit], their gradients.
      grad: gradient of the packed values.
      seen: bool [slices, c], which of them were drawn; None: all count.
    """

    index: Any
    candidates: Any
    grad: Any
    seen: Any = None


def probe(
    loss: Callable[..., Any], theta: PyTree, opt_state: optax.OptState, *args: Any
) -> PyTree:
    """Gradients of entries outside A, for `tk.refresh`.

    Of those where it is largest: one compiled backward pass for each sparse parameter,
    with respect to a zero that is added to its alpha; so no more than one dense gradient
    exists at a time. Of those that the method has drawn (`tk.gse`): one pass for all
    parameters, in which they are entries of B with the value zero. Call it in the step
    before a refresh, with the parameters of that step: before the update.

    Args:
      loss: `loss(theta, opt_state, *args) -> scalar`, which sees theta through
        `tk.sparsify(theta, tk.masks(opt_state))`. It is compiled once for each
        parameter (once in all for drawn entries), and again where another function is
        given.
      theta: packed parameters.
      opt_state: from `tk.start` or an update.
      *args: the batch, and what else the loss needs.
    Returns:
      Tree like `theta`, a `Found` at each sparse leaf; hand it to `tk.refresh`.
    """
    masks = _trees.masks(opt_state)
    flat, treedef = _trees.parameters(theta)
    (state,) = _trees.find_states(opt_state)
    found: list[Found | None] = [None] * len(flat)
    drawn = treedef.flatten_up_to(masks.probe)
    indices = treedef.flatten_up_to(masks.forward)
    if any(numbers is not None for numbers in drawn):
        some = probe_candidates(loss, theta, opt_state, args)
        found = treedef.flatten_up_to(some)
    for i, index in enumerate(indices):
        if not isinstance(index, Index) or drawn[i] is not None:
            continue
        key = _trees.leaf_key(state.sparse_seed, flat[i].path, state.sparse_step + 1)
        one = probe_leaf(loss, i, theta, opt_state, index, key, args)
        one.grad.block_until_ready()  # so that two never overlap
        found[i] = one
    readable = [
        None if one is None else _readable(one, index)
        for one, index in zip(found, indices, strict=True)
    ]
    return treedef.unflatten(readable)


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
        None if found.seen is None else jax.device_put(found.seen, everywhere),
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


@functools.partial(jax.jit, static_argnums=0)
def probe_candidates(
    loss: Callable[..., Any],
    theta: PyTree,
    opt_state: optax.OptState,
    args: tuple[Any, ...],
) -> PyTree:
    """The part of `probe` that is compiled, for methods that draw candidates.

    Args:
      loss: as for `probe`.
      theta: packed parameters.
      opt_state: that belongs to them, with what was drawn.
      args: passed on to the loss.
    Returns:
      As `probe`.
    """
    flat, treedef = _trees.flatten(theta)
    (state,) = _trees.find_states(opt_state)
    indices = treedef.flatten_up_to(state.sparse_masks.forward)
    drawn = treedef.flatten_up_to(state.sparse_masks.probe)
    added = {
        i: _outside(index, drawn[i])
        for i, index in enumerate(indices)
        if isinstance(index, Index) and drawn[i] is not None
    }
    wider, longer = list(indices), list(flat)
    for i, (numbers, _) in added.items():
        stack = indices[i].grid.stack
        shaped = numbers.reshape(*stack, -1)
        axis = len(stack)
        listed = jnp.concatenate([indices[i].index, shaped], axis)
        wider[i] = dataclasses.replace(indices[i], index=listed)
        zeros = jnp.zeros((*shaped.shape, *indices[i].grid.unit), flat[i].dtype)
        longer[i] = jnp.concatenate([flat[i], zeros], axis)
    masks = state.sparse_masks._replace(forward=treedef.unflatten(wider))
    seeing = _trees.replace_state(opt_state, state._replace(sparse_masks=masks))

    def of_added(some: dict[int, Array]) -> Any:
        leaves = [some.get(i, leaf) for i, leaf in enumerate(longer)]
        return loss(treedef.unflatten(leaves), seeing, *args)

    grads = jax.grad(of_added)({i: longer[i] for i in added})
    found: list[Found | None] = [None] * len(flat)
    for i, (numbers, seen) in added.items():
        grid, n = indices[i].grid, indices[i].index.shape[-1]
        own, others = jnp.split(grads[i], [n], axis=len(grid.stack))
        others = others.reshape(*numbers.shape, *grid.unit)
        found[i] = Found(numbers, others, own, seen)
    return treedef.unflatten(found)


def _outside(index: Index, drawn: Array) -> tuple[Array, Array]:
    """Distinct units outside A: those drawn, then others, to a fixed number.

    Args:
      index: with A = B.
      drawn: [*stack, c] numbers by selection, repeated, in A, or -1.
    Returns:
      int32 [slices, c'] by selection, and which of them were drawn.
    """
    grid = index.grid
    slices, each = grid.whole[0], grid.selections
    kept, drawn = (x.reshape(slices, each, -1) for x in (index.index, drawn))
    count = min(drawn.shape[-1], grid.size - kept.shape[-1])
    where = jnp.where(drawn < 0, grid.size, grid.within_selections(drawn))
    choose = functools.partial(_distinct, count=count, size=grid.size)
    positions, seen = jax.vmap(jax.vmap(choose))(grid.within_selections(kept), where)
    numbers = grid.of_selections(positions).reshape(slices, -1)
    return numbers.astype(jnp.int32), seen.reshape(slices, -1)


def _distinct(kept: Array, drawn: Array, count: int, size: int) -> tuple[Array, Array]:
    """`_outside` in one selection: positions [count], and which were drawn."""
    kept, drawn = jnp.sort(kept), jnp.sort(drawn)
    first = jnp.concatenate([jnp.ones(1, bool), drawn[1:] != drawn[:-1]])
    real = first & (drawn < size) & ~_contains(kept, drawn)
    # Among so many there are `count` that are neither kept nor drawn.
    others = jnp.arange(min(size, len(kept) + count), dtype=drawn.dtype)
    free = ~_contains(kept, others) & ~_contains(drawn, others)
    pool = jnp.concatenate([drawn, others])
    order = jnp.argsort(~jnp.concatenate([real, free]), stable=True)
    return pool[order[:count]], jnp.arange(count) < jnp.sum(real)


def _contains(members: Array, x: Array) -> Array:
    """Which of x are in a sorted list."""
    at = jnp.searchsorted(members, x)
    return members[jnp.minimum(at, len(members) - 1)] == x
