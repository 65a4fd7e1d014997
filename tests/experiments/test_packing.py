"""The packed layouts in the loop: same run as masked, resumed, evaluated, recovered."""

import pathlib
import signal
from typing import Any

import jax
import numpy as np
import pytest
from runs import assert_same, hook_training_data, kill_at, rows

import topkast_jax as tk
from experiments import assembly, command, evaluate, packing
from experiments.checkpoint import Checkpoints
from experiments.config import Watched
from experiments.train import train

RIGL: dict[str, Any] = dict(
    method="rigl", sparsity=0.75, drop_fraction=0.3, drop_decay="constant", refresh=3,
    refresh_start=None, refresh_stop=None, reset="init", where="", axes=(),
    distribution="uniform",
)  # fmt: skip


def packed(tiny: Any, method: str = "top_kast", **changes: Any) -> Any:
    config = tiny(**({"sparse": dict(RIGL)} if method == "rigl" else {}), **changes)
    config.sparse.layout = "packed"
    return config


def numbers(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return rows(workdir, "train") + rows(workdir, "eval")


@pytest.mark.parametrize(
    "method", ["rigl", pytest.param("top_kast", marks=pytest.mark.slow)]
)
def test_the_same_run_as_masked(tiny: Any, tmp_path: pathlib.Path, method: str) -> None:
    masked = packed(tiny, method)
    masked.sparse.layout = "masked"
    one, two = tmp_path / "masked", tmp_path / "packed"
    train(masked, one)
    outcome = train(packed(tiny, method), two)
    for expected, found in zip(numbers(one), numbers(two), strict=True):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            if name == "flops_fraction" and method == "rigl":
                continue  # a packed probe is a pass of its own, not counted yet
            if name != "kind" and "flops" not in name:
                assert found[name] == pytest.approx(value, rel=1e-4), name
    # B of 16 x 32, half of it.
    kept = 256 if method == "top_kast" else 128
    assert outcome.state.params["hidden"]["kernel"].shape == (kept,)


@pytest.mark.parametrize(
    ("method", "stop", "number"),
    [
        ("top_kast", 6, 8),
        ("rigl", None, 4),
        pytest.param("top_kast", 6, 4, marks=pytest.mark.slow),
        pytest.param("rigl", None, 8, marks=pytest.mark.slow),
    ],
)
def test_interrupted_and_resumed_equals_uninterrupted(
    tiny: Any,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    stop: int | None,
    number: int,
) -> None:
    """Before and after B shrinks to A, and with a probe."""

    def config() -> Any:
        made = packed(tiny, method)
        if stop is not None:
            made.sparse.stop = stop
        return made

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = train(config(), whole)
    with monkeypatch.context() as patched:
        hook_training_data(patched, kill_at(number, signal.SIGTERM))
        left = train(config(), parts)
    assert left.step == number
    done = train(config(), parts)
    assert done.step == 12 and numbers(whole) == numbers(parts)
    assert_same(first.state, done.state)
    if stop is not None:
        assert done.state.params["hidden"]["kernel"].shape == (128,)
    reservoirs = [
        tk.load_store(Checkpoints(w).folder / "12" / packing.RESERVOIR)
        for w in (whole, parts)
    ]
    assert_same(reservoirs[0].theta, reservoirs[1].theta)


def test_evaluation_reads_positions(tiny: Any, tmp_path: pathlib.Path) -> None:
    outcome = train(packed(tiny), tmp_path)
    step, metrics = evaluate.from_workdir(str(tmp_path), "validation")
    assert step == 12
    assert metrics["loss"] == pytest.approx(outcome.metrics["loss"], rel=1e-6)


def test_a_damaged_reservoir_falls_back(
    tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for workdir in (whole, parts):
        train(packed(tiny), workdir)
    victim = parts / "checkpoints" / "12" / packing.RESERVOIR / "0.bin"
    victim.write_bytes(victim.read_bytes()[:-7])
    train(packed(tiny), parts)
    assert "falling back from checkpoint 12 to 8" in capsys.readouterr().err
    assert numbers(whole) == numbers(parts)


def test_steps_without_effect_do_not_shift_the_schedule(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks are refreshed after every third update, not after every third step."""

    def poison(number: int, batch: Any) -> Any:
        return {**batch, "x": batch["x"] * np.nan} if number in (2, 7) else batch

    hook_training_data(monkeypatch, poison)
    masked = tiny(on_nan="skip", log_every=1)
    one, two = tmp_path / "masked", tmp_path / "packed"
    train(masked, one)
    outcome = train(packed(tiny, on_nan="skip", log_every=1), two)
    assert int(outcome.state.opt_state.sparse_step) == 10
    churned = [
        [row["step"] for row in rows(workdir, "train") if row.get("churn")]
        for workdir in (one, two)
    ]
    assert churned[0] == churned[1] and len(churned[0]) == 3


def test_bytes_are_told_and_too_few_are_an_error(
    tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The reservoir: 16 x 32 and 32 x 1 floats."""
    train(packed(tiny), tmp_path / "fits")
    printed = capsys.readouterr().out
    assert "reservoir 0.0 MiB on the host" in printed
    run = assembly.assemble(Watched(packed(tiny)))
    needed = packing.needs(run.abstract(), True)
    assert needed.host == 4 * (16 * 32 + 32)
    state, _ = run.begin()
    assert needed.device == sum(x.nbytes for x in jax.tree.leaves(state))
    assert packing.needs(run.abstract(), False).host == 0
    for free, where in (
        (packing.Needs(needed.device - 1, needed.host), "device"),
        (packing.Needs(needed.device, needed.host - 1), "host"),
    ):
        with pytest.raises(ValueError, match=f"on the {where}, and there are"):
            packing.require_memory(needed, free)
    monkeypatch.setattr(packing.os, "sysconf", lambda name: 1)
    with pytest.raises(command.BadInput, match="on the host, and there are 0 MiB"):
        train(packed(tiny), tmp_path / "does not")
    assert not (tmp_path / "does not").exists()


def test_killed_before_the_halves_of_a_checkpoint_were_put_together(
    tiny: Any, tmp_path: pathlib.Path
) -> None:
    """As after kill -9: the reservoir lies beside the newest checkpoint, not in it."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for workdir in (whole, parts):
        train(packed(tiny), workdir)
    folder = parts / "checkpoints"
    (folder / "12" / packing.RESERVOIR).rename(folder / f"{packing.RESERVOIR}-12")
    (folder / "12" / "sha256.json").unlink()
    (folder / f"{packing.RESERVOIR}-16.tmp").mkdir()  # of a save cut off later
    assert train(packed(tiny), parts).step == 12
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["12", "8"] and not (parts / "damaged").exists()
    one, two = (
        tk.load_store(w / "checkpoints" / "12" / packing.RESERVOIR)
        for w in (whole, parts)
    )
    assert_same(one.theta, two.theta)


def test_a_lag_of_the_schedule_survives_a_resume(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step without effect, a resume, and then `stop` falls one step later."""

    def poison(number: int, batch: Any) -> Any:
        return {**batch, "x": batch["x"] * np.nan} if number == 2 else batch

    def config() -> Any:
        made = packed(tiny, on_nan="skip")
        made.sparse.stop = 8
        return made

    def poison_and_kill(number: int, batch: Any) -> Any:
        return kill_at(8, signal.SIGTERM)(number, poison(number, batch))

    with monkeypatch.context() as patched:
        hook_training_data(patched, poison_and_kill)
        assert train(config(), tmp_path).step == 8
    hook_training_data(monkeypatch, poison)
    done = train(config(), tmp_path)
    assert done.state.params["hidden"]["kernel"].shape == (128,)
