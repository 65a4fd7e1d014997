"""Several processes train as one does, stop together, and hand on to any number."""

import json
import pathlib
import signal
from typing import Any

import pytest
from processes import run_job
from runs import rows

from experiments import checkpoint, distributed

HERE = pathlib.Path(__file__).parent
GROUPS: dict[str, Any] = dict(
    mesh="fsdp:4",
    sparse__layout="packed",
    sparse__groups=4,
    sparse__groups_along=[["out/*", "inputs"], ["*", "outputs"]],
)


def run(
    workdir: pathlib.Path, processes: int, signal_at: int = 0, **changes: Any
) -> list[str]:
    program = [str(HERE / "distributed_worker.py"), str(workdir)]
    program += [json.dumps(changes), str(signal_at)]
    return run_job(program, processes, 4 // processes)


def assert_same_numbers(one: pathlib.Path, two: pathlib.Path) -> None:
    """Of as many devices, up to the order in which they add."""
    assert len(rows(one)) == len(rows(two)) > 0
    for expected, found in zip(rows(one), rows(two), strict=True):
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            if name not in ("kind", "forward", "backward"):
                assert found[name] == pytest.approx(value, rel=1e-4), name


def ended(said: list[str]) -> list[Any]:
    return [json.loads(text.splitlines()[-1]) for text in said]


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(tmp_path: pathlib.Path) -> None:
    run(tmp_path / "one", 1, **GROUPS)
    said = run(tmp_path / "two", 2, signal_at=5, **GROUPS)
    assert ended(said) == [[6, signal.SIGTERM]] * 2
    assert "needs: state" in said[0] and "needs" not in said[1]
    assert checkpoint.Checkpoints(tmp_path / "two").steps() == [4, 6]
    journals = sorted(
        f.name for f in (tmp_path / "two" / "reservoir" / "0001").iterdir()
    )
    assert journals == ["process-0000-of-0002", "process-0001-of-0002"]
    assert "going on from step 6" in run(tmp_path / "two", 1, **GROUPS)[0]
    assert_same_numbers(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"sparse__layout": "masked"},
        {"sparse__structure": "blocks:4x1", "sparse__layout": "block"},
        {"sparse__reservoir": "files", "sparse__refresh_delay": 1},
        {"dense_steps": 1},
    ],
)
def test_one_stops_and_two_go_on(
    tmp_path: pathlib.Path, changes: dict[str, Any]
) -> None:
    options = GROUPS | changes
    run(tmp_path / "one", 1, **options)
    assert ended(run(tmp_path / "two", 1, signal_at=5, **options))[0][1]
    assert ended(run(tmp_path / "two", 2, **options)) == [[12, None]] * 2
    if "dense_steps" not in changes:  # a time is in it
        assert_same_numbers(tmp_path / "one", tmp_path / "two")


def test_what_distributed_may_say() -> None:
    for text in ("host:1", "host,2,0", "host:1,2,x", "host:1,2"):
        with pytest.raises(ValueError, match="must be 'auto', or address"):
            distributed.join(text)
    with pytest.raises(ValueError, match="have the numbers 0 to 1"):
        distributed.join("host:1,2,2")
