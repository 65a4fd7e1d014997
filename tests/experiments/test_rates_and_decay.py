"""Optimizers and learning rates from a config."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk
from experiments import methods, optimizer
from experiments.assembly import assemble
from experiments.config import Watched

PARAMS = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "scale": jnp.ones(3)}


def moved(config: dict[str, Any], penalized: Any = ()) -> Any:
    """One update by a gradient of zeros: what decay alone does, at rate 1."""
    tx = optimizer.inner(config, optax.constant_schedule(1.0), penalized)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    return tx.update(zeros, tx.init(PARAMS), PARAMS)[0]


def test_sgd_decays_by_the_gradient_and_through_momentum() -> None:
    config = dict(name="sgd", momentum=0.9, nesterov=True, weight_decay=0.1)
    updates = moved(config)
    # Nesterov's first step by g is (1 + momentum) g, and g is the decay.
    np.testing.assert_allclose(updates["a"]["kernel"], -0.19, rtol=1e-6)
    np.testing.assert_allclose(updates["scale"], -0.19, rtol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion"])
def test_decay_is_where_it_is_said_to_be(name: str) -> None:
    updates = moved(dict(name=name, weight_decay=0.1, decay_where="*/kernel"))
    assert np.all(np.asarray(updates["a"]["kernel"]) < 0)
    assert not np.any(updates["a"]["bias"]) and not np.any(updates["scale"])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_what_a_method_penalizes_decays_once(name: str) -> None:
    config = dict(name=name, weight_decay=0.1, decay_penalized=False)
    updates = moved(config, ["a/kernel"])
    assert not np.any(updates["a"]["kernel"]) and np.all(updates["scale"])
    assert np.all(moved(config)["a"]["kernel"])  # no method penalizes it
    assert np.all(
        moved(config | {"decay_penalized": True}, ["a/kernel"])["a"]["kernel"]
    )


@pytest.mark.parametrize("penalty", [1e-3, 0.0])  # 0: off, and not decay in its place
def test_penalized_parameters_are_found_from_the_config(
    penalty: float, tiny: Any
) -> None:
    config = tiny(
        sparse__penalty=penalty,
        sparse__where="hidden/*",
        optimizer=dict(name="sgd", weight_decay=0.5, decay_penalized=False),
    )
    run = assemble(Watched(config))
    params, _ = jax.jit(run.task.init)(run.init_key)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = run.dense_tx.init(params)
    for _ in range(2):  # the rate of step 0 is 0
        updates, state = run.dense_tx.update(zeros, state, params)
    assert not np.any(updates["hidden"]["kernel"]) and np.any(updates["out"]["kernel"])


def test_schedules_rise_and_then_do_what_they_say() -> None:
    steps = optimizer.learning_rate(
        dict(schedule="steps", peak=1.6, warmup=10, boundaries=(30, 70), factor=0.1),
        100,
    )
    assert [round(float(steps(s)), 6) for s in (0, 5, 10, 29, 31, 69, 71, 99)] == [
        0.0, 0.8, 1.6, 1.6, 0.16, 0.16, 0.016, 0.016,
    ]  # fmt: skip
    constant = optimizer.learning_rate(dict(schedule="constant", peak=2.0, warmup=0), 9)
    assert float(constant(0)) == float(constant(8)) == 2.0
    cosine = optimizer.learning_rate(dict(peak=1.0, warmup=2, end=0.5), 12)
    assert [round(float(cosine(s)), 6) for s in (0, 1, 2, 7, 12)] == [
        0.0, 0.5, 1.0, 0.75, 0.5,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(schedule="steps", peak=1, warmup=5, boundaries=(3,), factor=0.1),
         r"boundaries=\(3,\) must rise, and lie between warmup=5 and steps=10"),
        (dict(schedule="steps", peak=1, warmup=0, boundaries=(7, 4), factor=0.1),
         "must rise"),
        (dict(schedule="linear", peak=1, warmup=0), "must be cosine, steps or constant"),
        (dict(peak=1, warmup=10, end=0), r"warmup=10 must be in \[0, steps\)"),
        (dict(peak=-1, warmup=0, end=0), "must be positive"),
    ],
)  # fmt: skip
def test_rates_that_make_no_sense(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer.learning_rate(config, 10)


def test_momentum_is_no_argument_of_adamw() -> None:
    with pytest.raises(ValueError, match="optimizer.momentum is no argument of adamw"):
        moved(dict(name="adamw", momentum=0.9))


@pytest.mark.parametrize(("stop", "ends"), [(100, 100), (None, 200)])
@pytest.mark.parametrize("method", ["set", "rigl", "gse", "granet"])
def test_the_drop_fraction_ends_with_the_refreshes(
    method: str, stop: int | None, ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RigL, arXiv 1911.11134, section 3: alpha / 2 (1 + cos(pi t / T_end))."""
    real = tk.METHODS[method]
    given = []

    @functools.wraps(real)
    def spy(*, drop_fraction: Any, **arguments: Any) -> tk.Method:
        given.append(drop_fraction)
        return real(drop_fraction=drop_fraction, **arguments)

    monkeypatch.setattr(tk, "METHODS", {method: spy})
    config = dict(method=method, sparsity=0.9, refresh=10, refresh_stop=stop,
                  drop_fraction=0.3, drop_decay="cosine")  # fmt: skip
    methods.build(config, 200)
    found = [float(given[0](step)) for step in (0, ends // 2, ends, 200)]
    np.testing.assert_allclose(found, [0.3, 0.15, 0.0, 0.0], atol=1e-7)
