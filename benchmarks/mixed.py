"""float32 training of parameters that are stored in fewer bits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any


class MixedState(NamedTuple):
    """State of `in_float32`.

    Attributes:
      master_weights: the parameters in float32, of which the stored ones are the rounding.
      master_inner: state of the inner optimizer, in float32.
    """

    master_weights: PyTree
    master_inner: optax.OptState


def in_float32(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Updates a float32 copy of the parameters, which follow it rounded.

    Updates smaller than half a bit of a bfloat16 weight would be lost on it; here they
    add up. The copy is a slot like a moment: a refresh of packed parameters moves it with
    its entry, and gives one that enters the value that the reservoir kept.

    Args:
      inner: any optimizer.
    Example:
      >>> params = {"w": jnp.ones(1, jnp.bfloat16)}
      >>> tx = in_float32(optax.sgd(1.0))
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     grads = {"w": jnp.full(1, -0.002, jnp.bfloat16)}
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params["w"].tolist(), round(float(state.master_weights["w"][0]), 4)
      ([1.0078125], 1.006)
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> MixedState:
        # A copy also where they are float32: a step is given the buffers of both.
        master = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
        return MixedState(master, inner.init(master))

    def update(
        updates: PyTree, state: MixedState, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, MixedState]:
        if params is None:
            raise ValueError("in_float32: update needs the parameters")
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), updates)
        step, inner_state = inner.update(
            grads, state.master_inner, state.master_weights, **extra
        )
        master: Any = optax.apply_updates(state.master_weights, step)
        follow = jax.tree.map(lambda m, p: m - p.astype(jnp.float32), master, params)
        return follow, MixedState(master, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
