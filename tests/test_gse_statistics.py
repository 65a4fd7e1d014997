"""GSE by GraBo and GraEst, 50 steps: candidates too are those of the oracle.

The oracle makes its own passes through the network, hence h, delta and the gradient; it
is handed the uniform numbers and the signs that the library has drawn.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from compilation import fast_compilation
from oracles import gse
from oracles.loop import at_positions

import topkast_jax as tk
from topkast_jax import statistics
from topkast_jax._trees import leaf_key
from topkast_jax.pairs import _PAIRS

STEPS, EVERY, ALPHA, T_END, GAMMA = 50, 4, 0.5, 40, 1.5
SEED = 4  # No draw comes nearer than 4e-5 to where it would be another row or column.
SHAPES = {"one/kernel": (6, 12), "two/kernel": (12, 4)}
COMPILATION = fast_compilation()
DRAWS = np.random.default_rng(0)


def draw(*shape):
    return DRAWS.normal(size=shape).astype(np.float32)


PARAMS = {
    "one": {"kernel": draw(6, 12), "bias": np.zeros(12, np.float32)},
    "two": {"kernel": draw(12, 4) / 3},
}
# Inputs of unequal size, so that their sums are, too.
X = draw(STEPS, 20, 6) * np.linspace(0.25, 2, 6, dtype=np.float32)
Y = draw(STEPS, 20, 4)


class Two(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = jnp.tanh(nn.Dense(12, name="one")(x))
        return nn.Dense(4, name="two", use_bias=False)(x)


def by_path(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): np.asarray(leaf)
        for keys, leaf in flat
    }


def trained(method, monkeypatch):
    """A, P and alpha before every step and after the last; the signs of every step."""
    drawn: dict[str, np.ndarray] = {}

    def recorded(tapped, x, shape):
        signs = statistics.draw_signs(tapped, x, shape)
        path = next(p for p, s in SHAPES.items() if s == tapped.value.shape)
        jax.debug.callback(lambda s: drawn.update({path: np.asarray(s)}), signs)
        return signs

    monkeypatch.setattr("topkast_jax.flax.sums.draw_signs", recorded)
    apply = tk.flax.apply(Two())
    tx = tk.sparse(optax.sgd(0.05, momentum=0.9), method, seed=SEED)

    def step(theta, state, x, y, t):
        def loss(theta, zeros):
            alpha = tk.sparsify(theta, tk.masks(state))
            alpha = tk.tap(alpha, zeros, jax.random.key(t))
            return jnp.mean((apply({"params": alpha}, x) - y) ** 2)

        zeros = tk.taps(tx, theta, state)
        grads, stats = jax.grad(loss, argnums=(0, 1))(theta, zeros)
        updates, state = tx.update(grads, state, theta, stats=stats)
        return optax.apply_updates(theta, updates), state

    step = jax.jit(step, compiler_options=COMPILATION)
    theta = jax.tree.map(jnp.asarray, PARAMS)
    state = jax.jit(tx.init, compiler_options=COMPILATION)(theta)
    seen, signs = [], []
    for t in range(STEPS + 1):
        masks = tk.masks(state)
        alpha = by_path(tk.export(theta, state))
        seen.append((by_path(masks.forward), by_path(masks.probe), alpha))
        if t < STEPS:
            theta, state = step(theta, state, X[t], Y[t], t)
            jax.effects_barrier()
            signs.append(dict(drawn))
            drawn.clear()
    return seen, signs


@pytest.mark.parametrize(
    ("candidates", "scope"),
    [("grabo", "global"), ("graest", "layer")],
)
def test_fifty_steps(candidates, scope, monkeypatch):
    method = tk.gse(
        0.7,
        candidates=candidates,
        subset=GAMMA,
        drop_fraction=tk.cosine(ALPHA, T_END),
        refresh=tk.every(EVERY, stop=T_END + 1),
        scope=scope,
    )
    seen, signs = trained(method, monkeypatch)
    assert all(len(s) == (2 if candidates == "graest" else 0) for s in signs)

    def observed(t):
        """h and delta of both layers in step t, at the library's alpha."""
        alpha = seen[t][2]
        names = ("one/kernel", "one/bias", "two/kernel")
        found = gse.perceptron(X[t], Y[t], *(alpha[name] for name in names))
        return dict(zip(SHAPES, found, strict=True))

    def gradient(alpha, t):
        for path, value in seen[t][2].items():
            np.testing.assert_allclose(alpha[path], value, rtol=2e-4, atol=2e-5)
        layers = observed(t)
        grads = {path: gse.gradient(*layers[path]) for path in SHAPES}
        return grads | {"one/bias": layers["one/kernel"].delta.sum(1)}

    # P of step - 1, whose gradient the refresh at `step` compares, is drawn by the
    # update before it, from the batch of step - 2: one earlier than in the paper.
    def uniforms(step, path, n):
        key = jax.random.fold_in(leaf_key(jnp.uint32(SEED), path, step - 1), _PAIRS)
        size = int(np.prod(SHAPES[path]))
        most = n if scope == "layer" else round(GAMMA * size)  # for any |A|
        words = jax.random.bits(key, (2, 1, most), jnp.uint32)
        return np.asarray(words, np.float64)[:, 0, :n].T / 2**32

    sampled = gse.sampled(
        lambda step, path: observed(step - 2)[path],
        uniforms,
        GAMMA,
        (lambda step, path: signs[step - 2][path]) if candidates == "graest" else None,
    )
    refreshes = []

    def checked(step, path, run):
        """S less A, as the probe of the library has it."""
        positions = sampled(step, path, run)
        mask = at_positions(positions, SHAPES[path])
        np.testing.assert_array_equal(seen[step - 1][1][path], mask, f"P, {step}")
        refreshes.append(step)
        return positions

    history = gse.gse(
        by_path(PARAMS),
        seen[0][0],
        oracle.sgd(0.05, momentum=0.9),
        gradient,
        due=lambda step: step % EVERY == 0 and step <= T_END,
        alpha=ALPHA,
        t_end=T_END,
        candidates=checked,
        scope=scope,
        steps=STEPS,
    )
    assert refreshes == [t for t in range(EVERY, T_END + 1, EVERY) for _ in SHAPES]
    moved = 0
    for t, (snapshot, (now, _, alpha)) in enumerate(zip(history, seen, strict=True)):
        for path in SHAPES:
            np.testing.assert_array_equal(now[path], snapshot.forward[path], f"A, {t}")
        for path, value in alpha.items():
            np.testing.assert_allclose(
                value, snapshot.alpha[path], rtol=2e-4, atol=2e-5, err_msg=f"{t}"
            )
        moved += any((now[p] != seen[max(t - 1, 0)][0][p]).any() for p in SHAPES)
    assert moved >= 8
    sizes = {now["one/kernel"].sum() for now, *_ in seen}
    assert (len(sizes) > 1) == (scope == "global")
