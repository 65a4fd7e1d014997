"""The compiled update moves counts between devices, never weights or masks."""

from typing import Any

import pytest
from fake_devices import run_suite


def judge(found: dict[str, Any], updates: int, steps: int) -> None:
    alone = {c: r for c, r in found.items() if c.startswith("update/")}
    assert len(alone) == updates
    for cell, result in alone.items():
        # Given its gradients, the whole update moves counts: a number of each device.
        assert max(result["moved"], default=0) <= 8, (cell, result)
        assert result["reductions"] > 0, cell
    whole = {c: r for c, r in found.items() if c.startswith("step/")}
    assert len(whole) == steps
    for cell, result in whole.items():
        # The parser would notice: dense training gathers its sharded weights.
        assert result["dense"], cell
        assert result["extra"] == [], (cell, result)


def test_no_weight_is_gathered_that_dense_training_leaves() -> None:
    judge(run_suite("programs"), updates=3, steps=2)


@pytest.mark.slow
def test_no_weight_is_gathered_on_any_mesh() -> None:
    judge(run_suite("programs", full=True), updates=26, steps=6)
