"""The packed layouts in the loop: same run as masked, resumed, evaluated, recovered."""

import pathlib
import shutil
import signal
import time
from typing import Any

import jax
import numpy as np
import pytest
from runs import assert_same, hook_training_data, kill_at, raw, rows, run_program

import topkast_jax as tk
from configs import quickstart
from experiments import assembly, budget, command, evaluate, packing, position
from experiments.config import Watched
from experiments.train import Stopped, train

RIGL: dict[str, Any] = dict(
    method="rigl", sparsity=0.75, drop_fraction=0.3, drop_decay="constant", refresh=3,
    refresh_start=None, refresh_stop=None, reset="init", where="", axes=(),
    distribution="uniform",
)  # fmt: skip


GSE = RIGL | dict(method="gse", subset=1.5)


def packed(tiny: Any, method: str = "top_kast", **changes: Any) -> Any:
    own = {"rigl": RIGL, "gse": GSE}
    config = tiny(**({"sparse": dict(own[method])} if method in own else {}), **changes)
    config.sparse.layout = "packed"
    return config


def numbers(workdir: pathlib.Path) -> list[dict[str, Any]]:
    return rows(workdir, "train") + rows(workdir, "eval")


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, marks=pytest.mark.slow) for m in ("rigl", "gse", "top_kast")],
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
            if name == "flops_fraction" and method in ("rigl", "gse"):
                # A packed probe is a pass of its own for each parameter.
                assert found[name] >= value
                continue
            if name != "kind" and "flops" not in name:
                assert found[name] == pytest.approx(value, rel=1e-4), name
    # B of 16 x 32, half of it.
    kept = 256 if method == "top_kast" else 128
    assert outcome.state.params["hidden"]["kernel"].shape == (kept,)


def test_flops_of_a_packed_probe(tiny: Any, tmp_path: pathlib.Path) -> None:
    """Two parameters: twice forward and back with A, and each dense gradient once."""
    run = assembly.assemble(Watched(packed(tiny, "rigl")))
    state, _ = run.begin(tmp_path)
    masks, uses = tk.masks(state.opt_state), run.task.uses
    quiet, probed = (
        position.flops(state.params, masks, uses, [probes], apart=True)[0]
        for probes in (False, True)
    )
    kept = 128 * uses["hidden/kernel"] + 8 * uses["out/kernel"]
    whole = 512 * uses["hidden/kernel"] + 32 * uses["out/kernel"]
    assert quiet == 2 * 3 * kept
    assert probed - quiet == 2 * (2 * 2 * kept) + 2 * whole


def test_flops_of_drawn_candidates(tiny: Any, tmp_path: pathlib.Path) -> None:
    """One pass for all parameters, whose gradient is that of B and of what was drawn."""
    run = assembly.assemble(Watched(packed(tiny, "gse")))
    state, _ = run.begin(tmp_path)
    masks, uses = tk.masks(state.opt_state), run.task.uses
    quiet, apart, within = (
        position.flops(state.params, masks, uses, [probes], apart, drawn=1.5)[0]
        for probes, apart in ((False, True), (True, True), (True, False))
    )
    kept = 128 * uses["hidden/kernel"] + 8 * uses["out/kernel"]
    assert quiet == 2 * 3 * kept
    assert within - quiet == 1.5 * 2 * kept
    assert apart - quiet == 1.5 * 2 * kept + quiet


def test_statistics_need_a_model_that_can_be_observed(tiny: Any) -> None:
    config = packed(tiny, "gse")
    config.sparse.candidates = "grabo"
    with pytest.raises(ValueError, match="task='tiny' is not called through tk.flax"):
        assembly.assemble(Watched(config))


