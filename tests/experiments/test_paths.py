"""Folders in a bucket: what works there, and what is refused by name."""

import functools
import json
import pathlib
import shlex
from collections.abc import Callable
from typing import Any

import fsspec
import made_runs
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from made_runs import config, write
from runs import ROOT
from safetensors.numpy import save_file

from experiments import command, jobs, log, paths, plot, pretrained, sweep
from experiments import report as reporting
from experiments.train import train


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> str:
    """gs:// is a folder, but one without appending, as object stores have none."""

    class Bucket(DirFileSystem):
        def open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
            if "a" in mode:
                raise NotImplementedError("objects cannot be appended to")
            return super().open(path, mode, *args, **kwargs)

    system = Bucket(path=str(tmp_path), fs=fsspec.filesystem("file", auto_mkdir=True))
    monkeypatch.setattr(backend._FileSystemSpecBackend, "fs", lambda self, path: system)
    return "gs://bucket/run"


@pytest.fixture
def inside(bucket: str, tmp_path: pathlib.Path) -> pathlib.Path:
    """Where gs://bucket lies in truth."""
    paths.folder("gs://bucket/made").write_text("")
    (found,) = tmp_path.rglob("made")
    found.unlink()
    return found.parent


def test_a_scheme_stays_and_a_folder_is_a_folder(tmp_path: pathlib.Path) -> None:
    assert str(paths.folder("gs://bucket/run") / "x") == "gs://bucket/run/x"
    assert paths.is_remote(paths.folder("gs://bucket")) and not paths.is_remote(
        tmp_path
    )
    assert str(paths.whole(paths.folder("gs://bucket/run"))) == "gs://bucket/run"
    assert str(paths.whole(paths.folder("runs/x"))) == f"{pathlib.Path.cwd()}/runs/x"


def test_rows_and_the_picture_are_written_to_a_bucket(bucket: str) -> None:
    with log.Log(bucket, step=None, steps=4) as out:
        for step in (1, 2, 3):
            out.write("train", step, {"loss": 1.0 / step})
            assert [row["step"] for row in log.read(bucket)] == list(range(1, step + 1))
        out.rewind(2)
        out.write("train", 3, {"loss": 0.5})
    assert [row["loss"] for row in log.read(bucket)] == [1.0, 0.5, 0.5]
    with log.Log(bucket, step=1, steps=4):  # as after a crash
        assert [row["step"] for row in log.read(bucket)] == [1]
    picture = plot.summary(bucket, "a run")
    assert str(picture) == f"{bucket}/summary.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_reservoir_needs_files_of_this_machine(bucket: str, tiny: Any) -> None:
    with pytest.raises(ValueError, match="the reservoir of top_kast lives in files of"):
        train(tiny(sparse__layout="packed"), bucket)


def test_a_path_of_this_machine_is_asked_for_by_name() -> None:
    assert paths.local("runs/x", "--out", "no") == pathlib.Path("runs/x")
    with pytest.raises(ValueError, match=r"^--out=gs://bucket/x: it cannot$"):
        paths.local("gs://bucket/x", "--out", "it cannot")


SWEEP = """
def get_sweep():
    return [dict(name=f"one-{seed}", config="configs/quickstart.py:smoke",
                 overrides={"seed": seed}, labels={"x": "one", "seed": seed})
            for seed in (0, 1)]
"""


