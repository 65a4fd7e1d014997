"""The loop: it trains, survives being killed, and says what goes wrong."""

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
import pytest

import topkast_jax as tk
from configs import quickstart
from experiments import command, log, tasks
from experiments import state as states
from experiments.checkpoint import Checkpoints
from experiments.train import Stopped, train

ROOT = pathlib.Path(__file__).parents[2]
SLOW = pytest.mark.slow
TIMES = ("step_time",)  # all that may differ between two runs of one config


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
    import orbax.checkpoint as ocp

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

        def batches(split: str, *, seed: int, loop: bool) -> Any:
            data = task.batches(split, seed=seed, loop=loop)
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


def test_trains_and_writes_everything(
    tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = train(tiny(dense_steps=2), tmp_path)
    assert outcome.step == 12 and outcome.signal is None
    assert [row["step"] for row in rows(tmp_path, "train")] == [2, 4, 6, 8, 10, 12]
    held_out = rows(tmp_path, "eval")
    assert [row["step"] for row in held_out] == [4, 8, 12]
    assert outcome.metrics["loss"] == held_out[-1]["loss"] < 0.8 * held_out[0]["loss"]
    # Refreshed at 3, 6 and 9, not after the last step; a window may hold none of them.
    with_churn = [row["step"] for row in rows(tmp_path, "train") if "churn" in row]
    assert with_churn == [4, 6, 10]
    (dense,) = rows(tmp_path, "dense")
    assert dense["time_ratio"] > 0 and dense["state_bytes_ratio"] > 1
    row = rows(tmp_path, "train")[-1]
    fraction = (2 * 0.25 + 0.5) / 3
    products = 3 * 2 * 8 * (16 * 32 + 32)  # three, multiply and add, 8 rows
    assert row["flops_fraction"] == pytest.approx(fraction)
    assert row["flops"] == pytest.approx(12 * fraction * products)
    layer = rows(tmp_path, "layers")[-1]
    assert layer["forward"]["hidden/kernel"] == pytest.approx(0.75)
    assert layer["backward"]["hidden/kernel"] == pytest.approx(0.5)
    assert (tmp_path / "summary.png").stat().st_size > 10_000
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert Checkpoints(tmp_path).steps() == [8, 12]
    printed = capsys.readouterr().out
    for word in ("hidden/kernel", "step 12/12", "ms/step", "ETA", "sparsity", "churn"):
        assert word in printed


@pytest.mark.parametrize(
    "method",
    ["dense", "rigl", *(pytest.param(each, marks=SLOW) for each in ("static", "set"))],
)
def test_other_methods_through_the_same_loop(
    tiny: Any, tmp_path: pathlib.Path, method: str
) -> None:
    sparse: dict[str, Any] = {"method": method}
    if method != "dense":
        sparse |= dict(sparsity=0.75, reset="init", where="", axes=(),
                       distribution="uniform")  # fmt: skip
    if method in ("set", "rigl"):
        sparse |= dict(drop_fraction=0.3, drop_decay="cosine", refresh=3,
                       refresh_start=None, refresh_stop=None)  # fmt: skip
    outcome = train(tiny(sparse=sparse), tmp_path)
    kernel = np.asarray(outcome.state.params["hidden"]["kernel"])
    # At least: what the last refresh has grown is zero until the next step.
    assert np.mean(kernel == 0) >= (0.0 if method == "dense" else 0.75)
    assert len(rows(tmp_path, "train")) == 6


def test_nothing_compiles_after_the_first_steps(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[float] = []
    seen: dict[int, int] = {}

    def listen(event: str, seconds: float, **more: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    def hook(number: int, batch: Any) -> Any:
        seen[number] = len(compiled)
        return batch

    hook_training_data(monkeypatch, hook)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train(tiny(), tmp_path)
    finally:
        jax.monitoring.clear_event_listeners()
    assert seen[1] > 0  # the listener hears
    # After the first row, evaluation and checkpoint, at step 4, all is compiled.
    assert seen[2] == seen[1] and seen[5] == seen[12]


@pytest.mark.parametrize(("number", "what"), [(4, signal.SIGINT), (7, signal.SIGTERM)])
def test_interrupted_and_resumed_equals_uninterrupted(
    tiny: Any,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    what: signal.Signals,
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny(), whole)
    with monkeypatch.context() as patched:
        hook_training_data(patched, kill_at(number, what))
        left = train(tiny(), parts)
    assert left.signal == what and left.step == number
    done = train(tiny(), parts)
    assert done.step == 12 and done.signal is None
    assert_same_run(whole, parts)
    steps = [(row["kind"], row["step"]) for row in rows(parts)]
    assert len(steps) == len(set(steps))


def test_killed_outright_goes_on_from_the_checkpoint(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after kill -9: rows after the checkpoint are written once only."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny(), whole)

    class Gone(BaseException):
        pass

    def hook(number: int, batch: Any) -> Any:
        if number == 8:
            raise Gone
        return batch

    with monkeypatch.context() as patched:
        hook_training_data(patched, hook)
        with pytest.raises(Gone):
            train(tiny(), parts)
    assert rows(parts)[-1]["step"] == 6
    with (parts / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 7, "ki')
    assert Checkpoints(parts).steps() == [4]
    train(tiny(), parts)
    assert_same_run(whole, parts)


def test_a_finished_run_has_nothing_to_do(tiny: Any, tmp_path: pathlib.Path) -> None:
    first = train(tiny(), tmp_path)
    before = rows(tmp_path)
    again = train(tiny(), tmp_path)
    assert again.step == 12 and again.metrics == first.metrics
    assert rows(tmp_path) == before
    assert_same(again.state, first.state)


def test_damaged_newest_checkpoint(
    tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for workdir in (whole, parts):
        train(tiny(), workdir)
    files = (parts / "checkpoints" / "12" / "params").rglob("*")
    victim = max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-7])
    train(tiny(), parts)
    assert "falling back from checkpoint 12 to 8" in capsys.readouterr().err
    assert (parts / "damaged" / "12").is_dir()
    assert_same_run(whole, parts)


def test_a_workdir_of_another_config(tiny: Any, tmp_path: pathlib.Path) -> None:
    train(tiny(), tmp_path)
    before = rows(tmp_path)
    other = tiny(seed=1, sparse__penalty=1e-3, steps=20)
    with pytest.raises(command.BadInput) as caught:
        train(other, tmp_path)
    message = str(caught.value)
    assert "seed was 0, is 1" in message
    assert "steps was 12, is 20" in message
    assert "sparse.penalty was 'absent', is 0.001" in message
    assert rows(tmp_path) == before
    # What only says when to look may change.
    assert train(tiny(log_every=3, on_nan="skip", keep=5), tmp_path).step == 12


def test_another_mesh_may_go_on(
    tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny(), tmp_path)
    train(tiny(mesh="fsdp:1", log_every=3), tmp_path)
    printed = capsys.readouterr().out
    assert "since the checkpoint: mesh was 'data:1', is 'fsdp:1'" in printed


def test_a_run_that_begins_takes_nothing_over(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a run that was killed before its first checkpoint are not this run's."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "kind": "dense", "x": 1}\n')
    train(tiny(), tmp_path)
    assert rows(tmp_path, "dense") == []


def test_nan_stops(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook_training_data(monkeypatch, poison({7}))
    with pytest.raises(Stopped) as caught:
        train(tiny(), tmp_path)
    message = str(caught.value)
    assert message.startswith(
        "step 6, batch 7: loss is NaN or Inf; gradient of hidden/"
    )
    assert "on_nan=skip" in message
    assert Checkpoints(tmp_path).steps() == [4]  # the good one is still the newest


def test_nan_is_skipped(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook_training_data(monkeypatch, poison({6, 7}))
    outcome = train(tiny(on_nan="skip"), tmp_path)
    assert outcome.step == 12
    assert rows(tmp_path, "train")[-1]["skipped"] == 2
    assert all(row["loss"] is not None for row in rows(tmp_path, "train"))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(outcome.state))
    (inner,) = [outcome.state.opt_state]
    assert int(inner.sparse_step) == 10  # two updates were not made


def test_nan_without_end_stops_skipping(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook_training_data(monkeypatch, poison(set(range(5, 99))))
    monkeypatch.setattr("experiments.train.MOST_SKIPS", 4)
    with pytest.raises(Stopped, match="The last 4 steps were all like it"):
        train(tiny(on_nan="skip"), tmp_path)


def test_nan_restores(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back to the checkpoint at 4, then on without batches 5 and 7, as if not there."""
    hook_training_data(monkeypatch, poison({5, 7}))
    outcome = train(tiny(on_nan="restore"), tmp_path)
    assert outcome.step == 12
    assert int(outcome.state.opt_state.sparse_step) == 12
    steps = [(row["kind"], row["step"]) for row in rows(tmp_path)]
    assert len(steps) == len(set(steps)) and ("train", 12) in steps
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(outcome.state))


def test_nan_without_end_stops_restoring(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook_training_data(monkeypatch, poison(set(range(1, 99))))
    with pytest.raises(Stopped, match="Going back 3 times did not help"):
        train(tiny(on_nan="restore"), tmp_path)


def test_blame_names_what_was_not_finite() -> None:
    params = {"a": {"kernel": np.zeros((2, 3))}, "b": np.zeros(4), "c": np.zeros(5)}
    in_loss_and_gradient = np.array([1, 0, 2, 5, 0, 0, 0])
    assert states.blame(in_loss_and_gradient, params) == (
        "loss is NaN or Inf; gradient of b: 2 of 4 entries, and 1 more"
    )
    assert not states.was_applied(in_loss_and_gradient)
    in_update = np.array([0, 0, 0, 0, 6, 0, 0])
    said = states.blame(in_update, params)
    assert said == "new value of a/kernel: 6 of 6 entries"
    assert states.was_applied(in_update)


def test_a_gradient_on_dead_weights_stops(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that forgets the masks is noticed at the next evaluation."""
    monkeypatch.setattr(states, "alpha", lambda params, opt_state, sparse: params)
    with pytest.raises(Stopped, match="step 4: in 4 updates the gradient was nonzero"):
        train(tiny(), tmp_path)


def test_quickstart_smoke(tmp_path: pathlib.Path) -> None:
    """The real model on the real text, 8 steps."""
    config = quickstart.get_config("smoke")
    config.data_dir = str(tmp_path / "data")
    outcome = train(config, tmp_path / "run")
    assert outcome.step == 8 and 0 < outcome.metrics["bits_per_byte"] < 9
    state = outcome.state
    kernel = state.params["block_0"]["feed_forward"]["in"]["kernel"]
    mask = tk.masks(state.opt_state).forward["block_0"]["feed_forward"]["in"]["kernel"]
    assert int(mask.sum()) == round(0.1 * kernel.size)


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


@SLOW
@pytest.mark.parametrize("mesh", ["data:1", "data:4,fsdp:2"])
def test_the_program_is_terminated_and_resumed(
    tmp_path: pathlib.Path, mesh: str
) -> None:
    """SIGTERM on the real program: 143, and the same command gives the same run."""
    arguments = [
        "--config=configs/quickstart.py:smoke",
        "--config.steps=60",
        f"--config.mesh={mesh}",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = run_program(whole, *arguments)
    assert "finished" in process.communicate()[0] and process.returncode == 0
    process = run_program(parts, *arguments)
    for line in process.stdout:
        if line.startswith("step 10/"):
            break
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM
    process = run_program(parts, *arguments)
    assert "going on from step" in process.communicate()[0]
    assert process.returncode == 0
    assert_same_run(whole, parts)


@SLOW
def test_eight_devices(tmp_path: pathlib.Path) -> None:
    """The same losses, to rounding, on one device and on eight."""
    found = []
    for mesh in ("data:1", "data:4,fsdp:2"):
        workdir = tmp_path / mesh
        config = "--config=configs/quickstart.py:smoke"
        process = run_program(workdir, config, f"--config.mesh={mesh}")
        text = process.communicate()[0]
        assert process.returncode == 0, text
        found.append([row["loss"] for row in rows(workdir, "train")])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
