"""What `tk.sparse` returns: an optax transformation that knows what it was made of."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import optax

from topkast_jax import plan as plan_lib
from topkast_jax._trees import AxesRules
from topkast_jax._types import Method, Methods, PyTree, Schedule
from topkast_jax.plan import Plan

Reset = Literal["init", "keep"]
LAYOUTS = ("masked", "packed", "block")


class Recipe(NamedTuple):
    """The arguments of `tk.sparse`."""

    inner: optax.GradientTransformationExtraArgs
    method: Methods
    layout: str
    seed: Any
    axes: AxesRules
    reset: Reset
    learning_rate: float | Schedule | None
    delay: int = 0

    def method_of(self, path: str) -> Method:
        """The method of a sparse parameter."""
        method = plan_lib.method_of(self.method, path)
        if method is None:
            raise ValueError(f"{path!r} is sparse, and tk.groups says that it is dense")
        return method

    def rate(self, step: Any) -> Any:
        """The learning rate of a step, where it was given."""
        given = self.learning_rate
        return given(step) if callable(given) else given


class Sparse(optax.GradientTransformationExtraArgs):
    """A gradient transformation that remembers its recipe, for `tk.plan` and others."""

    recipe: Recipe

    def __new__(
        cls, init: Callable[..., Any], update: Callable[..., Any], recipe: Recipe
    ) -> "Sparse":
        self = super().__new__(cls, init, update)
        self.recipe = recipe
        return self


def recipe_of(tx: optax.GradientTransformation, caller: str) -> Recipe:
    """The recipe of what `tk.sparse` returned.

    Raises:
      ValueError: `tx` was not made by `tk.sparse`, or is enclosed by something else.
    """
    if not isinstance(tx, Sparse):
        raise ValueError(
            f"{caller} reads the transformation that tk.sparse returned; pass that one, "
            f"before it is chained or wrapped, not a {type(tx).__name__}"
        )
    return tx.recipe


def plan(tx: optax.GradientTransformation, params: PyTree) -> Plan:
    """Table of what is sparse, how it is read, and how much is kept, before training.

    Args:
      tx: what `tk.sparse` or `tk.drop_in` returned (not yet enclosed by another
        transformation).
      params: the parameters, or their shapes.
    Returns:
      `Plan`; `print` it.
    Raises:
      ValueError: as `tx.init`, or `tx` was not made by `tk.sparse`.
    Example:
      >>> import jax.numpy as jnp, topkast_jax as tk
      >>> tx = tk.sparse(optax.adam(0.1), tk.top_kast(0.9, 0.8))
      >>> print(plan(tx, {"kernel": jnp.ones((20, 10)), "bias": jnp.ones(10)}))
      parameter         shape  axes   k_A  k_B  sparsity A       B  slots
      bias              10     dense   10
      kernel            20x10  i o     20   40      0.9000  0.8000      2
      sparse, top_kast  200            20   40      0.9000  0.8000
      all               210            30   50      0.8571  0.7619
    """
    recipe = recipe_of(tx, "tk.plan")
    return plan_lib.make(recipe.method, recipe.inner, recipe.axes, params)
