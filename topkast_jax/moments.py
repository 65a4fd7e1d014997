"""Which arrays of an inner optimizer belong to packed entries, and how they follow."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from topkast_jax import _trees
from topkast_jax._types import PyTree
from topkast_jax.transformation import Recipe

P: Any = PartitionSpec


def require_slots(
    recipe: Recipe, dense: PyTree, packed: PyTree, sparse: list[_trees.Parameter]
) -> None:
    """Raises ValueError where an optimizer's state cannot follow a refresh.

    An array of the state must belong to a parameter by its path, and a packed parameter
    must be treated as the dense one is, whatever its rank.
    """

    def kept(params: PyTree) -> list[tuple[str, Any]]:
        state = jax.eval_shape(recipe.inner.init, params)
        return [
            (_trees.path_name(keys), leaf)
            for keys, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
            if leaf.ndim and jnp.issubdtype(leaf.dtype, jnp.floating)
        ]

    paths = [p.path for p in _trees.parameters(dense)[0]]
    values = {p.path: p.array.size for p in _trees.parameters(packed)[0]}
    least = min(values[p.path] for p in sparse)
    found = kept(packed)
    for name, leaf in found:
        if leaf.size >= least and not any(ends(name, path) for path in paths):
            raise ValueError(
                f"the inner optimizer keeps an array of shape {leaf.shape} at {name!r} "
                "that belongs to no parameter (optax.flatten does so): nothing tells "
                'which entries it is about when they move; use layout="masked"'
            )
    before = kept(dense)
    for p in sparse:
        was, now = (sum(ends(n, p.path) for n, _ in some) for some in (before, found))
        if was != now:
            raise ValueError(
                f"the inner optimizer keeps {was} arrays for {p.path!r} when it is dense, "
                f"and {now} when it is packed: it goes by the number of axes (as muon "
                'does), and packed parameters have one; use layout="masked"'
            )


def ends(name: str, path: str) -> bool:
    """Whether the name of an array in a state ends with the path of a parameter."""
    return name == path or name.endswith(f"/{path}")


def moved(
    state: PyTree,
    fresh: PyTree,
    params: list[_trees.Parameter],
    sources: dict[int, jax.Array],
) -> PyTree:
    """Slots of the inner optimizer: old values where a unit stays, else fresh ones.

    What belongs to a sparse parameter and is no slot (factored moments) begins anew: it
    sums over units that are not where they were.
    """
    leaves, treedef = _trees.parameters(state)
    news = treedef.flatten_up_to(fresh)
    owners = _trees.slots(state, params)
    out = []
    for leaf, new, owner in zip(leaves, news, owners, strict=True):
        old = leaf.array
        if owner is None or owner not in sources:
            sums = any(ends(leaf.path, params[i].path) for i in sources)
            out.append(new if owner is None and sums else old)
            continue
        apart = on_mesh(old) and on_mesh(sources[owner])
        follow = _follow_apart if apart else _follow
        out.append(follow(old, new, sources[owner]))
    return treedef.unflatten(out)


def _follow(old: jax.Array, new: jax.Array, source: jax.Array) -> jax.Array:
    """[*stack, n, ...]: entry `source` of each slice of `old`; of `new` where it is -1."""
    at = source.reshape(*source.shape, *(1 for _ in old.shape[source.ndim :]))
    kept = jnp.take_along_axis(old, jnp.maximum(at, 0), axis=source.ndim - 1)
    return jnp.where(at >= 0, kept, new)


def _follow_apart(old: jax.Array, new: jax.Array, source: jax.Array) -> jax.Array:
    """`_follow` on every device for the slices that it holds: nothing travels."""
    sharding: Any = old.sharding
    spec = P(*sharding.spec[: source.ndim - 1])
    return _over_devices(sharding.mesh, spec)(old, new, source)


@functools.cache
def _over_devices(mesh: Any, spec: Any) -> Callable[..., jax.Array]:
    specs = dict(in_specs=(spec, spec, spec), out_specs=spec)
    return jax.jit(jax.shard_map(_follow, mesh=mesh, **specs, check_vma=False))


def on_mesh(x: Any) -> bool:
    """Whether an array lies on several devices."""
    return isinstance(x.sharding, NamedSharding) and x.sharding.num_devices > 1
