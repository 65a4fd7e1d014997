"""What a config stands for, before there is any array: task, transformation, shapes."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

import topkast_jax as tk
from experiments import mesh as meshes
from experiments import optimizer, packing, routes, tasks
from experiments import state as states
from experiments.config import Watched
from experiments.state import State


class Assembly(NamedTuple):
    """Parts of a run.

    Attributes:
      mesh: where arrays live.
      rules: which parameter is cut along which axis of the mesh.
      task: model, loss and data.
      rate: learning rate by step.
      dense_tx: the optimizer alone.
      tx: the transformation that trains.
      method: of `tx`; None for a dense network.
      packed: whether `tx` holds B alone, and is refreshed between steps.
      in_files: whether the reservoir of a packed layout lives in files of the workdir.
      delay: updates from the choice of masks to their coming into force.
      init_key: of parameters and masks.
      step_key: of what steps draw.
    """

    mesh: Mesh
    rules: Any
    task: tasks.Task
    rate: Any
    dense_tx: optax.GradientTransformation
    tx: optax.GradientTransformation
    method: tk.Method | None
    packed: bool
    in_files: bool
    delay: int
    init_key: jax.Array
    step_key: jax.Array

    def plan(self) -> str:
        """What is sparse, as a table; in a packed layout, how layers multiply by it."""
        if not isinstance(self.tx, tk.Sparse):
            return "dense: no masks"
        shapes = jax.eval_shape(self.task.init, self.init_key)[0]
        table = str(tk.plan(self.tx, shapes))
        if not self.packed:
            return table
        return f"{table}\n{routes.described(self.task, self.tx, self.init_key)}"

    def abstract(self, description: Mapping[str, Any] | None = None) -> State:
        """ShapeDtypeStructs of the state, with shardings; nothing is computed.

        Args:
          description: of a packed state that is not at its start (`packing.described`).
        """
        if self.packed:
            sizes = packing.sizes(description) if description else None
            found = packing.abstract(self.task, self.tx, self.init_key, sizes)
        else:
            init = states.initial(self.task, self.tx)
            found = jax.eval_shape(init, self.init_key)
        return states.placed(found, self.shardings(found))

    def shardings(self, state: State) -> State:
        """Shardings of a state of these shapes."""
        return states.shardings(self.mesh, self.rules, state)

    def begin(self, workdir: pathlib.Path) -> tuple[State, tk.Store | None]:
        """The state of step 0, and the reservoir of a packed layout."""
        shardings = self.shardings(self.abstract())
        if self.packed:
            folder = workdir / packing.THETA if self.in_files else None
            state, store = packing.begin(
                self.task, self.tx, self.init_key, shardings, folder
            )
            return state, packing.keep(store, workdir)
        init = states.initial(self.task, self.tx)
        return jax.jit(init, out_shardings=shardings)(self.init_key), None

    def compile(self, state: State, *arguments: Any) -> jax.stages.Compiled:
        """The training step, for these arrays (or shapes) and no others."""
        shardings = self.shardings(state)
        run = states.step(
            self.task,
            self.tx,
            sparse=self.method is not None,
            shardings=shardings if self.packed and self.mesh.size > 1 else None,
        )
        return states.compile_step(run, shardings, state, *arguments)


def assemble(cfg: Watched, devices: Sequence[Any] | None = None) -> Assembly:
    """Reads everything in a config but what only the loop wants to know.

    Args:
      cfg: see configs/quickstart.py.
      devices: what the mesh is made of; None for those of this process.
    Raises:
      ValueError: a setting that makes no sense; it is named.
    """
    mesh = meshes.make(cfg.mesh, devices)
    task = tasks.make(cfg)
    rate = optimizer.learning_rate(cfg.learning_rate, cfg.steps)
    dense_tx = optimizer.inner(cfg.optimizer, rate)
    tx, method = optimizer.sparse(
        cfg.sparse, dense_tx, rate, steps=cfg.steps, seed=cfg.seed
    )
    packed = method is not None and cfg.sparse.get("layout", "masked") != "masked"
    where = cfg.sparse.get("reservoir", "memory") if packed else "memory"
    if where not in ("memory", "files"):
        raise ValueError(f"sparse.reservoir={where!r} must be 'memory' or 'files'")
    delay = cfg.sparse.get("refresh_delay", 0) if method else 0
    keys = jax.random.split(jax.random.key(cfg.seed))
    return Assembly(
        mesh,
        cfg.sharding,
        task,
        rate,
        dense_tx,
        tx,
        method,
        packed,
        where == "files",
        delay,
        keys[0],
        keys[1],
    )
