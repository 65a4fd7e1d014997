"""Evaluates the newest checkpoint of a workdir, without its optimizer.

    python -m experiments.evaluate --workdir=runs/quickstart [--split=test]

Reads the parameters, the masks and the config from the checkpoint, and prints one line
per metric. Exit code 2 with one line on stderr where there is nothing to evaluate.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

from experiments import checkpoint, command, log, tasks
from experiments import mesh as meshes
from experiments.config import Watched
from experiments.state import placed
from experiments.tasks.shared import shared, with_shared

PyTree = Any
Evaluate = Callable[..., dict[str, float]]


def evaluator(task: tasks.Task, mesh: Mesh, batches: int | None = None) -> Evaluate:
    """`(alpha, split, shared) -> {metric: mean}` over one pass of a split, in order.

    Sums and counts are added in double precision, so every target counts once, however
    ragged the last batch is. The carry starts afresh, but for what is shared, which is
    that of training (see `experiments.tasks.shared`).

    Args:
      task: metrics and data.
      mesh: over which batches are cut.
      batches: how many to read; None for all of the split.
    Raises:
      ValueError: `batches` is below 1.
    """
    if batches is not None and batches < 1:
        raise ValueError(f"eval_batches={batches} must be at least 1, or None for all")
    metrics = jax.jit(task.metrics, donate_argnums=1)

    def evaluate(
        alpha: PyTree, split: str, common: Sequence[Any] = ()
    ) -> dict[str, float]:
        totals: dict[str, np.ndarray] = {}
        carry = None
        for batch in itertools.islice(task.batches(split, seed=0, loop=False), batches):
            placed = meshes.place(batch, meshes.batch_shardings(mesh, batch, "batch"))
            if carry is None:
                carry = task.carry(jax.tree.leaves(batch)[0].shape[0])
                shardings = meshes.batch_shardings(mesh, carry, "carry")
                carry = with_shared(meshes.place(carry, shardings), _copied(common))
            sums, carry = metrics(alpha, carry, placed)
            for name, pair in jax.device_get(sums).items():
                totals[name] = totals.get(name, 0.0) + np.asarray(pair, np.float64)
        if not totals:
            raise ValueError(f"the split {split!r} has no batch to evaluate on")
        return task.report(
            {name: float(total / count) for name, (total, count) in totals.items()}
        )

    return evaluate


def _copied(values: Sequence[Any]) -> Sequence[Any]:
    """The metrics donate their carry, and training goes on with its own."""
    return jax.tree.map(jnp.copy, values)


class Run(NamedTuple):
    """The newest checkpoint of a workdir, without its optimizer."""

    task: tasks.Task
    mesh: Mesh
    config: Watched
    weights: checkpoint.Weights


def read(workdir: str) -> Run:
    """Reads what a run left; nothing in its folder changes.

    Raises:
      ValueError: no checkpoint, or none that can be read.
    """
    made: dict[str, Any] = {}

    def prepare(meta: Mapping[str, Any]) -> tuple[PyTree, list[Any]]:
        config = Watched(meta["config"])
        task = tasks.make(config)
        mesh = meshes.make(config.mesh)
        params, carry = jax.eval_shape(task.init, jax.random.key(0))
        shardings = meshes.parameter_shardings(mesh, config.sharding, params)
        made.update(task=task, mesh=mesh, config=config)
        common = shared(carry)
        everywhere = jax.tree.map(lambda _: meshes.replicated(mesh), common)
        return placed(params, shardings), placed(common, everywhere)

    found = checkpoint.Checkpoints(workdir, warn=log.warn).weights(prepare)
    if found is None:
        raise ValueError(f"{workdir} holds no checkpoint; train there first")
    return Run(**made, weights=found)


def from_workdir(workdir: str, split: str) -> tuple[int, dict[str, float]]:
    """Step of the newest checkpoint, and its metrics on a split.

    Args:
      workdir: folder of a run; nothing in it changes.
      split: as the task names it.
    Raises:
      ValueError: no checkpoint, none that can be read, or no such split.
    """
    run = read(workdir)
    evaluate = evaluator(run.task, run.mesh, run.config.eval_batches)
    weights = run.weights
    return weights.meta["step"], evaluate(weights.alpha, split, weights.shared)


def main(argv: list[str]) -> int:
    """Evaluates, and prints."""
    del argv
    workdir, split = flags.FLAGS.workdir, flags.FLAGS.split
    if workdir is None:
        raise command.BadInput("--workdir is missing: the folder of a run")
    try:
        step, metrics = from_workdir(workdir, split)
    except ValueError as error:
        raise command.BadInput(str(error)) from error
    print(f"{workdir}, step {step}, {split}:")
    for name, value in metrics.items():
        print(f"  {name} {value:.6f}")
    return 0


if __name__ == "__main__":
    # Only here: train.py imports this file and has flags of its own.
    flags.DEFINE_string("workdir", None, "Folder of a run.")
    flags.DEFINE_string("split", "validation", "Which split to evaluate on.")
    command.run(main)
