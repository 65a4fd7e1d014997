"""Numbers of methods that may be schedules: the value of the step counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk

SHAPE = (8, 16)


def falling(step):
    """.3 at step 0, .2, .1, 0 from step 3 on."""
    return 0.1 * jnp.maximum(3 - step, 0)


def start(method, layout="masked", optimizer=None):
    tx = tk.sparse(
        optimizer or optax.sgd(1.0), method, layout=layout, learning_rate=1.0
    )
    params = {"kernel": jax.random.normal(jax.random.key(0), SHAPE)}
    if layout == "masked":
        return tx, params, tx.init(params)
    theta, state, _ = tk.start(tx, params)
    return tx, theta, state


def moved(tx, params, state, steps):
    """Updates by a gradient of zeros, which is what the method itself adds."""
    found = []
    for _ in range(steps):
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(zeros, state, params)
        found.append(
            (np.asarray(params["kernel"]), np.asarray(updates["kernel"]), state)
        )
        params = optax.apply_updates(params, updates)
    return found


@pytest.mark.parametrize("layout", ["masked", "packed"])
@pytest.mark.parametrize("mode", ["gradient", "decoupled"])
def test_the_penalty_of_top_kast(layout, mode):
    method = tk.top_kast(0.5, 0.5, penalty=falling, penalty_mode=mode)
    for step, (before, update, _) in enumerate(moved(*start(method, layout), 4)):
        ratio = -update[before != 0] / before[before != 0]
        on_mask = ratio[np.abs(ratio) > 1e-8] if step < 3 else ratio
        np.testing.assert_allclose(on_mask, float(falling(step)), rtol=1e-5, atol=1e-8)
        if step < 3:
            assert on_mask.size == 64  # A, half of the kernel


def test_a_dense_beginning_counts_from_its_end():
    method = tk.delayed(tk.top_kast(0.5, 0.5, penalty=falling), 2)
    found = moved(*start(method), 5)
    for step, expected in enumerate([0.3, 0.3, 0.3, 0.2, 0.1]):
        before, update, _ = found[step]
        changed = np.abs(update) > 1e-8
        np.testing.assert_allclose(
            -update[changed] / before[changed], expected, rtol=1e-5
        )
        assert changed.sum() == (128 if step < 2 else 64)


def test_the_pull_and_the_heat_of_deep_rewiring():
    pulled = tk.deep_r(0.5, l1=falling, temperature=0.0, refresh=tk.every(100))
    for step, (before, update, state) in enumerate(moved(*start(pulled), 2)):
        active = np.asarray(tk.masks(state).forward["kernel"]) & (before != 0)
        size = np.abs(update[active])
        np.testing.assert_allclose(size, float(falling(step)), rtol=1e-5)
    heated = tk.deep_r(0.5, l1=0.0, temperature=falling, refresh=tk.every(100))
    found = [
        np.std(update[before != 0]) for before, update, _ in moved(*start(heated), 4)
    ]
    assert found[0] > 0.3 and found[3] == 0  # sqrt(2 eta T), and T is 0


@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_the_weight_of_gradients_in_mest(layout):
    """What is kept is by magnitude alone, or by the gradient alone, as the step says."""

    def kept(weight):
        method = tk.mest(0.5, weight=weight, drop_fraction=0.5, refresh=tk.every(1))
        tx = tk.sparse(optax.sgd(0.0), method, layout=layout)
        params = {"kernel": jax.random.normal(jax.random.key(0), SHAPE)}
        gradient = jax.random.normal(jax.random.key(1), SHAPE)
        if layout == "masked":
            state = tx.init(params)
            _, state = tx.update({"kernel": gradient}, state, params)
        else:
            theta, state, store = tk.start(tx, params)
            seen = jax.grad(
                lambda t: jnp.vdot(tk.sparsify(t, tk.masks(state))["kernel"], gradient)
            )(theta)
            found = tk.probe(
                lambda t, s: jnp.vdot(tk.sparsify(t, tk.masks(s))["kernel"], gradient),
                theta,
                state,
            )
            _, state = tx.update(seen, state, theta)
            _, state, _ = tk.refresh(tx, theta, state, store, found)
        return np.asarray(tk.dense_masks(state).forward["kernel"])

    def sudden(step):  # masks of step 1 are the first that are chosen
        return jnp.where(step == 1, 1000.0, 0.0)

    np.testing.assert_array_equal(kept(sudden), kept(1000.0))
    assert not np.array_equal(kept(sudden), kept(0.0))


def test_the_share_of_salient_weights_in_srigl():
    def masks(gamma):
        method = tk.srigl(0.75, gamma_sal=gamma, drop_fraction=0.5, refresh=tk.every(1))
        tx = tk.sparse(optax.sgd(0.01), method)
        params = {"kernel": jax.random.normal(jax.random.key(0), SHAPE)}
        gradient = {"kernel": jax.random.normal(jax.random.key(1), SHAPE)}
        _, state = tx.update(gradient, tx.init(params), params)
        return np.asarray(tk.masks(state).forward["kernel"])

    def sudden(step):
        return jnp.where(step == 1, 0.9, 0.0)

    np.testing.assert_array_equal(masks(sudden), masks(0.9))
    assert not np.array_equal(masks(0.9), masks(0.01))


def test_the_momentum_of_snfs():
    """beta is 0, then 1: the mean is the first gradient, for ever."""
    method = tk.snfs(
        0.5, momentum=lambda step: jnp.minimum(step, 1), refresh=tk.at([9])
    )
    tx, params, state = start(method, optimizer=optax.sgd(0.0))
    for seed in range(3):
        gradient = {"kernel": jax.random.normal(jax.random.key(seed), SHAPE)}
        _, state = tx.update(gradient, state, params)
    first = jax.random.normal(jax.random.key(0), SHAPE)
    np.testing.assert_allclose(state.sparse_memory["kernel"], first, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tk.top_kast(0.5, 0.5, penalty=-1.0),
            "penalty=-1.0 must be at least 0",
        ),
        (lambda: tk.mest(0.5, weight=-1.0), "weight=-1.0 must be at least 0"),
        (lambda: tk.deep_r(0.5, l1=-1.0), "l1=-1.0 must be at least 0"),
        (
            lambda: tk.deep_r(0.5, temperature=-1.0),
            "temperature=-1.0 must be at least 0",
        ),
        (lambda: tk.srigl(0.5, gamma_sal=-1.0), "gamma_sal=-1.0 must be at least 0"),
    ],
)
def test_numbers_below_zero(make, message):
    with pytest.raises(ValueError, match=message):
        make()