@pytest.fixture
def run_sweep(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """The sweep's program with these flags, in this process."""
    monkeypatch.chdir(ROOT)
    file = tmp_path / "a_sweep.py"
    file.write_text(SWEEP)

    def run(**given: Any) -> int:
        values = flags.FlagValues()
        for name in ("sweep", "workdir", "results"):
            flags.DEFINE_string(name, given.get(name), "", flag_values=values)
        for name in ("print_commands", "table"):
            flags.DEFINE_bool(name, given.get(name, False), "", flag_values=values)
        flags.DEFINE_string("metric", "loss", "", flag_values=values)
        values.mark_as_parsed()
        monkeypatch.setattr(flags, "FLAGS", values)
        return sweep.main(["sweep"])

    return functools.partial(run, sweep=str(file))


def test_commands_of_a_sweep_in_a_bucket(
    bucket: str, run_sweep: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_sweep(workdir=bucket, print_commands=True) == 0
    for seed, line in enumerate(capsys.readouterr().out.splitlines()):
        assert f"--workdir=gs://bucket/run/one-{seed}" in shlex.split(line)


def test_a_table_of_runs_in_a_bucket(
    bucket: str,
    run_sweep: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
    inside: pathlib.Path,
) -> None:
    for seed, loss in ((0, 2.0), (1, 4.0)):
        folder = inside / "run" / f"one-{seed}"
        (folder / "checkpoints" / "8").mkdir(parents=True)
        row = {"step": 8, "kind": "eval", "loss": loss}
        (folder / log.ROWS).write_text(f"{json.dumps(row)}\n")
    results = tmp_path / "results.jsonl"
    assert run_sweep(workdir=bucket, table=True, results=str(results)) == 0
    assert "| one | 3.000 ± 1.414 |" in capsys.readouterr().out
    assert len(results.read_text().splitlines()) == 2
    # A finished run of other settings is seen there too.
    (inside / "run" / "one-1" / jobs.SETTINGS).write_text('{"config": "x"}')
    with pytest.raises(command.BadInput, match="^gs://bucket/run/one-1 holds a run of"):
        run_sweep(workdir=bucket, print_commands=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(workdir="gs://bucket/run"), "^--workdir=gs://bucket/run: .* --print_com"),
        (
            dict(workdir="gs://bucket/run", results="gs://bucket/x", table=True),
            "^--results=gs://bucket/x: .*; name a file of this machine",
        ),
    ],
)
def test_what_a_sweep_cannot_do_in_a_bucket(
    bucket: str,
    run_sweep: Callable[..., int],
    inside: pathlib.Path,
    given: dict[str, Any],
    said: str,
) -> None:
    with pytest.raises(command.BadInput, match=said):
        run_sweep(**given)
    assert not list(inside.iterdir())
    assert not (ROOT / "gs:").exists()


def test_a_report_of_runs_in_a_bucket_is_written_to_one(
    bucket: str, inside: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_runs.sweep(inside / "run")
    write(inside / "run" / "half", config("set", 2), 0.5, reached=20)
    for saved in inside.glob("run/*/checkpoints/*"):  # so Orbax ends one in a bucket
        (saved / "commit_success.txt").write_text("")
    page = reporting.report([bucket], "gs://bucket/report")
    assert str(page) == "gs://bucket/report/report.html"
    here = inside / "report"
    names = {path.name for path in here.iterdir()}
    assert {"report.html", "table.md", "flops.png"} <= names
    assert not any("tmp" in name for name in names)
    assert "gs://bucket/run/rigl-0" in (here / "report.html").read_text()
    said = capsys.readouterr()
    assert "left out: gs://bucket/run/half: unfinished: step 20" in said.err
    assert "Accuracy of 3 groups, 6 runs, 1 left out: gs://bucket/report" in said.out
    with pytest.raises(ValueError, match="^gs://bucket/nothing is no folder"):
        reporting.report(["gs://bucket/nothing"], "gs://bucket/report")


def test_trained_weights_come_from_a_bucket(
    bucket: str, inside: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
    (inside / "saved").mkdir(parents=True)
    save_file({"kernel": kernel}, inside / "x.safetensors")
    found = pretrained.load("gs://bucket/x.safetensors", [], {"kernel": kernel})
    np.testing.assert_array_equal(found["kernel"], kernel)
    with pytest.raises(
        ValueError, match="'gs://bucket/y.safetensors': there is no such"
    ):
        pretrained.load("gs://bucket/y.safetensors", [], {"kernel": kernel})
    # What Orbax does with a bucket is its own: it is asked for the place, whole.
    asked = []
    monkeypatch.setattr(
        ocp.StandardCheckpointer,
        "restore",
        lambda self, path: asked.append(str(path)) or {"kernel": kernel},
    )
    pretrained.load("gs://bucket/saved", [], {"kernel": kernel})
    assert asked == ["gs://bucket/saved"]
