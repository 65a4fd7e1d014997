"""What was ever in A is remembered beside the masks, and changes nothing else."""

import pathlib
import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import assert_same_run, hook_training_data, kill_at, rows

import topkast_jax as tk
from experiments import explored, optimizer
from experiments.train import train


def test_remembers_what_was_ever_in_a() -> None:
    """Against sets of positions, step by step; updates are those without it."""
    tx = tk.sparse(
        optax.sgd(0.1), tk.set_(0.75, drop_fraction=0.5, refresh=tk.every(2))
    )
    remembering = explored.remembering(tx)
    params = {
        "kernel": jax.random.normal(jax.random.key(0), (6, 6)),
        "bias": jnp.ones(6),
    }
    plain, state = tx.init(params), remembering.init(params)

    def in_a(opt_state: Any) -> set[int]:
        return set(np.flatnonzero(tk.masks(opt_state).forward["kernel"]))

    first = in_a(plain)
    ever = set(first)
    assert explored.measured(plain) == {}
    assert explored.measured(state) == {"reservoir_used": 0.0}
    update, update_too = jax.jit(tx.update), jax.jit(remembering.update)
    used = []
    for step in range(9):
        grads = tk.sparsify(jax.tree.map(jnp.cos, params), tk.masks(plain))
        updates, plain = update(grads, plain, params)
        updates_too, state = update_too(grads, state, params)
        jax.tree.map(np.testing.assert_array_equal, updates, updates_too)
        params = optax.apply_updates(params, updates)
        ever |= in_a(plain)
        used.append(explored.measured(state)["reservoir_used"])
        assert used[step] == pytest.approx(len(ever - first) / (36 - len(first)))
    assert len(set(used)) > 2
    assert isinstance(remembering, tk.Sparse)  # so that it has a plan
    assert str(tk.plan(remembering, params)) == str(tk.plan(tx, params))


@pytest.mark.parametrize("layout", ["packed", "block"])
def test_packed_layouts_refuse(layout: str) -> None:
    config = {"method": "static", "sparsity": 0.5, "track_reservoir": True}
    with pytest.raises(ValueError, match=f"needs layout=masked, not '{layout}'"):
        optimizer.sparse(
            config | {"layout": layout},
            optax.sgd(0.1),
            lambda step: 0.1,
            steps=4,
            seed=0,
        )


@pytest.mark.slow
def test_a_resumed_run_remembers(
    tiny: Callable[..., Any], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"sparse__track_reservoir": True}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny(**given), whole)
    with monkeypatch.context() as patched:
        hook_training_data(patched, kill_at(7, signal.SIGTERM))
        assert train(tiny(**given), parts).step == 7
    train(tiny(**given), parts)
    assert_same_run(whole, parts)
    used = [row["reservoir_used"] for row in rows(whole, "train")]
    assert used == sorted(used) and used[-1] > used[0]
