"""The packed layouts in the training loop: their start, refresh, and files.

In the masked layout masks change inside the update, and none of this is used.
"""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import topkast_jax as tk
from experiments import state as states
from experiments.state import State
from experiments.tasks import Task

PyTree = Any
RESERVOIR = "reservoir"


def abstract(
    task: Task,
    tx: optax.GradientTransformation,
    key: jax.Array,
    sizes: Mapping[str, tuple[int, int]] | None = None,
) -> State:
    """ShapeDtypeStructs of the state: of step 0, or of `sizes`, see `tk.shapes`."""
    params, carry = jax.eval_shape(task.init, key)
    theta, opt_state = tk.shapes(tx, params, sizes)
    return State(theta, opt_state, carry)


def begin(
    task: Task, tx: optax.GradientTransformation, key: jax.Array, shardings: State
) -> tuple[State, tk.Store]:
    """The state of step 0, and the reservoir."""
    params, carry = jax.jit(task.init)(key)
    theta, opt_state, store = tk.start(tx, params)
    return jax.device_put(State(theta, opt_state, carry), shardings), store


class Needs(NamedTuple):
    """Bytes that a packed run holds between steps: on one device, and on the host."""

    device: int
    host: int

    def __str__(self) -> str:
        device, host = (f"{size / 2**20:,.1f} MiB" for size in self)
        return f"state {device} on the device, reservoir {host} on the host"


def needs(state: State, reservoir: bool) -> Needs:
    """What a state holds on each device, and its reservoir on the host.

    Args:
      state: ShapeDtypeStructs with shardings.
      reservoir: whether the method keeps one.
    """

    def on_one(x: Any) -> int:
        return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

    host = 0
    for path, index in _indices(state.opt_state).items() if reservoir else ():
        dtype = _by_path(state.params)[path].dtype
        host += math.prod(index.grid.shape) * dtype.itemsize
    return Needs(sum(map(on_one, jax.tree.leaves(state))), host)


def require_memory(needed: Needs, free: Needs | None = None) -> None:
    """Raises ValueError where a run needs more than there is.

    Args:
      needed: from `needs`.
      free: what there is; None asks the system. A device that does not say how much it
        has is not checked.
    """
    if free is None:
        stats = jax.local_devices()[0].memory_stats() or {}
        host = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = Needs(stats.get("bytes_limit", needed.device), host)
    for where, need, there in zip(("device", "host"), needed, free, strict=True):
        if need > there:
            raise ValueError(
                f"this run holds {need / 2**20:,.0f} MiB on the {where}, and there are "
                f"{there / 2**20:,.0f} MiB; make the model smaller, or B sparser, or "
                "choose a method without a reservoir"
            )


def _by_path(tree: PyTree) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in flat
    }


def described(opt_state: PyTree) -> dict[str, Any]:
    """JSON data from which `undescribed` makes the `tk.Index` of every parameter."""
    return {
        path: {
            "units": [index.k_forward, index.index.shape[-1]],
            "shape": index.grid.shape,
            "axes": index.grid.axes,
            "structure": index.grid.structure,
        }
        for path, index in _indices(opt_state).items()
    }


def sizes(description: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """`{path: (n_A, n_B)}` of what `described` gave, for `abstract`."""
    return {path: tuple(said["units"]) for path, said in description.items()}


def undescribed(description: Mapping[str, Any]) -> dict[str, tk.Index]:
    """`{path: tk.Index}` with a ShapeDtypeStruct for the positions."""
    struct: Any = jax.ShapeDtypeStruct
    found = {}
    for path, said in description.items():
        axes = tk.Axes(*(tuple(group) for group in said["axes"]))
        name, block, scope, group = said["structure"]
        structure = tk.Structure(name, tuple(block), scope, group)
        grid = tk.Grid(tuple(said["shape"]), axes, structure)
        first, units = said["units"]
        found[path] = tk.Index(struct((*grid.stack, units), np.int32), grid, first)
    return found


def _indices(opt_state: PyTree) -> dict[str, tk.Index]:
    flat = jax.tree_util.tree_flatten_with_path(
        tk.masks(opt_state).forward, is_leaf=lambda x: isinstance(x, tk.Index)
    )[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in flat
        if isinstance(leaf, tk.Index)
    }


class Refresh:
    """Chooses masks anew between two steps, when the method's schedule says so.

    The schedule counts updates. The loop counts steps, and learns late which of them
    changed nothing for NaN; so where one is due, the count in the state is asked.

    Args:
      task: gives the loss, for methods that probe.
      tx: the transformation.
      method: of `tx`.
      store: the reservoir; written in place.
      state: that the loop goes on from.
      step: steps made until then.
    """

    def __init__(
        self,
        task: Task,
        tx: optax.GradientTransformation,
        method: tk.Method,
        store: tk.Store,
        state: State,
        step: int,
    ) -> None:
        self.tx, self.method, self.store = tx, method, store
        self._loss = _loss(task)
        self._behind = step - int(state.opt_state.sparse_step)

    def before(self, state: State, step: int, *arguments: Any) -> PyTree:
        """What the refresh after step `step` needs of its gradient; before it is made.

        Args:
          state: that the step will read.
          step: its number.
          *arguments: batch, key and step, as the step takes them.
        """
        if not (self.method.probe and tk.due(self.tx, step + 1 - self._behind)):
            return None
        return tk.probe(
            self._loss, state.params, state.opt_state, state.carry, *arguments
        )

    def after(
        self, state: State, step: int, found: PyTree
    ) -> tuple[State, float] | None:
        """The state for the coming step, and the churn; None where nothing is due.

        Args:
          state: that the last step left.
          step: steps made.
          found: from `before`.
        """
        if not tk.due(self.tx, step - self._behind):
            return None
        made = int(state.opt_state.sparse_step)
        self._behind = step - made
        if not tk.due(self.tx, made):
            return None
        before = tk.masks(state.opt_state)
        trained = (state.params, state.opt_state)
        theta, opt_state, _ = tk.refresh(self.tx, *trained, self.store, found)
        churn = tk.metrics.churn(before, tk.masks(opt_state))
        return State(theta, opt_state, state.carry), float(churn)


def _loss(task: Task) -> Callable[..., Any]:
    def loss(
        theta: PyTree, opt_state: PyTree, carry: PyTree, batch: Any, key: Any, step: Any
    ) -> Any:
        weights = states.alpha(theta, opt_state, True, task.by_unit)
        return task.loss(weights, carry, batch, jax.random.fold_in(key, step))[0]

    return loss
