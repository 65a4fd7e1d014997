"""50 steps against the NumPy oracle, which was written from the papers alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import topkast_jax as tk
from topkast_jax._trees import leaf_key
from topkast_jax.draw import random_order

STEPS = 50
SHAPES = {"one/kernel": (6, 12), "two/kernel": (12, 4)}
SEED = 11
X = jax.random.normal(jax.random.key(1), (20, 6))
Y = jax.random.normal(jax.random.key(2), (20, 4))


def start():
    one, two = jax.random.split(jax.random.key(0))
    return {
        "one/kernel": jax.random.normal(one, (6, 12)),
        "one/bias": jnp.zeros(12),
        "two/kernel": jax.random.normal(two, (12, 4)) / 3,
    }


def loss(alpha):
    hidden = jnp.tanh(X @ alpha["one/kernel"] + alpha["one/bias"])
    return jnp.mean((hidden @ alpha["two/kernel"] - Y) ** 2)


dense_gradient = jax.jit(jax.grad(loss))


def key(path, step):
    return leaf_key(jnp.uint32(SEED), path, step)


def initial(path, k):
    return np.asarray(tk.random_k(key(path, 0), k, SHAPES[path]))


def draw(step, path, k, allowed):
    return np.asarray(
        tk.random_k(key(path, step), k, SHAPES[path], among=jnp.asarray(allowed))
    )


def order(step, path):
    return np.asarray(random_order(key(path, step), SHAPES[path]))


RATE = 0.05
INNER = {
    "sgd": (optax.sgd(RATE), oracle.sgd(RATE)),
    "momentum": (optax.sgd(RATE, momentum=0.9), oracle.sgd(RATE, momentum=0.9)),
    "adam": (optax.adam(RATE), oracle.adam(RATE)),
    "adamw": (
        optax.adamw(RATE, weight_decay=0.02),
        oracle.adamw(RATE, weight_decay=0.02),
    ),
}


def top_kast(**changes):
    words = dict(penalty=0.02, penalty_norm="l2", penalty_mode="gradient", stop=None,
                 explore="top") | changes  # fmt: skip
    method = tk.top_kast(0.8, 0.55, refresh=tk.every(3), **words)
    return "top_kast", method, words, oracle.every(3)


CASES = {
    "top_kast": (*top_kast(), "momentum"),
    "top_kast_adam": (*top_kast(), "adam"),
    "top_kast_adamw": (*top_kast(), "adamw"),
    "top_kast_l1": (*top_kast(penalty_norm="l1"), "sgd"),
    "top_kast_decoupled": (*top_kast(penalty_mode="decoupled"), "adam"),
    "top_kast_stop": (*top_kast(stop=20), "momentum"),
    "top_kast_stop_at_0": (*top_kast(stop=0), "momentum"),
    "top_kast_random": (*top_kast(explore="random"), "momentum"),
    "static": ("static", tk.static(0.8), {}, None, "momentum"),
    "set": ("set", tk.set_(0.8, refresh=tk.every(4)), {}, oracle.every(4), "adam"),
    "rigl": (
        "rigl",
        tk.rigl(0.8, refresh=tk.every(4)),
        {},
        oracle.every(4),
        "momentum",
    ),
    "rigl_adam": (
        "rigl",
        tk.rigl(0.8, refresh=tk.every(4)),
        {},
        oracle.every(4),
        "adam",
    ),
}


CELLS = [
    *((case, "init") for case in CASES),
    # One case for each way in which masks move.
    ("top_kast_adam", "keep"),
    pytest.param("set", "keep", marks=pytest.mark.slow),
    pytest.param("rigl_adam", "keep", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("case", "reset"), CELLS)
def test_fifty_steps(case, reset):
    name, method, words, due, inner = CASES[case]
    ours, theirs = INNER[inner]
    tx = tk.sparse(ours, method, seed=SEED, reset=reset, learning_rate=RATE)
    params = start()
    state = tx.init(params)

    shapes = SHAPES
    run = oracle.Oracle(
        {path: np.asarray(value) for path, value in params.items()},
        name,
        theirs,
        forward=oracle.uniform(shapes, 0.8),
        **({"backward": oracle.uniform(shapes, 0.55)} if name == "top_kast" else {}),
        **({"due": due} if due else {}),
        **words,
        learning_rate=RATE,
        drop_fraction=0.3,
        initial=initial,
        draw=draw,
        order=order,
        reset=reset,
    )

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda t: loss(tk.sparsify(t, tk.masks(state))))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    moved = 0
    for t in range(STEPS):
        masks = tk.masks(state)
        for path in shapes:
            leaf = run.leaves[path]
            np.testing.assert_array_equal(masks.forward[path], leaf.forward, f"A, {t}")
            np.testing.assert_array_equal(
                masks.backward[path], leaf.backward, f"B, {t}"
            )
        if name == "rigl":
            assert bool(masks.probe["one/kernel"]) == run.probe
        before = {path: run.leaves[path].forward.copy() for path in shapes}
        params, state = step(params, state)
        run.step({p: np.asarray(g) for p, g in dense_gradient(run.alpha()).items()})
        for path, value in params.items():
            np.testing.assert_allclose(
                value,
                run.leaves[path].theta,
                rtol=2e-4,
                atol=2e-5,
                err_msg=f"{path}, {t}",
            )
            # Re-synchronised, so that rounding cannot flip a near tie later on.
            run.leaves[path].theta = np.array(value)
        moved += any((run.leaves[p].forward != before[p]).any() for p in shapes)
    assert moved == 0 if case in ("static", "top_kast_stop_at_0") else moved >= 2
