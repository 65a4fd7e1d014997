"""What the updates notice by themselves: gradients that leak, NaN and Inf."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from topkast_jax import _trees
from topkast_jax._trees import Parameter
from topkast_jax._types import SparseState

T = TypeVar("T")


def when(condition: Array, change: Callable[[T], T], operand: T) -> T:
    """`change(operand)` where a condition holds, else the operand, without copies.

    A loop of at most one turn: its operand is replaced in place, where a `lax.cond`
    copies it to its result. So no reverse-mode derivative passes.
    """
    if not isinstance(condition, jax.core.Tracer):
        return change(operand) if condition else operand

    def turn(carry: Any) -> Any:
        return jnp.zeros_like(carry[0]), change(carry[1])

    return lax.while_loop(lambda carry: carry[0], turn, (condition, operand))[1]


def count(grad: Array, seen: Array | None = None) -> tuple[Array, Array]:
    """How many entries of a gradient are NaN or Inf, and whether any leaked.

    Both in one pass: a reduction of its own for each costs several times as much, and
    a branch that looks closer only where needed would have the gradient written out.

    Args:
      grad: of any shape.
      seen: where it may be nonzero; None for everywhere.
    Returns:
      int32 scalar, bool scalar.
    """
    bad = (~jnp.isfinite(grad)).astype(jnp.int32)
    leak = jnp.zeros_like(bad, bool) if seen is None else ~seen & (grad != 0)

    def add(one: Any, two: Any) -> Any:
        return one[0] + two[0], one[1] | two[1]

    zeros = (np.int32(0), np.bool_(False))
    found: Any = lax.reduce((bad, leak), zeros, add, tuple(range(grad.ndim)))
    return found


def first_nonfinite(
    state: SparseState, params: list[Parameter], counts: Array
) -> dict[str, Any]:
    """Fields of the state about the first NaN or Inf in a gradient.

    Args:
      state: before the update.
      params: in flattening order.
      counts: int32 [leaves], from `count`.
    """
    bad = counts > 0
    first = bad.any() & (state.nonfinite_step < 0)
    names = jnp.array([_trees.path_id(p.path) for p in params], jnp.uint32)
    which = jnp.argmax(bad)
    return {
        "nonfinite_step": jnp.where(first, state.sparse_step, state.nonfinite_step),
        "nonfinite_leaf": jnp.where(first, names[which], state.nonfinite_leaf),
        "nonfinite_count": jnp.where(first, counts[which], state.nonfinite_count),
    }
