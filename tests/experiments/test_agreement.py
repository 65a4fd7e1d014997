"""Masks of several runs, compared."""

import pathlib
from typing import Any

import numpy as np
import pytest

import topkast_jax as tk
from experiments import agreement
from experiments.train import train


def test_runs_of_two_seeds_are_compared(tiny: Any, tmp_path: pathlib.Path) -> None:
    masks, runs = [], []
    for seed in range(2):
        config = tiny(steps=4, log_every=2, eval_every=4, seed=seed)
        state = train(config, tmp_path / str(seed)).state
        masks.append(
            np.asarray(tk.dense_masks(state.opt_state).forward["hidden"]["kernel"])
        )
        runs.append(str(tmp_path / str(seed)))
    said = agreement.compare(runs, [])
    overlap = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
    (row,) = (line for line in said.splitlines() if "hidden/kernel" in line)
    assert (
        f"| {overlap:.3f} | {overlap:.3f} |" in row
    )  # no hidden units in a chain of one
    assert (
        float(agreement.compare([runs[0]] * 2, [["hidden/kernel"]]).split("|")[-4]) == 1
    )


def test_what_cannot_be_compared(tiny: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint"):
        agreement.compare([str(tmp_path)], [])
    config = tiny(sparse={"method": "dense"}, steps=4, log_every=2, eval_every=4)
    train(config, tmp_path)
    with pytest.raises(ValueError, match="dense network: it has no masks"):
        agreement.compare([str(tmp_path)], [])
