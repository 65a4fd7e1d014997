"""What goes wrong in training is said, skipped or taken back."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from runs import hook_training_data, poison, rows

from experiments import state as states
from experiments.checkpoint import Checkpoints
from experiments.train import Stopped, train


def test_nan_stops(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook_training_data(monkeypatch, poison({7}))
    with pytest.raises(Stopped) as caught:
        train(tiny(), tmp_path)
    message = str(caught.value)
    assert message.startswith(
        "step 6, batch 7: loss is NaN or Inf; gradient of hidden/"
    )
    assert "on_nan=skip" in message
    assert Checkpoints(tmp_path).steps() == [4]  # the good one is still the newest


def test_nan_is_skipped(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook_training_data(monkeypatch, poison({6, 7}))
    outcome = train(tiny(on_nan="skip"), tmp_path)
    assert outcome.step == 12
    assert rows(tmp_path, "train")[-1]["skipped"] == 2
    assert all(row["loss"] is not None for row in rows(tmp_path, "train"))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(outcome.state))
    (inner,) = [outcome.state.opt_state]
    assert int(inner.sparse_step) == 10  # two updates were not made


def test_nan_without_end_stops_skipping(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook_training_data(monkeypatch, poison(set(range(5, 99))))
    monkeypatch.setattr("experiments.train.MOST_SKIPS", 4)
    with pytest.raises(Stopped, match="The last 4 steps were all like it"):
        train(tiny(on_nan="skip"), tmp_path)


def test_nan_restores(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Back to the checkpoint at 4, then on without batches 5 and 7, as if not there."""
    hook_training_data(monkeypatch, poison({5, 7}))
    outcome = train(tiny(on_nan="restore"), tmp_path)
    assert outcome.step == 12
    assert int(outcome.state.opt_state.sparse_step) == 12
    steps = [(row["kind"], row["step"]) for row in rows(tmp_path)]
    assert len(steps) == len(set(steps)) and ("train", 12) in steps
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(outcome.state))


def test_nan_without_end_stops_restoring(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook_training_data(monkeypatch, poison(set(range(1, 99))))
    with pytest.raises(Stopped, match="Going back 3 times did not help"):
        train(tiny(on_nan="restore"), tmp_path)


def test_blame_names_what_was_not_finite() -> None:
    params = {"a": {"kernel": np.zeros((2, 3))}, "b": np.zeros(4), "c": np.zeros(5)}
    in_loss_and_gradient = np.array([1, 0, 2, 5, 0, 0, 0])
    assert states.blame(in_loss_and_gradient, params) == (
        "loss is NaN or Inf; gradient of b: 2 of 4 entries, and 1 more"
    )
    assert not states.was_applied(in_loss_and_gradient)
    in_update = np.array([0, 0, 0, 0, 6, 0, 0])
    said = states.blame(in_update, params)
    assert said == "new value of a/kernel: 6 of 6 entries"
    assert states.was_applied(in_update)


def test_a_gradient_on_dead_weights_stops(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that forgets the masks is noticed at the next evaluation."""
    monkeypatch.setattr(states, "alpha", lambda params, *_: params)
    with pytest.raises(Stopped, match="step 4: in 4 updates the gradient was nonzero"):
        train(tiny(), tmp_path)
