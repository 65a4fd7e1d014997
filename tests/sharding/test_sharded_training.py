"""Init, refresh and training on eight devices, against one device."""

from typing import Any

import numpy as np
import pytest
from fake_devices import run_suite


def judge_refresh(found: dict[str, Any], cells: int) -> None:
    """Bits are equal after init and each of four updates; nothing changes place."""
    assert len(found) == cells
    for cell, result in found.items():
        assert result["equal"] == [True] * 5, cell
        assert result["moved"], cell
        assert result["strays"] == [], cell
        assert result["first_step_compiles"] >= 1, cell
        assert result["later_compiles"] == 0, cell


def judge_training(found: dict[str, Any], cells: int) -> None:
    """From equal states every loss agrees to 1e-5, and the next parameters nearly."""
    assert len(found) == cells
    for cell, result in found.items():
        assert result["worst"] < 1e-5, cell
        first, last = result["losses"]
        assert np.isfinite([first, last]).all(), cell
        assert last < first, cell
        assert result["unequal"] == [], cell
        assert result["strays"] == [], cell


def test_init_and_refresh_are_equal_on_one_and_eight_devices() -> None:
    judge_refresh(run_suite("refresh"), cells=4)


def test_statistics_are_summed_over_devices() -> None:
    """Rows on eight devices: the same sums as on one, and only they travel."""
    found = run_suite("statistics")
    assert found.keys() == {"norms", "sketches"}
    for kind, result in found.items():
        assert result["near"], kind
        # Of 24 + 16 sums and what a step adds up besides, nothing as large as a weight.
        assert result["largest"] < 24 * 16, kind


@pytest.mark.slow
def test_losses_agree_over_twenty_steps() -> None:
    judge_training(run_suite("training"), cells=1)


@pytest.mark.slow
def test_init_and_refresh_are_equal_on_every_mesh() -> None:
    judge_refresh(run_suite("refresh", full=True), cells=78)


@pytest.mark.slow
def test_losses_agree_on_every_mesh() -> None:
    judge_training(run_suite("training", full=True), cells=30)
