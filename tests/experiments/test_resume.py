"""A run that is stopped, killed or damaged goes on as if nothing had been."""

import pathlib
import signal
from typing import Any

import numpy as np
import pytest
from runs import (
    assert_same,
    assert_same_run,
    hook_training_data,
    kill_at,
    rows,
    run_program,
)

from experiments import command
from experiments.checkpoint import Checkpoints
from experiments.train import train

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("number", "what"),
    [(4, signal.SIGINT), pytest.param(7, signal.SIGTERM, marks=SLOW)],
)
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
