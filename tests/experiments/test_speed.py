"""Throughput, utilisation, and profiles."""

import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
from runs import ROOT

from experiments import speed
from experiments.tracing import Trace


class Device:
    def __init__(self, kind: str) -> None:
        self.device_kind = kind


class FakeMesh(NamedTuple):
    devices: Any
    size: int


def of(kind: str, count: int) -> Any:
    devices = np.empty(count, object)
    for i in range(count):
        devices[i] = Device(kind)
    return devices


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),  # so a v5p calls itself
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("cpu", None),
    ],
)
def test_peaks_by_kind(kind: str, peak: float | None) -> None:
    assert speed.peak(kind) == peak


def test_utilisation_is_of_all_devices() -> None:
    mesh: Any = FakeMesh(of("TPU v4", 4), 4)
    found = speed.measured(8, 10, 2.0, 275e12, mesh)
    assert found == {"step_time": 0.2, "rows_per_second": 40.0, "mfu": 1 / 8}
    texts = speed.measured(8, 10, 2.0, 275e12, mesh, tokens=64)
    assert "rows_per_second" not in texts and texts["tokens_per_second"] == 64 * 40
    cpu: Any = FakeMesh(of("cpu", 1), 1)
    assert "mfu" not in speed.measured(8, 10, 2.0, 275e12, cpu)


def test_a_trace_makes_the_loop_pause(tmp_path: pathlib.Path) -> None:
    trace = Trace("20:25", tmp_path)
    assert [trace.pause(s, 100) for s in (0, 20, 22, 25)] == [20, 25, 25, 100]
    assert Trace(None, tmp_path).pause(3, 9) == 9


@pytest.mark.parametrize("text", ["20", "a:b", "25:20", "3:3", ":"])
def test_steps_that_are_none(text: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="must be steps as in 20:25"):
        Trace(text, tmp_path)


def test_a_profile_and_a_cache_are_written(tmp_path: pathlib.Path) -> None:
    """By the program: the profiler crashes in a process of hundreds of programs."""
    settings = {
        "profile": "2:4",
        "compilation_cache": tmp_path / "cache",
        "data_dir": tmp_path / "data",
        "sparse.where": "block_0/feed_forward/in/kernel",
    }
    subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "experiments.train",
                f"--workdir={tmp_path / 'run'}",
            ),
            "--config=configs/quickstart.py:smoke,method=static",
            *(f"--config.{key}={value}" for key, value in settings.items()),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": "",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        check=True,
        capture_output=True,
    )
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "cache").iterdir())
