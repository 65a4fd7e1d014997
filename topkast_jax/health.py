"""What can go wrong without an error: leaks, NaN, weights off the mask."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from topkast_jax import _trees
from topkast_jax._types import PyTree
from topkast_jax.layouts.packed import Index


@dataclasses.dataclass(frozen=True)
class NonFinite:
    """The first NaN or Inf in a gradient: parameter, 0-based step, number of entries."""

    path: str
    step: int
    count: int


class Health(NamedTuple):
    """What went wrong so far.

    Attributes:
      leaks: updates whose gradient was nonzero outside B and P. It proves that the loss
        was computed from the parameters instead of `tk.sparsify` of them.
      nonfinite: the first NaN or Inf in a gradient, or None.
    """

    leaks: int
    nonfinite: NonFinite | None


def health(opt_state: optax.OptState) -> Health:
    """Reads the counters of every `tk.sparse` in an optimizer state, on the host.

    Raises:
      ValueError: no `tk.sparse` in the state.
    """
    every = _trees.masks(opt_state).forward
    paths = jax.tree_util.tree_flatten_with_path(
        every, is_leaf=lambda x: x is None or isinstance(x, Index)
    )[0]
    names = {
        _trees.path_id(n): n for n in (_trees.path_name(keys) for keys, _ in paths)
    }
    leaks, first = 0, None
    for state in _trees.find_states(opt_state):
        leaks += int(state.leaks)
        step = int(state.nonfinite_step)
        if step >= 0 and (first is None or step < first.step):
            name = names.get(int(state.nonfinite_leaf), "a parameter kept dense")
            first = NonFinite(name, step, int(state.nonfinite_count))
    return Health(leaks, first)


def check(params: PyTree, opt_state: optax.OptState) -> None:
    """Raises if the network is not as sparse as its masks say.

    Args:
      params: the parameters that are trained.
      opt_state: any optimizer state that contains `tk.sparse`.
    Raises:
      ValueError: a gradient has leaked (see `Health`), or, after the first update of a
        method without reservoir, a weight off B is not zero.
    Example:
      >>> import topkast_jax as tk
      >>> params = {"kernel": jnp.ones((4, 4))}
      >>> tx = tk.sparse(optax.sgd(0.1), tk.static(0.75))
      >>> state = tx.init(params)
      >>> _, state = tx.update(params, state, params)  # a gradient that is dense
      >>> check(params, state)
      Traceback (most recent call last):
      ValueError: in 1 updates the gradient was nonzero outside B and P: the loss ...
    """
    leaks = health(opt_state).leaks
    if leaks:
        raise ValueError(
            f"in {leaks} updates the gradient was nonzero outside B and P: the loss saw "
            "the parameters themselves; compute it from "
            "tk.sparsify(params, tk.masks(opt_state))"
        )

    def require_zero(keys: Any, b: Any, a: Any, reservoir: Any, param: Any) -> None:
        if b is None or bool(reservoir):
            return
        off = int(jnp.sum(~(a | b) & (param != 0)))
        if off:
            raise ValueError(
                f"{_trees.path_name(keys)!r}: {off} weights off the mask are not zero; "
                "apply every update with optax.apply_updates, and change parameters "
                "in no other way"
            )

    for state in _trees.find_states(opt_state):
        if int(state.sparse_step) == 0:
            continue
        masks = _trees.masks(state)
        jax.tree_util.tree_map_with_path(
            require_zero,
            masks.backward,
            masks.forward,
            _trees.unmasked(state.sparse_reservoir),
            params,
            is_leaf=lambda x: x is None,
        )
