"""50 steps of the dynamic family against oracles written from the papers alone.

Gradients are alpha less a target, and rates powers of two: nothing is rounded otherwise
than in NumPy, so masks are equal to the bit, and weights with them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from compilation import fast_compilation
from oracles import adaptive, dynamic, mest, neurons

import topkast_jax as tk
from topkast_jax._trees import leaf_key
from topkast_jax.draw import random_order
from topkast_jax.methods.deep_r import noise as normal

COMPILATION = fast_compilation()
STEPS, SEED, RATE = 50, 11, 0.125
SHAPES = {"one/kernel": (6, 12), "two/kernel": (12, 4)}
DRAWS = np.random.default_rng(0)
PARAMS = {p: DRAWS.normal(size=s).astype(np.float32) for p, s in SHAPES.items()}
TARGETS = {
    path: DRAWS.normal(size=(STEPS, *shape)).astype(np.float32)
    for path, shape in SHAPES.items()
}
DUE, EVERY = oracle.every(3), tk.every(3)


def gradient(alpha, step):
    return {path: alpha[path] - TARGETS[path][step] for path in alpha}


def key(path, step):
    return leaf_key(jnp.uint32(SEED), path, step)


def draw(step, path, k, allowed):
    return np.asarray(
        tk.random_k(key(path, step), k, SHAPES[path], among=jnp.asarray(allowed))
    )


ranks = jax.jit(random_order, static_argnums=1)


def order(step, path):
    return np.asarray(ranks(key(path, step), SHAPES[path]))


def draw_all(step, k, allowed):
    equal = [jnp.zeros(SHAPES[path]) for path in allowed]
    free = [jnp.asarray(mask) for mask in allowed.values()]
    found = tk.top_k_tree(equal, k, free, key("one/kernel", step))
    return dict(zip(allowed, map(np.asarray, found), strict=True))


def noise(step, path):
    return np.asarray(normal(key(path, step), SHAPES[path], jnp.float32))


def half_less(step: Any) -> Any:
    """0.5, then 0.25 from step 20, 0 from step 40: elastic mutation."""
    return jnp.where(step < 20, 0.5, jnp.where(step < 40, 0.25, 0.0))


def deep(**more):
    def run(*args, signs, **options):
        return adaptive.deep_r_run(
            *args,
            signs=signs,
            learning_rate=RATE,
            l1=0.25,
            temperature=0.0625,
            noise=noise,
            **options | more,
        )

    return run


# Name, the method, what runs the oracle.
CASES = {
    "rigl_itop": (
        tk.rigl_itop(0.7, drop_fraction=0.5, refresh=EVERY),
        lambda *a, signs, **o: dynamic.rigl_itop_run(*a, due=DUE, order=order, **o),
    ),
    "snfs": (
        tk.snfs(0.7, momentum=0.5, drop_fraction=0.3, refresh=EVERY),
        lambda *a, signs, **o: dynamic.snfs_run(
            *a, due=DUE, beta=0.5, drop_fraction=0.3, **o
        ),
    ),
    "snfs_each_its_own": (
        tk.snfs(0.7, momentum=0.5, redistribute=False, refresh=EVERY),
        lambda *a, signs, **o: dynamic.snfs_run(
            *a, due=DUE, beta=0.5, redistribute=False, **o
        ),
    ),
    "mest": (
        tk.mest(0.7, weight=0.5, refresh=EVERY),
        lambda *a, signs, **o: mest.mest_run(
            *a, due=DUE, fraction=0.3, weight=0.5, draw=draw, **o
        ),
    ),
    "mest_soft": (
        tk.mest(0.7, weight=0.5, soft=True, drop_fraction=half_less, refresh=EVERY),
        lambda *a, signs, **o: mest.mest_run(
            *a, due=DUE, fraction=half_less, weight=0.5, soft=True, draw=draw, **o
        ),
    ),
    "srigl": (
        tk.srigl(0.7, gamma_sal=0.9, refresh=EVERY),
        lambda *a, signs, **o: neurons.srigl_run(*a, due=DUE, gamma=0.9, **o),
    ),
    "srigl_without_ablation": (
        tk.srigl(0.7, gamma_sal=0.0, refresh=EVERY),
        lambda *a, signs, **o: neurons.srigl_run(*a, due=DUE, gamma=0.0, **o),
    ),
    "dsr": (
        tk.dsr(0.7, threshold=0.125, drop_fraction=0.2, refresh=EVERY),
        lambda *a, signs, **o: adaptive.dsr_run(
            *a, due=DUE, threshold=0.125, target=7, draw=draw, **o
        ),
    ),
    "deep_r": (tk.deep_r(0.7, l1=0.25, temperature=0.0625), deep(draw_all=draw_all)),
    "deep_r_leaf": (
        tk.deep_r(0.7, l1=0.25, temperature=0.0625, scope="leaf"),
        deep(draw=draw),
    ),
    "deep_r_strict": (
        tk.deep_r(0.7, l1=0.25, temperature=0.0625, strict=True, refresh=EVERY),
        deep(draw_all=draw_all, strict=True, due=DUE),
    ),
}
BETWEEN = {"snfs", "dsr", "deep_r", "deep_r_strict"}


def trained(method):
    """Masks, weights and memory of every step."""
    tx = tk.sparse(optax.sgd(RATE), method, seed=SEED, learning_rate=RATE)
    params = {path: jnp.asarray(value) for path, value in PARAMS.items()}
    state = jax.jit(tx.init, compiler_options=COMPILATION)(params)

    def step(params, state, targets):
        def loss(theta):
            alpha = tk.sparsify(theta, tk.masks(state))
            return sum(jnp.sum((alpha[p] - targets[p]) ** 2) / 2 for p in alpha)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, compiler_options=COMPILATION)
    seen = [(params, state)]
    for t in range(STEPS):
        targets = {path: TARGETS[path][t] for path in params}
        params, state = step(params, state, targets)
        tk.check(params, state)
        seen.append((params, state))
    return seen


def numpy_tree(tree):
    return {path: np.asarray(value) for path, value in tree.items()}


LONG = ("deep_r_leaf", "deep_r_strict", "snfs_each_its_own")
"""Others say nearly the same; of every method one is not among them."""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] if case in LONG else [])
        for case in CASES
    ],
)
def test_fifty_steps(case):
    method, run = CASES[case]
    seen = trained(method)
    first = numpy_tree(tk.masks(seen[0][1]).forward)
    start = {path: np.where(first[path], PARAMS[path], 0) for path in PARAMS}
    signs = {path: np.where(value < 0, -1.0, 1.0) for path, value in PARAMS.items()}
    history = run(start, first, oracle.sgd(RATE), gradient, steps=STEPS, signs=signs)
    layers, moved = set(), 0
    for t, ((params, state), theirs) in enumerate(zip(seen, history, strict=True)):
        forward = numpy_tree(tk.masks(state).forward)
        for path, mask in forward.items():
            np.testing.assert_array_equal(mask, theirs.forward[path], f"{path}, {t}")
            if t:  # what the update is to bring to zero is not zero before it
                np.testing.assert_allclose(
                    params[path], theirs.theta[path], rtol=1e-5, atol=1e-6
                )
        layers.add(int(forward["one/kernel"].sum()))
        if t:
            moved += any((forward[p] != history[t - 1].forward[p]).any() for p in first)
    assert moved >= 5
    total = [sum(m.sum() for m in s.forward.values()) for s in history]
    if not case.startswith(("mest_soft", "srigl")) or case.endswith("ablation"):
        assert set(total) == {sum(m.sum() for m in first.values())}
    assert (len(layers) > 1) == (case in BETWEEN or case in ("mest_soft", "srigl"))
    rates = [ever / size for ever, size in dynamic.explored(history)]
    if case == "rigl_itop":
        found = [float(tk.metrics.exploration_rate(state)) for _, state in seen]
        np.testing.assert_allclose(found, rates, rtol=1e-6)
        assert found[-1] > found[0]


def test_the_threshold_of_dsr_is_one_and_moves_by_factors_of_two():
    seen = trained(CASES["dsr"][0])
    values = [numpy_tree(state.sparse_memory) for _, state in seen]
    assert all(v["one/kernel"] == v["two/kernel"] for v in values)
    memory: dict[str, Any] = {}
    first = numpy_tree(tk.masks(seen[0][1]).forward)
    start = {path: np.where(first[path], PARAMS[path], 0) for path in PARAMS}
    CASES["dsr"][1](
        start, first, oracle.sgd(RATE), gradient, steps=STEPS, signs={}, memory=memory
    )
    assert [float(v["one/kernel"]) for v in values[::3]] == memory["H"]
    assert len(set(memory["H"])) > 1


def test_soft_bound_of_mest_ends_at_its_target():
    totals = [
        int(sum(mask.sum() for mask in tk.masks(state).forward.values()))
        for _, state in trained(CASES["mest_soft"][0])
    ]
    # 22 + 14; half of each more (7 + 7 of 14.4 and so on), then a quarter, then none.
    assert totals[0] == totals[-1] == 36
    assert totals[3] > totals[21] > totals[42] == 36


def test_ablation_gives_the_budget_of_a_neuron_to_the_others():
    seen = trained(CASES["srigl"][0])
    living = []
    for _, state in seen[3:]:
        for mask in tk.masks(state).forward.values():
            inputs = np.asarray(mask).sum(0)
            assert len(set(inputs[inputs > 0].tolist())) == 1
            living.append((inputs > 0).mean())
    assert min(living) < 1


def test_what_dies_and_revives_at_once_begins_at_zero():
    """And its moments go on: it never left B."""
    method = tk.deep_r(0.0, l1=2.0, temperature=0.0)  # all are active: all come back
    tx = tk.sparse(optax.sgd(1.0, momentum=0.5), method, learning_rate=1.0)
    params = {"kernel": jnp.array([[3.0, -3.0], [1.0, -1.0]])}
    state = tx.init(params)
    grads = {"kernel": jnp.full((2, 2), 0.5)}
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    assert params["kernel"].tolist() == [[0.5, -1.5], [0.0, 0.0]]
    assert state.sparse_inner[0].trace["kernel"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert tk.masks(state).forward["kernel"].all()


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: tk.snfs(0.9, drop_fraction=1.0, **o),
        lambda **o: tk.srigl(0.9, drop_fraction=1.0, gamma_sal=0.0, **o),
        lambda **o: tk.rigl(0.9, drop_fraction=1.0, **o),
        lambda **o: tk.rigl_itop(0.9, drop_fraction=1.0, **o),
        lambda **o: tk.granet(
            0.9, start=0, stop=9, initial_sparsity=0.9, drop_fraction=1.0, **o
        ),
        lambda **o: tk.gse(0.9, drop_fraction=1.0, candidates="all", **o),
        lambda **o: tk.gse(
            0.9, drop_fraction=1.0, candidates="all", scope="global", **o
        ),
    ],
    ids=["snfs", "srigl", "rigl", "rigl_itop", "granet", "gse", "gse_global"],
)
def test_growth_where_nothing_has_a_gradient_is_spread(make):
    """A peer grew at the lowest positions: all of it in the first rows."""
    tx = tk.sparse(optax.sgd(0.1), make(refresh=tk.every(1)), seed=SEED)
    params = {"kernel": jnp.ones((40, 20))}
    state = tx.init(params)
    _, state = tx.update({"kernel": jnp.zeros((40, 20))}, state, params)
    rows = np.flatnonzero(np.asarray(tk.masks(state).forward["kernel"]).any(1))
    assert len(rows) > 20 and rows.max() > 30


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tk.snfs(0.9, momentum=1.0), "momentum=1.0 must lie in"),
        (lambda: tk.snfs(0.9, structure=tk.fan_in()), "fan-in keeps as many in every"),
        (lambda: tk.dsr(0.9, threshold=0.0), "threshold=0.0 must be above 0"),
        (lambda: tk.dsr(0.9, tolerance=1.0), "tolerance=1.0 must lie in"),
        (lambda: tk.dsr(0.9, structure=tk.blocks(2, 2)), "holds single weights"),
        (lambda: tk.dsr(0.9, structure=tk.n_of_m(4)), "N:4 keeps as many in every"),
        (lambda: tk.mest(0.9, weight=-1.0), "weight=-1.0 must be at least 0"),
        (lambda: tk.mest(0.9, drop_fraction=1.5), "drop_fraction=1.5 must lie in"),
        (lambda: tk.srigl(0.9, gamma_sal=-0.1), "gamma_sal=-0.1 must be at least 0"),
        (lambda: tk.srigl(0.9, structure=tk.unstructured), "no constant fan-in"),
        (lambda: tk.srigl(0.9, structure=tk.fan_in(1, 4)), "ablated one by one"),
        (lambda: tk.deep_r(0.9, l1=-1.0), "l1=-1.0 must be at least 0"),
        (lambda: tk.deep_r(0.9, structure=tk.blocks(2, 2)), "a sign to every weight"),
        (lambda: tk.deep_r(0.9, structure=tk.fan_in()), 'use scope="leaf"'),
        (
            lambda: tk.sparse(optax.sgd(0.1), tk.deep_r(0.9)),
            "deep_r: what it adds .* learning_rate",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_blocks_of_two_sizes_cannot_be_exchanged():
    method = tk.snfs(0.5, structure=tk.blocks(2, 4), refresh=tk.every(1))
    tx = tk.sparse(optax.sgd(0.1), method)
    params = {"one/kernel": jnp.ones((4, 8)), "two/kernel": jnp.ones((8, 2))}
    with pytest.raises(ValueError, match="'one/kernel' have 8 entries, .* 4: moving"):
        tx.update(params, tx.init(params), params)


def test_blocks_move_whole():
    method = tk.snfs(0.5, structure=tk.blocks(2, 2), refresh=tk.every(1))
    tx = tk.sparse(optax.sgd(0.1), method)
    params = {"one/kernel": jnp.ones((4, 8)), "two/kernel": jnp.ones((8, 4))}
    state = tx.init(params)
    grads = {"one/kernel": jnp.ones((4, 8)), "two/kernel": jnp.zeros((8, 4))}
    _, state = tx.update(grads, state, params)
    forward = numpy_tree(tk.masks(state).forward)
    # Two of four blocks each were dropped, and all four go where the momentum is.
    assert {path: int(m.sum()) for path, m in forward.items()} == {
        "one/kernel": 24,
        "two/kernel": 8,
    }
    for mask in forward.values():
        units = mask.reshape(mask.shape[0] // 2, 2, -1, 2)
        assert (units.all((1, 3)) == units.any((1, 3))).all()


def test_every_gradient_of_snfs_is_counted():
    """2 f_sparse + f_dense, at every step."""
    tx = tk.sparse(optax.sgd(0.1), tk.snfs(0.75, refresh=tk.every(7)))
    params = {"kernel": jnp.ones((8, 8))}
    state = tx.init(params)
    for _ in range(3):
        found = tk.metrics.flops(params, tk.masks(state), {"kernel": 5})
        assert found.fraction == pytest.approx((2 * 0.25 + 1) / 3)
        _, state = tx.update(params, state, params)


def test_nothing_to_explore_is_an_error():
    tx = tk.sparse(optax.sgd(0.1), tk.rigl(0.5))
    with pytest.raises(ValueError, match="use tk.rigl_itop"):
        tk.metrics.exploration_rate(tx.init({"kernel": jnp.ones((4, 4))}))
