"""Workdirs in a bucket: the log, the picture, and what is refused there."""

import pathlib
from typing import Any

import fsspec
import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem

from experiments import log, paths, plot
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
