"""What a config stands for, before there is any array: task, transformation, shapes."""

import inspect
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

import topkast_jax as tk
from experiments import mesh as meshes
from experiments import optimizer, packing, pretrained, routes, tasks
from experiments import state as states
from experiments.checkpoint import Restored
from experiments.config import Watched
from experiments.state import State
from experiments.tasks.shared import shared


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
      layout: of `tx`, "masked" for a dense network.
      other: layout -> the transformation that differs in its layout alone.
      packed: whether `tx` holds B alone, and is refreshed between steps.
      in_files: whether the reservoir of a packed layout lives in files of the workdir.
      delay: updates from the choice of masks to their coming into force.
      init_key: of parameters and masks.
      step_key: of what steps draw.
      given: parameters that were trained before; None: random ones.
      parts: of a batch, for one update.
      decay: of the moving average of alpha; 0: there is none.
    """

    mesh: Mesh
    rules: Any
    task: tasks.Task
    rate: Any
    dense_tx: optax.GradientTransformation
    tx: optax.GradientTransformation
    method: tk.Method | None
    layout: str
    other: Callable[[str], optax.GradientTransformation]
    packed: bool
    in_files: bool
    delay: int
    init_key: jax.Array
    step_key: jax.Array
    given: Any = None
    parts: int = 1
    decay: float = 0.0

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
            init = states.initial(self.task, self.tx, averaged=self.decay > 0)
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
                self.task,
                self.tx,
                self.init_key,
                shardings,
                self.rules,
                folder,
                self.given,
            )
            return state, packing.keep(store, workdir)
        init = states.initial(self.task, self.tx, averaged=self.decay > 0)
        key = meshes.place_key(self.init_key, self.mesh)
        return jax.jit(init, out_shardings=shardings)(key, self.given), None

    def saved(self, meta: Mapping[str, Any]) -> State:
        """ShapeDtypeStructs of the state in a checkpoint, in the layout that it has."""
        layout = layout_of(meta)
        of_layout = self._replace(
            tx=self.other(layout), layout=layout, packed=layout != "masked"
        )
        return of_layout.abstract(meta.get("packed"))

    def adopt(self, found: Restored, workdir: pathlib.Path) -> Restored:
        """What was restored, in the layout of this run."""
        if layout_of(found.meta) == self.layout:
            return found
        folder = workdir / packing.THETA if self.in_files else None
        params, opt_state, store = tk.convert(
            self.tx, found.state.params, found.state.opt_state, found.store, folder
        )
        state = State(params, opt_state, found.state.carry)
        state = jax.device_put(state, self.shardings(jax.eval_shape(lambda: state)))
        kept = packing.keep(store, workdir) if self.packed else None
        return found._replace(state=state, store=kept)

    def compile(self, state: State, *arguments: Any) -> jax.stages.Compiled:
        """The training step, for these arrays (or shapes) and no others."""
        shardings = self.shardings(state)
        run = states.step(
            self.task,
            self.tx,
            sparse=self.method is not None,
            shardings=shardings if self.packed and self.mesh.size > 1 else None,
            parts=self.parts,
            decay=self.decay,
        )
        return states.compile_step(run, shardings, state, *arguments)


def _starts_at_random(sparse: Mapping[str, Any]) -> bool:
    """Whether the first A of a method is drawn, unless the config says otherwise."""
    if sparse["method"] == "rules":
        return any(
            _starts_at_random(given)
            for _, given in sparse["rules"]
            if isinstance(given, Mapping)
        )
    factory = tk.METHODS.get(sparse["method"])
    if factory is None:
        return False  # dense, or refused elsewhere
    given = {
        name: sparse.get(name, parameter.default)
        for name, parameter in inspect.signature(factory).parameters.items()
    }
    return given.get("init") == "random" and given.get("initial_sparsity") != 0


def layout_of(meta: Mapping[str, Any]) -> str:
    """The layout of a checkpoint."""
    layout: str = meta["config"].get("sparse", {}).get("layout", "masked")
    return layout


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
    meshes.require_rows(mesh, cfg.batch_size, task.held_out_rows)
    rate = optimizer.learning_rate(cfg.learning_rate, cfg.steps)
    keys = jax.random.split(jax.random.key(cfg.seed))
    dense_tx = optimizer.inner(cfg.optimizer, rate, _penalized(cfg, task, rate))

    def transformed(sparse: Mapping[str, Any]) -> Any:
        return optimizer.sparse(sparse, dense_tx, rate, steps=cfg.steps, seed=cfg.seed)

    def other(layout: str) -> optax.GradientTransformation:
        changed = {} if method is None else {"layout": layout}
        found: optax.GradientTransformation = transformed({**cfg.sparse, **changed})[0]
        return found

    tx, method = transformed(cfg.sparse)
    if method and method.statistics and not task.by_unit:
        raise ValueError(
            f"sparse.candidates: {method.name} draws by statistics of activations, and "
            f"the model of task={cfg.task!r} is not called through tk.flax.apply; say "
            "candidates=uniform"
        )
    layout = cfg.sparse.get("layout", "masked") if method else "masked"
    packed = layout != "masked"
    parts, decay = cfg.get("accumulate", 1), cfg.get("ema", 0.0)
    _require_possible(task, mesh, packed, cfg.batch_size, parts, decay)
    where = cfg.sparse.get("reservoir", "memory") if packed else "memory"
    if where not in ("memory", "files"):
        raise ValueError(f"sparse.reservoir={where!r} must be 'memory' or 'files'")
    delay = cfg.sparse.get("refresh_delay", 0) if method else 0
    given, names = None, cfg.get("init_map", ())
    if cfg.get("init_from"):
        if _starts_at_random(cfg.sparse):
            raise ValueError(
                f"init_from={cfg.init_from!r} with sparse.init='random' would drop "
                "most of what was trained, at random; say sparse.init=magnitude, or "
                "name a file of masks"
            )
        shapes = jax.eval_shape(task.init, keys[0])[0]
        given = pretrained.load(cfg.init_from, names, shapes)
    return Assembly(
        mesh,
        cfg.sharding,
        task,
        rate,
        dense_tx,
        tx,
        method,
        layout,
        other,
        packed,
        where == "files",
        delay,
        keys[0],
        keys[1],
        given,
        parts,
        decay,
    )


def _penalized(cfg: Watched, task: tasks.Task, rate: Any) -> list[str]:
    """Paths of the parameters that the method of a config penalizes, if only by 0."""
    if "penalty" not in cfg.sparse:
        return []
    tx, _ = optimizer.sparse(
        cfg.sparse, optax.identity(), rate, steps=cfg.steps, seed=cfg.seed
    )
    shapes = jax.eval_shape(task.init, jax.random.key(cfg.seed))[0]
    return [row.path for row in tk.plan(tx, shapes).rows if row.sparse]


def _require_possible(
    task: tasks.Task, mesh: Mesh, packed: bool, rows: int, parts: int, decay: float
) -> None:
    """Raises ValueError where parts of a batch, averages and layout do not go together."""
    if not isinstance(parts, int) or parts < 1 or rows % (parts * mesh.size):
        raise ValueError(
            f"accumulate={parts!r} must be a positive integer, and batch_size={rows} a "
            f"multiple of it times {mesh.size} devices"
        )
    if not 0 <= decay < 1:
        raise ValueError(f"ema={decay!r} must be in [0, 1); 0 keeps no average")
    if not packed:
        return
    if decay:
        raise ValueError(
            f"ema={decay} averages dense arrays; with a packed layout say ema=0"
        )
    if mesh.size == 1:
        return
    if parts > 1:
        raise ValueError(
            f"accumulate={parts} on {mesh.size} devices needs layout=masked"
        )
    if shared(jax.eval_shape(task.init, jax.random.key(0))[1]):
        raise ValueError(
            f"batch statistics over {mesh.size} devices need layout=masked, since packed "
            "gradients are made device by device"
        )
