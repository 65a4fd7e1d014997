"""The magnitude family against its NumPy oracles, 50 steps, masks equal to the bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from oracles import dense, loop, pruning

import topkast_jax as tk
from topkast_jax._trees import leaf_key
from topkast_jax.draw import random_order

STEPS = 50
SPARSITY = 0.8
SHAPES = {"one/kernel": (6, 10), "two/kernel": (10, 4)}
SEED = 5
X = jax.random.normal(jax.random.key(1), (20, 6))
Y = jax.random.normal(jax.random.key(2), (20, 4))
# Even distances from `STOP`, so that no count is a half, where floats might err.
START, STOP, EVERY = 4, 34, 4
DUE = oracle.every(EVERY, START, STOP)
RAMP: Any = {"start": START, "stop": STOP, "refresh": tk.every(EVERY)}
OURS = optax.sgd(0.05, momentum=0.9)
THEIRS = oracle.sgd(0.05, momentum=0.9)


def start():
    one, two = jax.random.split(jax.random.key(0))
    return {
        "one/bias": jnp.zeros(10),
        "one/kernel": jax.random.normal(one, (6, 10)),
        "two/kernel": jax.random.normal(two, (10, 4)) / 2,
    }


def loss(alpha):
    hidden = jnp.tanh(X @ alpha["one/kernel"] + alpha["one/bias"])
    return jnp.mean((hidden @ alpha["two/kernel"] - Y) ** 2)


class Recorded:
    """A run of the library: before each step parameters, masks, alpha, its gradient."""

    def __init__(self, method):
        tx = tk.sparse(OURS, method, seed=SEED)

        @jax.jit
        def step(params, state):
            alpha = tk.sparsify(params, tk.masks(state))
            dense = jax.grad(loss)(alpha)
            grads = jax.grad(lambda t: loss(tk.sparsify(t, tk.masks(state))))(params)
            updates, after = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), after, alpha, dense

        params, state = start(), tx.init(start())
        self.thetas, self.masks, self.alphas, self.grads = [], [], [], []
        for _ in range(STEPS):
            self.thetas.append(as_arrays(params))
            self.masks.append(tk.masks(state))
            params, state, alpha, grads = step(params, state)
            self.alphas.append(as_arrays(alpha))
            self.grads.append(as_arrays(grads))

    def gradient(self, alpha, step):
        """What the oracle is given: rounding cannot grow over the steps."""
        for path, value in self.alphas[step].items():
            np.testing.assert_allclose(alpha[path], value, rtol=2e-4, atol=2e-5)
        return self.grads[step]

    def first(self):
        return {path: np.asarray(self.masks[0].forward[path]) for path in SHAPES}


def as_arrays(tree):
    return {path: np.asarray(value) for path, value in tree.items()}


def assert_same(ours, theirs, changes):
    """Masks of every step; `changes` is how often A becomes another."""
    found = 0
    for t, (masks, snapshot) in enumerate(zip(ours.masks, theirs, strict=False)):
        for path in SHAPES:
            for name in ("forward", "backward"):
                np.testing.assert_array_equal(
                    getattr(masks, name)[path],
                    getattr(snapshot, name)[path],
                    f"{name} of {path} in step {t}",
                )
            np.testing.assert_allclose(
                ours.thetas[t][path], snapshot.theta[path], rtol=2e-4, atol=2e-5
            )
        if t:
            before = ours.masks[t - 1].forward
            found += any((before[p] != masks.forward[p]).any() for p in SHAPES)
    assert found >= changes if changes > 1 else found == changes


def falls(step):
    return pruning.cubic(step, START, STOP, SPARSITY)


def due(step):
    return DUE(step) or step == STOP


def by_saliency(run, path):
    return pruning.saliency(run.theta[path], run.grads[path])


def at_random(run, path):
    """The draw of the library, as injected scores."""
    key = leaf_key(jnp.uint32(SEED), path, run.step)
    return -np.asarray(random_order(key, SHAPES[path])).astype(np.float64)


def at_random_of_all(run, path):
    """The draw out of all parameters together: 1 for each of those that stay."""
    key = leaf_key(jnp.uint32(SEED), "one/kernel", run.step)
    equal = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    k = round((1 - SPARSITY) * sum(map(np.size, equal.values())))
    chosen = tk.top_k_tree(list(equal.values()), k, None, key)
    return np.asarray(chosen[list(equal).index(path)], np.float64)


GRADUAL = {
    "magnitude": (tk.magnitude, None, "layer"),
    "magnitude_global": (tk.magnitude, None, "global"),
    "saliency": (tk.saliency, by_saliency, "layer"),
    "saliency_global": (tk.saliency, by_saliency, "global"),
    "random_pruning": (tk.random_pruning, at_random, "layer"),
}


@pytest.mark.parametrize("name", GRADUAL)
def test_gradual(name):
    factory, score, scope = GRADUAL[name]
    ours = Recorded(factory(SPARSITY, scope=scope, **RAMP))
    theirs = pruning.pruning(
        start(), THEIRS, ours.gradient, due=due, sparsity=falls, score=score,
        scope=scope, sparse=tuple(SHAPES), steps=STEPS,
    )  # fmt: skip
    assert_same(ours, theirs, changes=6)


ONCE = {
    "magnitude": {"layer": None, "global": None},
    "saliency": {"layer": by_saliency, "global": by_saliency},
    "random": {"layer": at_random, "global": at_random_of_all},
}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("score", ONCE)
def test_one_shot(score, scope):
    ours = Recorded(tk.one_shot(SPARSITY, at=10, score=score, scope=scope))

    def simulated(score, steps):
        return pruning.pruning(
            start(), THEIRS, ours.gradient, due=lambda t: t == 10,
            sparsity=lambda _: SPARSITY, score=ONCE[score][scope], scope=scope,
            sparse=tuple(SHAPES), steps=steps,
        )  # fmt: skip

    theirs = simulated(score, STEPS)
    assert_same(ours, theirs, changes=1)
    for other in set(ONCE) - {score}:  # each score says something else
        found = simulated(other, 10)[10].forward
        assert any((found[p] != theirs[10].forward[p]).any() for p in SHAPES)


@pytest.mark.parametrize(
    ("batches", "average", "scope"),
    [(1, "gradient", "global"), (3, "gradient", "layer"), (3, "score", "global")],
)
def test_snip(batches, average, scope):
    """Looks, chooses, and then is a static mask."""
    ours = Recorded(tk.snip(SPARSITY, batches=batches, average=average, scope=scope))
    first = ours.thetas[0]
    for t in range(batches):
        for path in SHAPES:
            assert ours.masks[t].forward[path].all()
            assert not ours.masks[t].backward[path].any()
            np.testing.assert_array_equal(ours.thetas[t][path], first[path])
    theta = {path: first[path] for path in SHAPES}
    scores = pruning.snip(theta, ours.grads[:batches], average)
    chosen = pruning.prune(scores, SPARSITY, scope=scope)
    for t in range(batches, STEPS):
        for path, mask in chosen.items():
            np.testing.assert_array_equal(ours.masks[t].forward[path], mask)
            np.testing.assert_array_equal(ours.masks[t].backward[path], mask)
            # Nothing enters later: weights are the initial ones, on A and trained.
            assert not ours.thetas[t][path][~mask].any()
    np.testing.assert_array_equal(
        ours.thetas[batches]["two/kernel"],
        np.where(chosen["two/kernel"], theta["two/kernel"], 0),
    )


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_acdc(scope):
    phases = {"warmup": 8, "compressed": 7, "dense": 5, "last": 38}
    ours = Recorded(tk.acdc(SPARSITY, scope=scope, **phases))
    theirs = dense.acdc(
        start(), THEIRS, ours.gradient, scope=scope, sparsity=SPARSITY,
        phase=lambda step: dense.acdc_phase(step, **phases), sparse=tuple(SHAPES),
        steps=STEPS,
    )  # fmt: skip
    assert_same(ours, theirs, changes=5)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_granet(scope):
    method = tk.granet(
        SPARSITY, scope=scope, drop_fraction=0.3, distribution=tk.uniform, **RAMP
    )
    ours = Recorded(method)
    every = oracle.every(EVERY)
    theirs = pruning.granet_run(
        start(), ours.first(), THEIRS, ours.gradient,
        due=lambda t: every(t) or t == STOP,
        sparsity=lambda t: pruning.cubic(t, START, STOP, SPARSITY, 0.5),
        drop_fraction=0.3, scope=scope, steps=STEPS,
    )  # fmt: skip
    assert_same(ours, theirs, changes=10)
    assert loop.nnz(ours.first()) == 50
    for t in range(STOP, STEPS):
        assert sum(int(ours.masks[t].forward[p].sum()) for p in SHAPES) == 20


@pytest.mark.parametrize(("soft", "n"), [(False, 1), (True, 1), (True, 3)])
def test_straight_through(soft, n):
    ours = Recorded(tk.straight_through(SPARSITY, soft=soft, refresh=tk.every(n)))
    theirs = dense.straight_through(
        start(), THEIRS, ours.gradient, due=oracle.every(n), soft=soft,
        k=oracle.uniform(SHAPES, SPARSITY), steps=STEPS,
    )  # fmt: skip
    assert_same(ours, theirs, changes=5)
    assert (ours.masks[0].shrink["one/kernel"] is not None) == soft
