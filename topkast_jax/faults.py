"""What the updates notice by themselves: gradients that leak, NaN and Inf."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from topkast_jax import _trees
from topkast_jax._trees import Parameter
from topkast_jax._types import SparseState


def cond(
    condition: Array, yes: Callable[[Any], Any], no: Callable[[Any], Any], operand: Any
) -> Any:
    """lax.cond, but a plain branch outside of jit: there it would compile every time."""
    if isinstance(condition, jax.core.Tracer):
        return lax.cond(condition, yes, no, operand)
    return yes(operand) if condition else no(operand)


def faults(grads: list[Array], unseen: dict[int, Array]) -> tuple[Array, Array]:
    """Which gradients are not finite, bool [leaves], and whether any leaked.

    One pass finds whether there is a fault; which one is asked only where there is.

    Args:
      grads: one for each parameter.
      unseen: by index, where a gradient is nonzero though it should not be.
    """
    odd = [
        jnp.any(~jnp.isfinite(g) | unseen[i] if i in unseen else ~jnp.isfinite(g))
        for i, g in enumerate(grads)
    ]

    def look(_: None) -> tuple[Array, Array]:
        bad = jnp.stack([jnp.any(~jnp.isfinite(g)) for g in grads])
        leaks = [jnp.any(x) for x in unseen.values()]
        return bad, jnp.stack(leaks).any() if leaks else jnp.zeros((), bool)

    def sound(_: None) -> tuple[Array, Array]:
        return jnp.zeros(len(grads), bool), jnp.zeros((), bool)

    return cond(jnp.stack(odd).any(), look, sound, None)


def first_nonfinite(
    state: SparseState, params: list[Parameter], grads: list[Array], bad: Array
) -> dict[str, Any]:
    """Fields of the state about the first NaN or Inf in a gradient."""
    first = bad.any() & (state.nonfinite_step < 0)
    names = jnp.array([_trees.path_id(p.path) for p in params], jnp.uint32)

    def count() -> Array:
        each = [jnp.sum(~jnp.isfinite(g), dtype=jnp.int32) for g in grads]
        return jnp.stack(each)[jnp.argmax(bad)]

    return {
        "nonfinite_step": jnp.where(first, state.sparse_step, state.nonfinite_step),
        "nonfinite_leaf": jnp.where(
            first, names[jnp.argmax(bad)], state.nonfinite_leaf
        ),
        "nonfinite_count": cond(
            first, lambda _: count(), lambda x: x, state.nonfinite_count
        ),
    }
