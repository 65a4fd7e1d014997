"""Looking into a run: degrees, pictures, masks."""

import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import topkast_jax as tk
from experiments import inspect
from experiments.train import train


def test_degrees_are_counted_by_column_and_row() -> None:
    mask = np.array([[1, 0, 1], [1, 0, 0]], bool)
    found = inspect.degrees(inspect.as_matrix(mask, "i o"))
    assert found.inward.tolist() == [2, 0, 1]
    assert found.outward.tolist() == [2, 1]
    assert found.dead == 1


def test_axes_are_read_by_their_letters() -> None:
    mask = np.zeros((2, 3, 4, 5), bool)  # outputs, stack, window, inputs
    mask[1, 2, 3, 4] = True
    matrix = inspect.as_matrix(mask, "o s k i")
    assert matrix.shape == (3, 20, 2)
    assert np.argwhere(matrix).tolist() == [[2, 3 * 5 + 4, 1]]


@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_a_run_is_described(layout: str, tiny: Any, tmp_path: pathlib.Path) -> None:
    config = tiny(sparse__layout=layout, steps=4, log_every=2, eval_every=4)
    state = train(config, tmp_path).state
    said = inspect.look(str(tmp_path), None, None, None)
    assert "sparse, top_kast" in said  # the plan
    assert "| hidden/kernel | 0.7500 |" in said
    picture, file = tmp_path / "mask.png", tmp_path / "masks.npz"
    said = inspect.look(str(tmp_path), "hidden", str(picture), str(file))
    assert "in-degree: number of neurons" in said and "out/kernel" not in said
    assert "sparsity A" in said and "sparse, top_kast" in said  # its row of the plan
    assert picture.read_bytes().startswith(b"\x89PNG")
    want = tk.dense_masks(state.opt_state).forward["hidden"]["kernel"]
    np.testing.assert_array_equal(tk.load_masks(file)["hidden/kernel"], want)


def test_what_cannot_be_looked_at(tiny: Any, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint"):
        inspect.look(str(tmp_path), None, None, None)
    config = tiny(sparse={"method": "dense"}, steps=4, log_every=2, eval_every=4)
    train(config, tmp_path)
    with pytest.raises(ValueError, match="dense network: it has no masks"):
        inspect.look(str(tmp_path), None, None, None)


def test_flags_that_make_no_sense(tiny: Any, tmp_path: pathlib.Path) -> None:
    train(tiny(steps=4, log_every=2, eval_every=4), tmp_path)
    with pytest.raises(ValueError, match="no layer 'tail'; there are hidden/kernel"):
        inspect.look(str(tmp_path), "tail", None, None)
    with pytest.raises(ValueError, match="--slice=1: hidden/kernel has 1, from 0 on"):
        inspect.look(str(tmp_path), "hidden", None, None, 1)
    with pytest.raises(ValueError, match="--picture is of one layer"):
        inspect.look(str(tmp_path), None, "mask.png", None)


@pytest.mark.parametrize("arguments", [[], ["one", "two"], ["one", "--workdir=two"]])
def test_one_folder_is_named(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.inspect", *arguments],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: name one folder of a run, as in runs/quickstart\n"


def test_the_folder_stands_alone(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.inspect", str(tmp_path / "absent")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "absent" in done.stderr and "unexpected" not in done.stderr
