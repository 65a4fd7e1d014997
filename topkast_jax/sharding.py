"""Masks and optimizer state sharded like the weights they belong to."""

from typing import Any

import jax

from topkast_jax import _trees
from topkast_jax._types import PyTree


def state_shardings(
    abstract_state: PyTree, params: PyTree, shardings: PyTree, default: Any
) -> PyTree:
    """Shardings of any optimizer state, from those of the parameters.

    A leaf of the state whose key path ends with a parameter's key path and whose shape
    agrees (moments, masks, memory) takes that parameter's sharding; the rest (counts,
    factored moments) takes `default`.

    Args:
      abstract_state: the state, or `jax.eval_shape(tx.init, params)`.
      params: the parameters, or their shapes.
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
    return jax.tree.unflatten(
        jax.tree.structure(abstract_state),
        [default if owner is None else of_params[owner] for owner in owners],
    )
