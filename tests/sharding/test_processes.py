"""Two processes train as one with the same devices, and each keeps its own theta."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import run_job

import topkast_jax as tk

HERE = Path(__file__).parent
DEFAULT = ["top_kast/packed", "rigl/block"]
REST = [
    "set/packed",
    "top_kast/block",
    "random/columns",
    "rigl/packed",
    "set/block",
]
RECORDS = 2  # refreshes of a run


def job(folder: Path, cells: list[str], processes: int) -> list[dict[str, Any]]:
    program = [str(HERE / "process_worker.py"), str(folder), ",".join(cells)]
    run_job(program, processes, 4 // processes)
    return [
        np.load(folder / f"{processes}-{number}.npy", allow_pickle=True).item()
        for number in range(processes)
    ]


def together(parts: list[Any], own: list[Any], count: int) -> np.ndarray:
    whole = np.empty((count, *parts[0].shape[1:]), parts[0].dtype)
    for part, slices in zip(parts, own, strict=True):
        whole[slices] = part
    return whole


def judge(folder: Path, cells: list[str]) -> None:
    (alone,) = job(folder, cells, 1)
    two = job(folder, cells, 2)
    for cell in cells:
        one, parts = alone[cell], [found[cell] for found in two]
        assert one["moved"], cell  # masks, so that there is something to compare
        for part in parts:
            assert len(part["history"]) == len(one["history"])
            for here, there in zip(part["history"], one["history"], strict=True):
                np.testing.assert_array_equal(here, there, cell)
            assert 2 * part["nbytes"] == one["nbytes"]
            assert 2 * part["read"] == one["read"] > 0
        if not one["theta"]:
            continue
        journal = tk.Journal(folder / "2" / cell)
        gathered = journal.load(RECORDS)
        assert gathered.journal is None and not gathered.own
        for path, whole in one["theta"].items():
            own = [part["own"][path] for part in parts]
            sizes = [len(slices) for slices in own]
            assert sizes == [len(whole) // 2] * 2
            np.testing.assert_array_equal(
                together([part["theta"][path] for part in parts], own, len(whole)),
                whole,
            )
            # Of one process: its journal knows what is off B; so do both of two.
            np.testing.assert_array_equal(gathered.theta[path], one["again"][path])
            for key, order in (("again", own), ("of_one", own), ("swapped", own[::-1])):
                found = together([part[key][path] for part in parts], order, len(whole))
                np.testing.assert_array_equal(found, one["again"][path], key)


def test_two_processes_are_one(tmp_path: Path) -> None:
    judge(tmp_path, DEFAULT)


@pytest.mark.slow
def test_every_method_on_two_processes(tmp_path: Path) -> None:
    judge(tmp_path, REST)


def test_what_a_journal_of_several_lacks_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    for number in (0, 2):
        own = {"kernel": (np.array([number]), 3)}
        store = tk.Store({"kernel": np.full((1, 4), number, np.float32)}, own=own)
        store.save(folder / f"process-{number:04}-of-0003" / "base-00000000")
    with pytest.raises(ValueError, match="of process 1 is not there"):
        tk.Journal(folder).load(0)
    again = tk.Store({"kernel": np.full((1, 4), 2, np.float32)}, own=own)
    again.save(folder / "process-0001-of-0003" / "base-00000000")
    with pytest.raises(
        ValueError, match="nobody wrote slices .*1, 2.* of 3 .*'kernel'"
    ):
        tk.Journal(folder).load(0)
    wanted = {"kernel": (np.array([0, 2]), 3)}
    found = tk.Journal(folder).load(0, own=wanted).theta["kernel"]
    np.testing.assert_array_equal(found[:, 0], [0, 2])
    with pytest.raises(ValueError, match="has 3 slices, and 4 are expected"):
        tk.Journal(folder).load(0, own={"kernel": (np.array([0]), 4)})
    found = tk.load_store(folder / "process-0002-of-0003" / "base-00000000")
    assert found.slices("kernel")[0].tolist() == [2] and found.slices("kernel")[1] == 3
