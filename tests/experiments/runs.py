"""What tests of the training loop share: reading runs, and disturbing them."""

import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import log, tasks
from experiments.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[2]
TIMES = (
    "step_time",
    "rows_per_second",
    "tokens_per_second",
    "mfu",
)  # all that may differ between two runs of one config


def rows(workdir: pathlib.Path, kind: str | None = None) -> list[dict[str, Any]]:
    found = [row for row in log.read(workdir) if kind in (None, row["kind"])]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found]


def assert_same(one: Any, two: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def assert_same_run(one: pathlib.Path, two: pathlib.Path) -> None:
    """Rows, but for times, and every array and the data position, bit for bit."""
    assert rows(one) == rows(two)
    saved = [raw(workdir) for workdir in (one, two)]
    assert_same(*saved)


def raw(workdir: pathlib.Path) -> Any:
    """Everything in the newest checkpoint that must not depend on how it came about."""
    folder = Checkpoints(workdir).folder
    newest = folder / str(Checkpoints(workdir).steps()[-1])
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    names = ("params", "opt_state", "carry")
    parts = {name: ocp.args.StandardRestore(fallback_sharding=here) for name in names}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        found = reader.restore(
            newest, args=ocp.args.Composite(**parts, data=ocp.args.JsonRestore(),
                                            meta=ocp.args.JsonRestore())
        )  # fmt: skip
    return {
        **{name: found[name] for name in parts},
        "data": json.dumps(found["data"]),
        "position": json.dumps(found["meta"]["position"]),
    }


class Hooked:
    """An iterator of batches that calls `hook(number, batch)` on each, from 1 on.

    The number follows the position of the data, also when that is set back.
    """

    def __init__(self, inner: Any, hook: Callable[[int, Any], Any]) -> None:
        self.inner, self.hook = inner, hook

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = next(self.inner)
        return self.hook(self.inner.get_state()["next_index"], batch)

    def get_state(self) -> Any:
        return self.inner.get_state()

    def set_state(self, state: Any) -> None:
        self.inner.set_state(state)


class HookedData:
    def __init__(self, inner: Any, hook: Callable[[int, Any], Any]) -> None:
        self.inner, self.hook = inner, hook

    def __iter__(self) -> Hooked:
        return Hooked(iter(self.inner), self.hook)


def hook_training_data(
    monkeypatch: pytest.MonkeyPatch, hook: Callable[[int, Any], Any]
) -> None:
    """Every task's training batches go through `hook(number, batch)`."""
    make = tasks.make

    def hooked(config: Any) -> tasks.Task:
        task = make(config)

        def batches(split: str, *, loop: bool, **how: Any) -> Any:
            data = task.batches(split, loop=loop, **how)
            return HookedData(data, hook) if loop else data

        return task._replace(batches=batches)

    monkeypatch.setattr(tasks, "make", hooked)


def poison(numbers: set[int]) -> Callable[[int, Any], Any]:
    def hook(number: int, batch: Any) -> Any:
        return {**batch, "x": batch["x"] * np.nan} if number in numbers else batch

    return hook


def kill_at(number: int, what: signal.Signals) -> Callable[[int, Any], Any]:
    def hook(at: int, batch: Any) -> Any:
        if at == number:
            os.kill(os.getpid(), what)
        return batch

    return hook


def run_program(workdir: pathlib.Path, config: str, *arguments: str) -> Any:
    """The real program, on eight pretended devices."""
    command_line = [
        *(sys.executable, "-u", "-m", "experiments.train"),
        *(f"--workdir={workdir}", config, *arguments),
        *("--config.dense_steps=0", f"--config.data_dir={workdir.parent / 'data'}"),
    ]
    environment = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        command_line,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    )
