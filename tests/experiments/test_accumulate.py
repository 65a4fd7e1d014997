"""A batch in parts, and averages of weights."""

import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import assert_same, rows

from experiments import evaluate
from experiments.accumulate import in_parts
from experiments.tasks.shared import Shared, shared, with_shared
from experiments.train import train


def test_parts_give_the_gradient_of_the_whole() -> None:
    draw = np.random.default_rng(0)
    batch = {
        "x": jnp.asarray(draw.normal(size=(6, 4)), jnp.float32),
        "weights": jnp.asarray([1, 1, 0, 1, 0, 1], jnp.float32),
    }
    carry = {"seen": jnp.arange(6.0), "count": Shared(jnp.float32(0))}
    theta = jnp.asarray(draw.normal(size=4), jnp.float32)

    def gradient(carry: Any, batch: Any, key: Any, share: Any) -> Any:
        def objective(theta: Any) -> Any:
            values = (batch["x"] @ theta - carry["seen"]) ** 2 * batch["weights"]
            mean = values.sum() / jnp.maximum(batch["weights"].sum(), 1)
            after = {
                "seen": carry["seen"] + batch["x"][:, 0],
                "count": Shared(carry["count"].value + 1),
            }
            return mean * share, (after, {"twice": 2 * mean})

        return jax.value_and_grad(objective, has_aux=True)(theta)

    def count(batch: Any) -> Any:
        return batch["weights"].sum()

    key = jax.random.key(0)
    (loss, (after, aux)), grads = gradient(carry, batch, key, 1)
    found = in_parts(gradient, 3, count, carry, batch, key)
    (loss_, (after_, aux_)), grads_ = found
    np.testing.assert_allclose(loss_, loss, rtol=1e-6)
    np.testing.assert_allclose(aux_["twice"], aux["twice"], rtol=1e-6)
    np.testing.assert_allclose(grads_, grads, rtol=1e-5)
    np.testing.assert_array_equal(after_["seen"], after["seen"])  # rows in their order
    assert float(after_["count"].value) == 3 and float(after["count"].value) == 1


def test_what_is_shared_is_taken_out_and_put_back() -> None:
    carry = {"rows": jnp.zeros(3), "a": Shared({"mean": 1}), "b": [Shared(2)]}
    assert shared(carry) == [{"mean": 1}, 2]
    assert shared(with_shared(carry, [3, 4])) == [3, 4]


@pytest.mark.slow
def test_a_run_in_parts_is_close_to_the_whole(
    tiny: Any, tmp_path: pathlib.Path
) -> None:
    # The keys of parts differ, and with them what the task drops: loss, not bits.
    whole = train(tiny(), tmp_path / "whole")
    parts = train(tiny(accumulate=2), tmp_path / "parts")
    assert parts.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=0.3)
    assert parts.metrics["loss"] < 0.8 * rows(tmp_path / "parts", "eval")[0]["loss"]


def test_the_average_of_alpha_is_evaluated_and_resumed(
    tiny: Any, tmp_path: pathlib.Path
) -> None:
    outcome = train(tiny(ema=0.5), tmp_path / "one")
    state = outcome.state
    kernel, average = (x["hidden"]["kernel"] for x in (state.params, state.ema))
    assert not np.array_equal(kernel, average)
    step, found = evaluate.from_workdir(str(tmp_path / "one"), "validation")
    assert step == 12 and found["loss"] == pytest.approx(outcome.metrics["loss"])
    plain = train(tiny(), tmp_path / "plain")
    np.testing.assert_array_equal(plain.state.params["hidden"]["kernel"], kernel)
    assert plain.metrics["loss"] != outcome.metrics["loss"]
    assert rows(tmp_path / "one", "eval")[-1]["loss"] == outcome.metrics["loss"]
    shutil.rmtree(tmp_path / "one" / "checkpoints" / "12")
    assert_same(train(tiny(ema=0.5), tmp_path / "one").state, state)  # from step 8 on


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"accumulate": 3},
            "accumulate=3 must be a positive integer, and batch_size=8",
        ),
        ({"accumulate": 0}, "accumulate=0 must be a positive integer"),
        ({"ema": 1.0}, r"ema=1.0 must be in \[0, 1\)"),
        ({"ema": 0.9, "sparse__layout": "packed"}, "averages dense arrays"),
    ],
)
def test_what_does_not_go_together(
    changes: dict[str, Any], message: str, tiny: Any, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny(**changes), tmp_path)
