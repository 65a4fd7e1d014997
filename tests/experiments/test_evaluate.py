"""Evaluation from a checkpoint: the numbers of training, without its optimizer."""

import pathlib
import shutil
from typing import Any

import pytest

from experiments import evaluate, log, seal
from experiments.train import train


def test_equals_the_last_evaluation_of_training(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = train(tiny(), tmp_path)
    folder = tmp_path / "checkpoints" / "12"
    (folder / seal.SEAL).unlink()
    for part in ("opt_state", "carry", "data"):
        shutil.rmtree(folder / part)  # not needed, so not read
    before = log.read(tmp_path)
    step, metrics = evaluate.from_workdir(str(tmp_path), "validation")
    assert step == 12
    assert metrics == outcome.metrics
    assert evaluate.from_workdir(str(tmp_path), "test")[1] != metrics
    assert log.read(tmp_path) == before


def test_dense_run(tiny: Any, tmp_path: pathlib.Path) -> None:
    outcome = train(tiny(sparse={"method": "dense"}), tmp_path)
    assert evaluate.from_workdir(str(tmp_path), "validation") == (12, outcome.metrics)


def test_sums_are_weighed_by_their_counts() -> None:
    import grain
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments import mesh as meshes
    from experiments.tasks import Task

    values = [np.array([[1.0], [3.0]]), np.array([[10.0], [np.nan]])]
    counts = [np.array([[1.0], [1.0]]), np.array([[1.0], [0.0]])]

    def metrics(alpha: Any, carry: Any, batch: Any) -> Any:
        weighed = jnp.where(batch["n"] > 0, alpha * batch["x"], 0.0)
        return {"mean": (jnp.sum(weighed), jnp.sum(batch["n"]))}, carry

    def batches(split: str, *, seed: int, loop: bool) -> Any:
        rows = [{"x": x, "n": n} for x, n in zip(values, counts, strict=True)]
        return grain.MapDataset.source(rows).to_iter_dataset()

    task = Task(None, lambda rows: (), None, metrics, batches, {})  # type: ignore[arg-type]
    found = evaluate.evaluator(task, meshes.make(""))(jnp.float32(2.0), "test")
    assert found == {"mean": pytest.approx(2 * 14 / 3)}
    first = evaluate.evaluator(task, meshes.make(""), batches=1)
    assert first(jnp.float32(2.0), "test") == {"mean": pytest.approx(4.0)}
    del jax


def test_what_cannot_be_evaluated(tiny: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint; train there first"):
        evaluate.from_workdir(str(tmp_path), "validation")
    train(tiny(), tmp_path)
    with pytest.raises(ValueError, match="no split 'tset'"):
        evaluate.from_workdir(str(tmp_path), "tset")