@pytest.mark.parametrize(
    ("method", "stop", "number"),
    [
        ("top_kast", 6, 8),
        pytest.param("gse", None, 8, marks=pytest.mark.slow),
        pytest.param("rigl", None, 4, marks=pytest.mark.slow),
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
    if method == "top_kast":
        assert_same(off_b(whole, first.state), off_b(parts, done.state))


def off_b(workdir: pathlib.Path, state: Any) -> Any:
    """The reservoir of a finished run, zero in B: what is there is out of date."""
    journal = tk.Journal(workdir / packing.RESERVOIR / "0001")
    theta = journal.load(journal.records).theta
    marks = tk.dense_masks(state.opt_state).backward["hidden"]["kernel"]
    grid = tk.masks(state.opt_state).forward["hidden"]["kernel"].grid
    found = theta["hidden/kernel"].copy()
    found[grid.to_units(np.asarray(marks))] = 0
    return found


def test_evaluation_reads_positions(tiny: Any, tmp_path: pathlib.Path) -> None:
    outcome = train(packed(tiny), tmp_path)
    step, metrics = evaluate.from_workdir(str(tmp_path), "validation")
    assert step == 12
    assert metrics["loss"] == pytest.approx(outcome.metrics["loss"], rel=1e-6)


def test_a_damaged_record_falls_back(
    tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last refresh is at step 9, after the checkpoint of step 8."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for workdir in (whole, parts):
        train(packed(tiny), workdir)
    folder = parts / packing.RESERVOIR / "0001"
    assert [f.name for f in sorted(folder.glob("record-*"))][
        -1
    ] == "record-00000003.bin"
    victim = folder / "record-00000003.bin"
    victim.write_bytes(victim.read_bytes()[:-7])
    train(packed(tiny), parts)
    said = capsys.readouterr().err
    assert "falling back from checkpoint 12 to 8" in said
    assert "record-00000003.bin" in said and "cut short" in said
    assert numbers(whole) == numbers(parts)


def test_a_reservoir_in_files(tiny: Any, tmp_path: pathlib.Path) -> None:
    """The same run; and again after what lies in the files has moved on."""
    outcomes = []
    for where in ("memory", "files"):
        config = packed(tiny)
        config.sparse.reservoir = where
        outcomes.append(train(config, tmp_path / where).state)
    assert_same(*outcomes)
    store = tk.load_store(tmp_path / "files" / packing.THETA, mapped=True)
    assert store.nbytes == 4 * (16 * 32 + 32)
    store.theta["hidden/kernel"][...] = np.nan  # as after kill -9 within a refresh
    store.seal()
    shutil.rmtree(tmp_path / "files" / "checkpoints" / "12")
    config.sparse.reservoir = "files"
    assert_same(outcomes[0], train(config, tmp_path / "files").state)


def test_a_crash_before_the_first_save_in_another_layout(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of the old layout still has its reservoir; later it goes."""
    stays, moves = tmp_path / "stays", tmp_path / "moves"
    train(packed(tiny), stays)
    with monkeypatch.context() as patched:
        hook_training_data(patched, kill_at(4, signal.SIGTERM))
        train(packed(tiny), moves)
    block = packed(tiny)
    block.sparse.layout = "block"

    def crash(number: int, batch: Any) -> Any:
        if number == 6:
            raise OSError("no data")
        return batch

    with monkeypatch.context() as patched:
        hook_training_data(patched, crash)
        with pytest.raises(OSError, match="no data"):
            train(block, moves)
    train(block, moves)
    folders = sorted(f.name for f in (moves / packing.RESERVOIR).iterdir())
    assert folders == ["0003"]  # 8 and 12 are kept; of the crash nothing is
    one, two = (rows(workdir, "eval")[-1] for workdir in (stays, moves))
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_an_old_checkpoint_that_cannot_be_read_stops_nothing(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        hook_training_data(patched, kill_at(8, signal.SIGTERM))
        train(packed(tiny), tmp_path)
    for file in (tmp_path / "checkpoints" / "4").rglob("metadata"):
        file.write_text("{")
    assert train(packed(tiny), tmp_path).step == 12


@pytest.mark.parametrize("on_nan", ["stop", "restore"])
def test_weights_that_are_not_finite_at_a_refresh(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, on_nan: str
) -> None:
    """The gradient is finite, the update is not, and masks are due: as when masked."""

    def explode(number: int, batch: Any) -> Any:
        return {**batch, "x": batch["x"] * 1e15} if number == 3 else batch

    config = packed(tiny, on_nan=on_nan)
    config.optimizer = {"name": "sgd", "clip": 0.0}
    config.learning_rate.update(peak=1e30, end=1e30)
    hook_training_data(monkeypatch, explode)
    with pytest.raises(Stopped, match="new value of|loss is NaN|did not help"):
        train(config, tmp_path)


@pytest.mark.parametrize(
    ("method", "number"),
    [
        ("top_kast", 7),
        *(pytest.param("rigl", n, marks=pytest.mark.slow) for n in (4, 7)),
    ],
)
def test_delayed_masks_and_an_interruption_between(
    tiny: Any,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    number: int,
) -> None:
    """Chosen after 3, 6 and 9, in force after 5, 8 and 11; saved only in between."""

    def config(layout: str) -> Any:
        made = packed(tiny, method)
        made.sparse.update(layout=layout, refresh_delay=2)
        return made

    masked, whole, parts = (tmp_path / name for name in ("masked", "whole", "parts"))
    train(config("masked"), masked)
    first = train(config("packed"), whole)
    with monkeypatch.context() as patched:
        hook_training_data(patched, kill_at(number, signal.SIGTERM))
        left = train(config("packed"), parts)
    assert left.step == (8 if number == 7 else 5)
    done = train(config("packed"), parts)
    assert done.step == 12
    assert_same(first.state, done.state)
    for expected, found in zip(numbers(masked), numbers(whole), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found.get("churn", 0) == pytest.approx(
            expected.get("churn", 0), rel=1e-4
        )
    churned = [row["step"] for row in rows(whole, "train") if row.get("churn")]
    assert churned == [6, 8, 12]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "candidates"),
    [
        ("masked", "grabo"),
        ("packed", "graest"),
        ("block,structure=fan_in:1x32", "grabo"),
    ],
)
def test_statistics_out_of_the_quickstart(
    tmp_path: pathlib.Path, layout: str, candidates: str
) -> None:
    config = quickstart.get_config(f"method=gse,smoke,layout={layout}")
    config.sparse.candidates = candidates
    train(config, tmp_path)
    churned = [row["churn"] for row in rows(tmp_path, "train")]
    assert len(churned) == 4 and max(churned) > 0


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 1])
def test_kill_9_at_any_moment(tmp_path: pathlib.Path, delay: int) -> None:
    """Refreshes, saves and compactions all the time, and the process shot twice."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = [
        "--config.sparse.refresh=2", f"--config.sparse.refresh_delay={delay}",
        "--config.steps=120", "--config.save_every=3", "--config.sparse.reservoir=files",
    ]  # fmt: skip
    arguments.insert(0, "--config=configs/quickstart.py:smoke,layout=packed")

    def run(workdir: pathlib.Path, shot_after: float | None = None) -> None:
        with run_program(workdir, *arguments) as child:
            said = []
            for said_now in child.stdout:
                said.append(said_now)
                if shot_after is not None and said_now.startswith("step "):
                    time.sleep(shot_after)
                    child.kill()
                    shot_after = None
        assert child.returncode in (0, -signal.SIGKILL), "".join(said)

    run(whole)
    for seconds in (0.15, 0.4, None):
        run(parts, seconds)
    assert numbers(whole)[-1] == numbers(parts)[-1]
    assert_same(raw(whole), raw(parts))
    assert not list((parts / packing.RESERVOIR).rglob("*.tmp"))


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


THETA = 4 * (16 * 32 + 32)
"""Bytes of the reservoir of the tiny task."""


def test_bytes_are_told(
    tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = packed(tiny, sparse__reservoir="files")
    train(config, tmp_path)
    printed = capsys.readouterr().out
    assert printed.index("what this run takes:") < printed.index("compiled the step")
    for line in ("device: optimizer state", "host: theta", "disk: journal, at most"):
        assert f"  {line}" in printed
    run = assembly.assemble(Watched(config))
    needed = packing.needs(run.abstract(), True)
    assert needed.theta == THETA and needed.disk == 2 * THETA
    state, _ = run.begin(tmp_path / "begun")
    held = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    assert needed.parameters + needed.positions + needed.moments == held
    without = packing.needs(run.abstract(), False)
    assert without.theta == without.disk == 0 < without.work < needed.work
    # Base, records and mapped files are within what was said.
    written = sum(
        file.stat().st_size
        for folder in (packing.THETA, packing.RESERVOIR)
        for file in (tmp_path / folder).rglob("*.bin")
    )
    assert THETA <= written <= THETA + needed.disk


@pytest.mark.parametrize(
    ("where", "scarce", "message"),
    [
        ("memory", "host", "memory, device and host in one: .* are needed, and "),
        ("files", "files", "^files: "),
        ("files", "disk", "^disk: "),
        ("memory", "disk", "^disk: "),
    ],
)
@pytest.mark.parametrize("goes_on", [False, True])
def test_too_few_bytes_are_an_error(
    where: str, scarce: str, message: str, goes_on: bool, tiny: Any,
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Before anything is made, and before a reservoir that is there is read."""
    config = packed(tiny, sparse__reservoir=where)
    workdir = tmp_path / "run"
    if goes_on:
        train(config, workdir)
        config.steps += 4
    there = budget.room

    def little(files: str | None, journal: str | None = None) -> budget.Room:
        found = there(files, journal)
        assert (found.files is not None) == (where == "files")
        return found._replace(**{scarce: THETA - 1})

    monkeypatch.setattr(budget, "room", little)
    monkeypatch.setattr(packing, "recall", lambda *a: pytest.fail("was read"))
    with pytest.raises(command.BadInput, match=message):
        train(config, workdir)
    assert workdir.exists() == goes_on


def test_files_that_will_be_replaced_count_as_free(tmp_path: pathlib.Path) -> None:
    (tmp_path / "theta").mkdir()
    (tmp_path / "theta" / "x.bin").write_bytes(bytes(2**24))
    free = shutil.disk_usage(tmp_path).free
    found = budget.room(str(tmp_path / "theta"), str(tmp_path / "journal")).files
    assert found is not None and abs(found - free - 2**24) < 2**23


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
