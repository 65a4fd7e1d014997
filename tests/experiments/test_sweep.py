"""A sweep runs its jobs once, survives what goes wrong, and says what came out."""

import concurrent.futures
import fcntl
import json
import math
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from runs import ROOT

import topkast_jax as tk
from configs.sweeps import methods, patterns
from experiments import jobs, log, results, sweep
from experiments.table import table

# Stands in for experiments.train: writes a last evaluation, or does as its seed says.
PROGRAM = """
import json, os, pathlib, signal, sys, time

given = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
workdir = pathlib.Path(given["workdir"])
seed, steps = int(given["config.seed"]), int(given["config.steps"])
(workdir / "starts").open("a").write(".")
again = len((workdir / "starts").read_text()) > 1
print("seed", seed, os.environ["JAX_COMPILATION_CACHE_DIR"])
if seed == 13 and not again:
    sys.exit("nothing but bad luck")
if seed == 99 and not again:
    os.kill(os.getppid(), signal.SIGINT)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(130)
row = {"step": steps, "kind": "eval", "loss": seed / 2, "bits_per_byte": 1.0 + seed}
(workdir / "checkpoints" / str(steps)).mkdir(parents=True)
(workdir / "metrics.jsonl").write_text(json.dumps(row) + chr(10))
"""


def job(name: str, seed: int, **labels: str) -> dict[str, Any]:
    return dict(
        name=name,
        config="configs/quickstart.py:smoke",
        overrides={"steps": 8, "seed": seed},
        labels={"pattern": "x", **labels, "seed": seed},
    )


Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: pathlib.Path) -> Write:
    def write(*given: dict[str, Any]) -> str:
        path = tmp_path / "a_sweep.py"
        path.write_text(f"def get_sweep():\n    return {list(given)!r}\n")
        return str(path)

    return write


