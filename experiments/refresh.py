"""The refresh of packed layouts, between the steps of the training loop."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import topkast_jax as tk
from experiments import state as states
from experiments.state import State
from experiments.tasks import Task

PyTree = Any


class Refresh:
    """Chooses masks anew between two steps, when the method's schedule says so.

    The schedule counts updates. The loop counts steps, and learns late which of them
    changed nothing for NaN; so where one is due, the count in the state is asked.

    Args:
      task: gives the loss, for methods that probe.
      tx: the transformation.
      method: of `tx`.
      delay: updates from the choice of masks to their coming into force.
      store: the reservoir; written in place.
      state: that the loop goes on from.
      step: steps made until then.
    """

    def __init__(
        self,
        task: Task,
        tx: optax.GradientTransformation,
        method: tk.Method,
        delay: int,
        store: tk.Store,
        state: State,
        step: int,
    ) -> None:
        self.tx, self.method, self.delay, self.store = tx, method, delay, store
        self._loss = _loss(task)
        self._behind = step - int(state.opt_state.sparse_step)
        self._chosen: tk.Chosen | None = None

    @property
    def lands(self) -> int | None:
        """The step after which masks that are chosen come into force; None: none are.

        Until then no checkpoint is saved: it would not hold the choice.
        """
        if self._chosen is None:
            return None
        return self._chosen.step + self.delay + self._behind

    def before(self, state: State, step: int, *arguments: Any) -> PyTree:
        """What the choice after step `step` needs of its gradient; before it is made.

        Args:
          state: that the step will read.
          step: its number.
          *arguments: batch, key and step, as the step takes them.
        """
        made = step + 1 - self._behind
        reads = self.method.probe or self.method.needs_gradient
        if not (reads and tk.due(self.tx, made + self.delay)):
            return None
        return tk.probe(
            self._loss, state.params, state.opt_state, state.carry, *arguments
        )

    def after(
        self, state: State, step: int, found: PyTree
    ) -> tuple[State, float] | None:
        """The state for the coming step, and the churn; None where nothing changes.

        Args:
          state: that the last step left.
          step: steps made.
          found: from `before`.
        """
        made = step - self._behind
        if not (tk.due(self.tx, made) or tk.due(self.tx, made + self.delay)):
            return None
        if not all(map(_finite, jax.tree.leaves(state.params))):
            return None  # the loop will find out, and do what the config says
        made = int(state.opt_state.sparse_step)
        self._behind = step - made
        trained = (state.params, state.opt_state)
        if self.delay and tk.due(self.tx, made + self.delay) and self._chosen is None:
            self._chosen = tk.choose(self.tx, *trained, self.store, found)
        if not tk.due(self.tx, made) or (self.delay and self._chosen is None):
            return None
        before = tk.masks(state.opt_state)
        theta, opt_state, _ = tk.refresh(
            self.tx, *trained, self.store, found, self._chosen
        )
        self._chosen = None
        churn = tk.metrics.churn(before, tk.masks(opt_state))
        return state._replace(params=theta, opt_state=opt_state), float(churn)


def lands(method: tk.Method | None, delay: int, made: int) -> int | None:
    """After which update masks come into force that are chosen by now, if there are any.

    For the masked layout, where the choice waits in the state.

    Args:
      method: of the run.
      delay: updates from the choice of masks to their coming into force.
      made: updates so far.
    """
    if method is None or method.due is None:
        return None
    chosen = [s for s in range(max(1, made - delay + 1), made + 1) if method.due(s)]
    return chosen[0] + delay if chosen else None


def _finite(x: jax.Array) -> bool:
    return bool(jnp.isfinite(x).all())


def _loss(task: Task) -> Callable[..., Any]:
    def loss(
        theta: PyTree, opt_state: PyTree, carry: PyTree, batch: Any, key: Any, step: Any
    ) -> Any:
        weights = states.alpha(theta, opt_state, True, task.by_unit)
        return task.loss(weights, carry, batch, jax.random.fold_in(key, step))[0]

    return loss
