"""Numbers worked by hand on 4x4 masks."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk
from topkast_jax import Masks, metrics

ONE = jnp.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], bool)
TWO = jnp.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], bool)
WIDE = ONE | TWO


def masks(forward, backward=WIDE):
    return Masks(
        {"w": forward, "b": None}, {"w": backward, "b": None}, {"w": None, "b": None}
    )


def test_sparsity():
    assert metrics.sparsity(masks(ONE)) == {
        "w": (0.75, 1 - 5 / 16),
        "total": (0.75, 1 - 5 / 16),
    }


def test_churn_and_overlap():
    assert float(metrics.churn(masks(ONE), masks(TWO))) == 0.25
    assert float(metrics.churn(masks(ONE), masks(ONE))) == 0
    got = metrics.overlap(masks(ONE).forward, masks(TWO).forward)
    assert got == {"w": 3 / 5, "total": 3 / 5}


def test_reservoir_used():
    ever = metrics.ever_active(masks(ONE).forward, masks(TWO))
    assert float(metrics.reservoir_used(masks(ONE).forward, ever)) == pytest.approx(
        1 / 12
    )


def test_dead_units():
    assert metrics.dead_units(masks(ONE)) == {"w": 1}
    assert metrics.dead_units(masks(ONE), tk.axes({"w": "o i"})) == {"w": 1}
    assert metrics.dead_units(masks(TWO), tk.axes({"w": "s i"})) == {"w": 0}


def test_flops():
    params = {"w": jnp.zeros((4, 4)), "b": jnp.zeros(4)}
    got = metrics.flops(params, masks(ONE), {"w": 10})
    assert (got.dense, got.forward, got.train) == (960, 80, 2 * 10 * (4 + 4 + 5))
    assert got.fraction == pytest.approx((2 * 4 / 16 + 5 / 16) / 3)
    assert metrics.flops(params, None, {"w": 10}).fraction == 1
    probing = masks(ONE)._replace(probe={"w": jnp.asarray(True), "b": None})
    assert metrics.flops(params, probing, {"w": 10}).train == 2 * 10 * (4 + 4 + 16)
    with pytest.raises(ValueError, match="'x' matches no parameter"):
        metrics.flops(params, None, {"x": 1})


def test_paper_fractions():
    """Table of the training cost: 90/80 costs (2 * .1 + .2) / 3 of dense, and so on."""
    params = {"w": jnp.zeros((100, 100))}
    for forward, backward, want in (
        (0.9, 0.8, 0.4 / 3),
        (0.8, 0.5, 0.9 / 3),
        (0.8, 0.0, 1.4 / 3),
    ):
        tx = tk.sparse(optax.sgd(0.1), tk.top_kast(forward, backward))
        state = tx.init(
            {"w": jnp.asarray(np.random.default_rng(0).normal(size=(100, 100)))}
        )
        assert metrics.flops(
            params, tk.masks(state), {"w": 7}
        ).fraction == pytest.approx(want)


def test_bytes():
    params = {"w": jnp.zeros((4, 4)), "b": jnp.zeros(4)}
    tx = tk.sparse(optax.adam(1e-3), tk.top_kast(0.5, 0.25))
    got = metrics.bytes_of(params, tx.init(params))
    assert got.parameters == 80
    assert got.masks == 2 * 16
    assert got.optimizer > 2 * 80
