"""Selection and random draws on eight devices: equal to one device, bit for bit."""

from typing import Any

import pytest
from fake_devices import run_suite

EQUAL = (
    "top_k",
    "top_k_random_ties",
    "top_k_slices",
    "top_k_tree",
    "random_k",
    "random_k_slices",
)


def judge(found: dict[str, Any], meshes: int) -> None:
    for name in EQUAL:
        chosen, k = found[f"count/{name}"]
        assert chosen == k, name
        same = {c: r for c, r in found.items() if c.startswith("equal/")}
        same = {c: r for c, r in same.items() if c.endswith(f"/{name}")}
        assert len(same) == meshes
        assert all(same.values()), same
    strays = {c: r for c, r in found.items() if c.startswith("strays/")}
    assert len(strays) == meshes
    assert not any(strays.values()), strays


def test_selection_is_equal_on_one_and_eight_devices() -> None:
    judge(run_suite("selection"), meshes=4)


@pytest.mark.slow
def test_selection_is_equal_on_every_mesh() -> None:
    judge(run_suite("selection", full=True), meshes=6)