@pytest.fixture
def run(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], int]:
    """Runs a sweep file in tmp_path/runs, with PROGRAM for a trainer."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv(sweep.CACHE, raising=False)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(sweep, "PROGRAM", (sys.executable, str(program)))
    workdir = tmp_path / "runs"
    return lambda path: sweep.run(jobs.load(path, workdir), workdir / ".cache")


def starts(tmp_path: pathlib.Path, name: str) -> int:
    path = tmp_path / "runs" / name / "starts"
    return len(path.read_text()) if path.exists() else 0


def finish(folder: pathlib.Path, value: float | None, step: int = 8) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    row = {"step": step, "kind": "eval", "bits_per_byte": value}
    (folder / "checkpoints" / str(row["step"])).mkdir(parents=True)
    (folder / log.ROWS).write_text(json.dumps(row) + "\n")


@pytest.mark.slow
def test_trains_and_skips_what_is_finished(
    tmp_path: pathlib.Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real program in real processes."""
    path = write(job("one", 0))

    def program(*arguments: str) -> str:
        line = (sys.executable, "-m", "experiments.sweep", f"--sweep={path}")
        done = subprocess.run(
            (*line, f"--workdir={tmp_path / 'runs'}", *arguments),
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    # Programs this small are only cached when asked for.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.delenv(sweep.CACHE, raising=False)
    assert "1/1 one: bits_per_byte " in program()
    assert any((tmp_path / "runs" / ".cache").iterdir())
    assert "finished: held-out" in (tmp_path / "runs/one/log.txt").read_text()
    before = (tmp_path / "runs/one" / log.ROWS).stat().st_mtime_ns
    assert program() == "1 jobs, 1 of them finished\n"
    assert (tmp_path / "runs/one" / log.ROWS).stat().st_mtime_ns == before
    assert re.search(r"\| x \| \d\.\d{3} \|", program("--table"))


def test_a_job_that_fails_is_reported_and_the_others_go_on(
    tmp_path: pathlib.Path,
    write: Write,
    run: Callable[[str], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(job("one", 13), job("two", 1))
    assert run(path) == sweep.FAILED
    said = capsys.readouterr()
    assert "one: failed, exit code 1: nothing but bad luck (" in said.err
    assert "two: loss 0.500  bits_per_byte 2.000" in said.out
    assert (tmp_path / "runs/two/log.txt").read_text() == (
        f"seed 1 {tmp_path / 'runs' / '.cache'}\n"
    )
    assert run(path) == 0
    assert (starts(tmp_path, "one"), starts(tmp_path, "two")) == (2, 1)


def test_results_outlive_the_folders_of_their_runs(
    tmp_path: pathlib.Path, write: Write, run: Callable[[str], int]
) -> None:
    path, file = write(job("one", 1), job("two", 2)), tmp_path / "results.jsonl"
    assert run(path) == 0
    here = jobs.load(path, tmp_path / "runs")
    results.write(file, here[:1])
    elsewhere = jobs.load(path, tmp_path / "other")  # nothing has run there
    elsewhere = results.known(elsewhere, results.read(file))
    assert elsewhere[0].result() == {"loss": 0.5, "bits_per_byte": 2.0}
    assert elsewhere[1].result() is None
    assert sweep.run(elsewhere, tmp_path / "cache", file) == 0
    assert not (tmp_path / "other" / "one").exists()
    rows = results.read(file)
    assert list(rows) == ["one", "two"]
    assert "seconds" not in rows["one"] and rows["two"]["seconds"] >= 0
    assert results.durations(rows).startswith("1 of 2 jobs say how long they took: 0:0")
    assert results.durations({"one": rows["one"]}) == ""
    # What was run with other settings is no result of this job.
    changed = jobs.load(write(job("one", 3), job("two", 2)), tmp_path / "third")
    known = results.known(changed, results.read(file))
    assert known[0].result() is None and known[1].result() is not None


def test_processes_that_write_at_once_lose_nothing(tmp_path: pathlib.Path) -> None:
    class Done(NamedTuple):
        name: str
        kept: None = None

        def result(self) -> dict[str, float]:
            return {"loss": 1.0}

        def settings(self) -> dict[str, Any]:
            return {}

    file, names = tmp_path / "results.jsonl", [f"job-{i}" for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda name: results.write(file, [Done(name)]), names))  # type: ignore[list-item]
    assert sorted(results.read(file)) == sorted(names)
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_file_that_holds_no_results_is_refused(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text('{"name": "one"}\n')
    with pytest.raises(ValueError, match=r"line 1 is no result of a job"):
        results.read(file)


def test_ctrl_c_reaches_the_job_and_the_same_command_goes_on(
    tmp_path: pathlib.Path,
    write: Write,
    run: Callable[[str], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGINT)
    path = write(job("one", 99), job("two", 1))
    assert run(path) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopped at one" in capsys.readouterr().out
    assert (starts(tmp_path, "one"), starts(tmp_path, "two")) == (1, 0)
    assert run(path) == 0
    assert (starts(tmp_path, "one"), starts(tmp_path, "two")) == (2, 1)


def test_a_job_of_another_process_is_left_to_it(
    tmp_path: pathlib.Path,
    write: Write,
    run: Callable[[str], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(job("one", 0), job("two", 1))
    with sweep.locked(tmp_path / "runs" / "one") as lock:
        assert lock is not None
        assert run(path) == 0
    assert "1 jobs are left to another process" in capsys.readouterr().out
    assert (starts(tmp_path, "one"), starts(tmp_path, "two")) == (0, 1)
    assert run(path) == 0
    assert starts(tmp_path, "one") == 1


def test_the_lock_outlives_a_killed_sweep_with_its_job(tmp_path: pathlib.Path) -> None:
    with sweep.locked(tmp_path) as lock:
        assert lock is not None
        sleeper = subprocess.Popen(["sleep", "60"], pass_fds=[lock.fileno()])
    with sweep.locked(tmp_path) as lock:
        assert lock is None
    sleeper.kill()
    sleeper.wait()
    with sweep.locked(tmp_path) as lock:
        assert lock is not None
        with (tmp_path / ".lock").open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_table(
    tmp_path: pathlib.Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    given = [job(f"dense-{seed}", seed) for seed in (0, 1)]
    for each in given:
        each["labels"]["pattern"] = "dense"
    for column in ("90", "80", "95"):
        given += [job(f"x-{column}-{s}", s, sparsity=column) for s in (0, 1, 2)]
    path = write(*given)
    for name, value in [("dense-0", 2.5), ("dense-1", 2.6), ("x-90-0", 3.0),
                        ("x-90-1", 3.1), ("x-90-2", 3.5), ("x-80-1", 2.75)]:  # fmt: skip
        finish(tmp_path / name, value)
    finish(tmp_path / "x-80-2", 9.0, step=4)  # goes on
    assert table(jobs.load(path, tmp_path), "bits_per_byte").splitlines() == [
        "| pattern | 80 | 90 | 95 |",
        "| --- | ---: | ---: | ---: |",
        "| dense | 2.550 ± 0.071 | 2.550 ± 0.071 | 2.550 ± 0.071 |",
        "| x | 2.750 (1 of 3) | 3.200 ± 0.265 | - |",
    ]
    assert math.isclose(0.265, math.sqrt((0.04 + 0.01 + 0.09) / 2), abs_tol=5e-4)
    finish(tmp_path / "x-95-0", None)  # a NaN
    assert "nan (1 of 3)" in table(jobs.load(path, tmp_path), "bits_per_byte")
    with pytest.raises(ValueError, match="dense-0 has no metric 'accuracy', only"):
        table(jobs.load(path, tmp_path), "accuracy")


def test_table_without_columns(
    tmp_path: pathlib.Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    found = jobs.load(write(job("one", 0)), tmp_path)
    assert table(found, "loss").splitlines()[::2] == ["| pattern | loss |", "| x | - |"]


def test_printed_commands(
    tmp_path: pathlib.Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (found,) = jobs.load(write(job("one", 3)), tmp_path)
    assert found.command() == (
        "python -m experiments.train --config=configs/quickstart.py:smoke "
        f"--workdir={tmp_path}/one --config.steps=8 --config.seed=3"
    )


GOOD = job("one", 0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "gives no jobs"),
        ([GOOD, GOOD], "two jobs have the name 'one'"),
        ([GOOD, {**GOOD, "name": "two"}], "one and two have equal labels"),
        ([{**GOOD, "name": "../one"}], "must be letters"),
        ([{"name": "one"}], "job 0 has name; a job has config, labels"),
        ([{**GOOD, "labels": {"seed": 0}}], "must be one or two besides seed"),
        ([{**GOOD, "config": "configs/none.py"}], "job 0, one: .*'configs/none.py'"),
        ([{**GOOD, "config": "configs/quickstart.py:metod=set"}], "one: .*'metod' is"),
        ([{**GOOD, "config": "configs/quickstart.py:forward=x"}], "not of type float"),
        ([{**GOOD, "overrides": {"step": 8}}], "no such key; did you mean steps"),
        ([{**GOOD, "overrides": {"model": 8}}], "override model: .* no such key"),
        ([{**GOOD, "overrides": {"steps": "long"}}], "one: .*'steps'.* long"),
        ([{**GOOD, "overrides": {"mesh": None}}], "must be a number or a string"),
    ],
)
def test_a_bad_sweep_is_refused_before_any_job(
    given: Any,
    said: str,
    tmp_path: pathlib.Path,
    write: Write,
    run: Callable[[str], int],
) -> None:
    with pytest.raises(ValueError, match=said):
        run(write(*given))
    assert not (tmp_path / "runs").exists()


def test_a_finished_run_of_other_settings_is_refused(
    write: Write, run: Callable[[str], int]
) -> None:
    assert run(write(job("one", 0))) == 0
    with pytest.raises(ValueError, match="one holds a run of other settings"):
        run(write(job("one", 1)))


def test_patterns_is_a_sweep(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    found = jobs.load(patterns.__file__, tmp_path)
    assert len(found) == 3 * (1 + 3 * len(patterns.PATTERNS) - len(patterns.LEFT_OUT))
    assert {each.steps for each in found} == {500}


def test_methods_is_a_sweep_of_all_methods(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    found = jobs.load(methods.__file__, tmp_path)
    named = {each.labels["method"] for each in found}
    assert named == {"dense", "small", *tk.METHODS}
    assert len(found) == 3 * len(named)
