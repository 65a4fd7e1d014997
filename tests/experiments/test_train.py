"""The loop trains, writes what it promises, and compiles once."""

import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from runs import hook_training_data, rows

import topkast_jax as tk
from configs import quickstart
from experiments.checkpoint import Checkpoints
from experiments.train import train

SLOW = pytest.mark.slow


def test_trains_and_writes_everything(
    tiny: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = train(tiny(dense_steps=2), tmp_path)
    assert outcome.step == 12 and outcome.signal is None
    assert [row["step"] for row in rows(tmp_path, "train")] == [2, 4, 6, 8, 10, 12]
    held_out = rows(tmp_path, "eval")
    assert [row["step"] for row in held_out] == [4, 8, 12]
    assert outcome.metrics["loss"] == held_out[-1]["loss"] < 0.8 * held_out[0]["loss"]
    # Refreshed at 3, 6 and 9, not after the last step; a window may hold none of them.
    with_churn = [row["step"] for row in rows(tmp_path, "train") if "churn" in row]
    assert with_churn == [4, 6, 10]
    (dense,) = rows(tmp_path, "dense")
    assert dense["time_ratio"] > 0 and dense["state_bytes_ratio"] > 1
    row = rows(tmp_path, "train")[-1]
    fraction = (2 * 0.25 + 0.5) / 3
    products = 3 * 2 * 8 * (16 * 32 + 32)  # three, multiply and add, 8 rows
    assert row["flops_fraction"] == pytest.approx(fraction)
    assert row["flops"] == pytest.approx(12 * fraction * products)
    layer = rows(tmp_path, "layers")[-1]
    assert layer["forward"]["hidden/kernel"] == pytest.approx(0.75)
    assert layer["backward"]["hidden/kernel"] == pytest.approx(0.5)
    assert (tmp_path / "summary.png").stat().st_size > 10_000
    assert list((tmp_path / "tensorboard").glob("events.*"))
    assert Checkpoints(tmp_path).steps() == [8, 12]
    printed = capsys.readouterr().out
    for word in ("hidden/kernel", "step 12/12", "ms/step", "ETA", "sparsity", "churn"):
        assert word in printed


@pytest.mark.parametrize(
    "method",
    ["dense", "rigl", *(pytest.param(each, marks=SLOW) for each in ("static", "set"))],
)
def test_other_methods_through_the_same_loop(
    tiny: Any, tmp_path: pathlib.Path, method: str
) -> None:
    sparse: dict[str, Any] = {"method": method}
    if method != "dense":
        sparse |= dict(sparsity=0.75, reset="init", where="", axes=(),
                       distribution="uniform")  # fmt: skip
    if method in ("set", "rigl"):
        sparse |= dict(drop_fraction=0.3, drop_decay="cosine", refresh=3,
                       refresh_start=None, refresh_stop=None)  # fmt: skip
    outcome = train(tiny(sparse=sparse), tmp_path)
    kernel = np.asarray(outcome.state.params["hidden"]["kernel"])
    # At least: what the last refresh has grown is zero until the next step.
    assert np.mean(kernel == 0) >= (0.0 if method == "dense" else 0.75)
    assert len(rows(tmp_path, "train")) == 6


def test_nothing_compiles_after_the_first_steps(
    tiny: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[float] = []
    seen: dict[int, int] = {}

    def listen(event: str, seconds: float, **more: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    def hook(number: int, batch: Any) -> Any:
        seen[number] = len(compiled)
        return batch

    hook_training_data(monkeypatch, hook)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train(tiny(), tmp_path)
    finally:
        jax.monitoring.clear_event_listeners()
    assert seen[1] > 0  # the listener hears
    # After the first row, evaluation and checkpoint, at step 4, all is compiled.
    assert seen[2] == seen[1] and seen[5] == seen[12]


def test_quickstart_smoke(tmp_path: pathlib.Path) -> None:
    """The real model on the real text, 8 steps."""
    config = quickstart.get_config("smoke")
    config.data_dir = str(tmp_path / "data")
    outcome = train(config, tmp_path / "run")
    assert outcome.step == 8 and 0 < outcome.metrics["bits_per_byte"] < 9
    state = outcome.state
    kernel = state.params["block_0"]["feed_forward"]["in"]["kernel"]
    mask = tk.masks(state.opt_state).forward["block_0"]["feed_forward"]["in"]["kernel"]
    assert int(mask.sum()) == round(0.1 * kernel.size)
