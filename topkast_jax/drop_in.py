"""For trainers that cannot be edited: their parameters are alpha, theta is in the state."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from topkast_jax import _trees
from topkast_jax._types import PyTree, SparseState
from topkast_jax.forward import apply_masks
from topkast_jax.transformation import Sparse


class DropInState(NamedTuple):
    """State of `tk.drop_in`: the reservoir and the state of `tk.sparse`.

    Attributes:
      reservoir: tree like the parameters, theta; its values on A are not read, those of
        the trainer's parameters are.
      wrapped: SparseState.
    """

    reservoir: PyTree
    wrapped: SparseState


def drop_in(tx: Sparse) -> Sparse:
    """Makes `tk.sparse` fit a trainer that knows nothing of masks.

    The trainer's parameters are alpha: it computes an ordinary loss and gradient from
    them and applies the updates. theta lives in the state, so this costs one more copy
    of the parameters, and gives the same numbers as `tk.sparsify`. Start the trainer
    from alpha:

        opt_state = tx.init(params);  params = tk.export(params, opt_state)

    Args:
      tx: what `tk.sparse` returned.
    Returns:
      An optax transformation. Parameters nonzero off A count as leaks (`tk.health`):
      they show that the trainer did not start from `tk.export`.
    Example:
      >>> import jax.numpy as jnp, topkast_jax as tk
      >>> params = {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]])}
      >>> tx = drop_in(tk.sparse(optax.sgd(0.1), tk.top_kast(0.5, 0.5, penalty=0.0)))
      >>> state = tx.init(params)
      >>> alpha = tk.export(params, state)
      >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, state, alpha)
      >>> optax.apply_updates(alpha, updates)["kernel"].round(1).tolist()
      [[0.0, 0.0], [2.9000000953674316, -4.099999904632568]]
    """

    if tx.recipe.layout != "masked":
        raise ValueError(
            'tk.drop_in needs layout="masked": a trainer that cannot be edited trains '
            "dense arrays"
        )

    def init_fn(params: PyTree) -> DropInState:
        wrapped = cast(SparseState, tx.init(params))
        if jax.tree.leaves(wrapped.sparse_masks.shrink):
            raise ValueError(
                "tk.drop_in: the trainer's parameters are theta on A, and under "
                f"{tx.recipe.method.name} alpha is smaller there; use tk.sparsify"
            )
        return DropInState(jax.tree.map(jnp.asarray, params), wrapped)

    def update_fn(
        updates: PyTree, state: DropInState, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, DropInState]:
        if params is None:
            raise ValueError("tk.drop_in: update needs the parameters")
        masks = _trees.masks(state.wrapped)
        theta = _select(masks.forward, params, state.reservoir)
        seen = jax.tree.map(
            lambda b, p: b if p is None else b | p,
            masks.backward,
            masks.probe,
            is_leaf=lambda x: x is None,
        )
        off = jax.tree.map(
            lambda m, p: None if m is None else jnp.any(~m & (p != 0)),
            masks.forward,
            params,
            is_leaf=lambda x: x is None,
        )
        leaked = jnp.stack(jax.tree.leaves(off)).any()
        inward = apply_masks(updates, seen)
        u, new_state = tx.update(inward, state.wrapped, theta, **extra)
        wrapped = cast(SparseState, new_state)
        theta = optax.apply_updates(theta, u)
        wrapped = wrapped._replace(leaks=wrapped.leaks + leaked.astype(jnp.int32))
        after = _trees.masks(wrapped).forward
        alpha = apply_masks(theta, after)

        def difference(was: Any, now: Any, u: Any, old: Any, new: Any) -> Any:
            # Exact where it matters: p + u inside A, p + (0 - p) leaving, 0 + new
            # entering. `new - old` everywhere would round.
            if was is None:
                return u
            return jnp.where(was & now, u, (new - old).astype(u.dtype))

        delta = jax.tree.map(
            difference,
            masks.forward,
            after,
            u,
            params,
            alpha,
            is_leaf=lambda x: x is None,
        )
        return delta, DropInState(theta, wrapped)

    return Sparse(init_fn, update_fn, tx.recipe)


def _select(masks: PyTree, first: PyTree, second: PyTree) -> PyTree:
    """`first` on the masks (and where dense), `second` off them."""
    return jax.tree.map(
        lambda m, a, b: a if m is None else jnp.where(m, a, b),
        masks,
        first,
        second,
        is_leaf=lambda x: x is None,
    )
