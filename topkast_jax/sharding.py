"""Masks, packed arrays and optimizer state sharded like the weights they belong to.

A dense or masked weight is cut by XLA wherever its sharding says. A packed one is a list,
which is cut between the groups of its structure (`tk.groups_of`) and nowhere else. XLA
would sum and gather it in its dense form; `gather_groups` and `reduce_gradients`, inside
`jax.shard_map`, move what is stored instead.
"""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from topkast_jax import _trees
from topkast_jax._types import Masks, PyTree
from topkast_jax.grid import Grid
from topkast_jax.layouts import share as shares
from topkast_jax.layouts.packed import Index

P: Any = PartitionSpec
lax: Any = jax.lax


def state_shardings(
    abstract_state: PyTree, params: PyTree, shardings: PyTree, default: Any
) -> PyTree:
    """Shardings of any optimizer state, from those of the parameters.

    A leaf of the state whose key path ends with a parameter's key path and whose shape
    agrees (moments, masks, memory) takes that parameter's sharding, and so do the
    positions of a packed one; the rest (counts, factored moments) takes `default`.

    Args:
      abstract_state: the state, or `jax.eval_shape(tx.init, params)`.
      params: the parameters, or their shapes; packed ones in packed layouts.
      shardings: tree of shardings like `params`.
      default: sharding of all else, as a rule replicated.
    Returns:
      Tree of shardings like `abstract_state`.
    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> state = optax.adam(0.1).init(params)
      >>> state_shardings(state, params, {"kernel": "by rows"}, "everywhere")[0].mu
      {'kernel': 'by rows'}
    """
    flat, treedef = _trees.parameters(params)
    of_params = treedef.flatten_up_to(shardings)
    owners = _trees.slots(abstract_state, flat)
    found = jax.tree.unflatten(
        jax.tree.structure(abstract_state),
        [default if owner is None else of_params[owner] for owner in owners],
    )
    # The positions of packed parameters lie like their values.
    states = _trees.find_states(abstract_state)
    nodes = [treedef.flatten_up_to(s.sparse_masks.forward) for s in states]
    if not any(isinstance(node, Index) for each in nodes for node in each):
        return found
    forward = [
        _of_positions(node, sharding) if isinstance(node, Index) else None
        for node, sharding in zip(nodes[0], of_params, strict=True)
    ]
    (own,) = _trees.find_states(found)
    masks = own.sparse_masks._replace(forward=treedef.unflatten(forward))
    return _trees.replace_state(found, own._replace(sparse_masks=masks))


def packed_shardings(masks: Masks, shardings: PyTree) -> PyTree:
    """Shardings of packed parameters, from those that the dense ones would have.

    Args:
      masks: `tk.masks(opt_state)`, also of shapes alone.
      shardings: tree of NamedSharding for the dense parameters.
    Returns:
      Tree of NamedSharding: stack axes as they were, groups where the axis that they
      cut was cut.
    Raises:
      ValueError: a packed parameter that is cut along another axis than its groups
        are, or into a number of pieces that does not divide theirs.
    Example:
      >>> import jax.numpy as jnp, optax, topkast_jax as tk
      >>> method = tk.static(0.9, structure=tk.groups_of(4))
      >>> tx = tk.sparse(optax.sgd(0.1), method, layout="packed")
      >>> _, opt_state, _ = tk.start(tx, {"kernel": jnp.ones((8, 8))})
      >>> mesh = jax.make_mesh((1,), ("fsdp",))
      >>> dense = {"kernel": NamedSharding(mesh, P(None, "fsdp"))}
      >>> packed_shardings(tk.masks(opt_state), dense)["kernel"].spec
      P('fsdp', None)
    """

    def one(keys: Any, index: Any, sharding: NamedSharding) -> NamedSharding:
        if not isinstance(index, Index):
            return sharding
        return packed_sharding(_trees.path_name(keys), index.grid, sharding)

    return jax.tree_util.tree_map_with_path(
        one, masks.forward, shardings, is_leaf=lambda x: x is None or _is_index(x)
    )


def packed_sharding(path: str, grid: Grid, sharding: NamedSharding) -> NamedSharding:
    """`packed_shardings` of one parameter."""
    spec = _packed_spec(path, grid, sharding)
    nothing = (None,) * (1 + len(grid.unit))
    return NamedSharding(sharding.mesh, P(*spec, *nothing))


