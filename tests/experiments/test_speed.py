"""Throughput, utilisation, and profiles."""

import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from experiments import speed
from experiments.tracing import Trace
from experiments.train import train


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


def test_a_profile_and_a_cache_are_written(tiny: Any, tmp_path: pathlib.Path) -> None:
    before = jax.config.jax_compilation_cache_dir
    try:
        config = tiny(profile="5:7", compilation_cache=str(tmp_path / "cache"))
        train(config, tmp_path / "run")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