def own_slices(masks: Masks) -> dict[str, tuple[Any, int]]:
    """The slices of packed parameters that the devices of this process hold.

    What its `tk.Store` keeps, and what `tk.Journal.load` puts together for it.

    Args:
      masks: `tk.masks(opt_state)`, also of shapes with shardings.
    Returns:
      By path, numbers of the slices (stack axes, groups last) in C order, and how many
      there are; only of parameters of which other processes hold some.
    """
    flat = jax.tree_util.tree_flatten_with_path(masks.forward, is_leaf=_is_index)[0]
    found = {}
    for keys, index in flat:
        if isinstance(index, Index):
            share = shares.of(index.grid, index.index.sharding)
            if not share.complete:
                found[_trees.path_name(keys)] = share.of
    return found


def gather_groups(theta: PyTree, masks: Masks, shardings: PyTree, axes: Any) -> Any:
    """Packed parameters whole on each device; inside `jax.shard_map` only.

    Every device contributes the groups that it holds: values and positions travel, no
    dense array does. The gradient goes back the same way, summed (reduce-scatter).

    Args:
      theta: what this device holds of each parameter.
      masks: what it holds of the masks.
      shardings: tree like `theta` of NamedSharding, from `packed_shardings`.
      axes: of the mesh, along which parameters become whole; as a rule those that cut
        the rows. What others cut (tensor parallelism) stays so.
    Returns:
      theta and masks, whole.
    """
    manual = sharding_specs(shardings, axes)

    def whole(x: Any, spec: P) -> Any:
        for axis, names in enumerate(spec[: x.ndim]):
            if names is not None:
                x = lax.all_gather(x, names, axis=axis, tiled=True)
        return x

    def positions(index: Any, spec: P) -> Any:
        if not isinstance(index, Index):
            return index
        return dataclasses.replace(index, index=whole(index.index, spec))

    forward = jax.tree.map(
        positions, masks.forward, manual, is_leaf=lambda x: x is None or _is_index(x)
    )
    return jax.tree.map(whole, theta, manual), masks._replace(forward=forward)


def sharding_specs(shardings: PyTree, axes: Any) -> PyTree:
    """PartitionSpecs for `jax.shard_map` over some axes of a mesh.

    Args:
      shardings: tree of NamedSharding.
      axes: names that stay in the specs.
    """

    def entry(names: Any) -> Any:
        kept = tuple(name for name in _names(names) if name in axes)
        return (kept[0] if len(kept) == 1 else kept) if kept else None

    return jax.tree.map(lambda s: P(*map(entry, s.spec)), shardings)


def reduce_gradients(gradients: PyTree, shardings: PyTree, axes: Any) -> PyTree:
    """Sums gradients over devices that saw other rows; inside `jax.shard_map` only.

    Args:
      gradients: of what each device holds; see `gather_groups`.
      shardings: of the parameters, NamedSharding.
      axes: of the mesh, over which rows are cut.
    Returns:
      Tree like `gradients`. Axes that cut a parameter are left out: the gradient of
      `gather_groups` has summed over them.
    """

    def one(gradient: Any, sharding: NamedSharding) -> Any:
        cut = {n for names in sharding.spec for n in _names(names)}
        left = tuple(axis for axis in axes if axis not in cut)
        return lax.psum(gradient, left) if left else gradient

    return jax.tree.map(one, gradients, shardings)


def _is_index(node: Any) -> bool:
    return isinstance(node, Index)


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


def _of_positions(index: Index, sharding: Any) -> Any:
    """An Index of the sharding of its positions."""
    if isinstance(sharding, NamedSharding):
        spec = P(*sharding.spec[: index.index.ndim])
        sharding = NamedSharding(sharding.mesh, spec)
    return dataclasses.replace(index, index=sharding)


def _packed_spec(path: str, grid: Grid, sharding: NamedSharding) -> list[Any]:
    """Entries for the stack axes of the stored units, groups included."""
    spec = [*sharding.spec, *(None,) * (len(grid.shape) - len(sharding.spec))]
    pieces = [
        math.prod(sharding.mesh.shape[name] for name in _names(entry)) for entry in spec
    ]
    found = [spec[a] for a in grid.axes.stack]
    parts, cut = grid.structure.parts, grid.cut
    if cut is not None:
        if parts % pieces[cut]:
            raise ValueError(
                f"{path!r} has {parts} groups, and {spec[cut]!r} would cut them into "
                f"{pieces[cut]}; choose a multiple of that for tk.groups_of"
            )
        found.append(spec[cut])
    for axis, entry in enumerate(spec):
        if axis in grid.axes.stack or axis == cut or pieces[axis] == 1:
            continue
        where = (
            f"its groups lie along axis {cut}"
            if cut is not None
            else "it has no groups"
        )
        raise ValueError(
            f"{path!r}, of shape {grid.shape}, is to be cut by {entry!r} along axis "
            f"{axis}, but {where}: a packed parameter is cut between groups, "
            f"structure=tk.groups_of({pieces[axis]}, ..., along=...)"
        )
    return found
