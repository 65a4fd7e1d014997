"""Different methods in one model, by ordered rules."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from compilation import fast_compilation

import topkast_jax as tk

COMPILATION = fast_compilation()
NAMES = ("attention", "body", "head", "static")
RULES = [
    ("head/*", None),
    ("attention/*", tk.rigl(0.5, refresh=tk.every(2), drop_fraction=0.5)),
    ("static/*", tk.static(0.75, structure=tk.fan_in())),
    ("*", tk.top_kast(0.8, 0.6, refresh=tk.every(3), penalty=0.1)),
]


def params() -> Any:
    keys = jax.random.split(jax.random.key(0), len(NAMES))
    return {
        name: {"kernel": jax.random.normal(key, (8, 10)), "bias": jnp.zeros(10)}
        for name, key in zip(NAMES, keys, strict=True)
    }


def train(tx: Any, theta: Any, steps: int = 7) -> tuple[list[Any], list[Any]]:
    """Parameters and states, before each step and after the last."""

    @functools.partial(jax.jit, compiler_options=COMPILATION)
    def step(theta: Any, state: Any, t: Any) -> Any:
        def loss(theta: Any) -> jax.Array:
            alpha = tk.sparsify(theta, tk.masks(state))
            waves = [
                jnp.sum((x - jnp.sin(t + i + jnp.arange(x.size)).reshape(x.shape)) ** 2)
                for i, x in enumerate(jax.tree.leaves(alpha))
            ]
            return sum(waves, jnp.float32(0))

        updates, state = tx.update(jax.grad(loss)(theta), state, theta)
        return optax.apply_updates(theta, updates), state

    thetas = [theta]
    states = [jax.jit(tx.init, compiler_options=COMPILATION)(theta)]
    for t in range(steps):
        theta, state = step(thetas[-1], states[-1], t)
        thetas.append(theta)
        states.append(state)
    return thetas, states


def test_each_part_does_what_its_method_does_alone():
    inner = optax.adam(0.05)
    thetas, states = train(tk.sparse(inner, tk.groups(RULES), seed=3), params())
    for name, method in (("attention", 1), ("body", 3)):
        rules = [(f"{name}/*", RULES[method][1]), ("*", None)]
        alone = train(tk.sparse(inner, tk.groups(rules), seed=3), params())
        for theta, state, other, mine in zip(thetas, states, *alone, strict=True):
            # Terms of a sum do not see each other, so each part trains as if alone.
            np.testing.assert_allclose(
                theta[name]["kernel"], other[name]["kernel"], rtol=1e-6
            )
            np.testing.assert_array_equal(
                tk.masks(state).forward[name]["kernel"],
                tk.masks(mine).forward[name]["kernel"],
            )
    assert tk.masks(states[0]).forward["head"]["kernel"] is None
    counts = {"attention": (40, 40), "static": (20, 20), "body": (16, 32)}
    for theta, state in zip(thetas[1:], states[1:], strict=True):
        tk.check(theta, state)
        masks = tk.masks(state)
        for name, (a, b) in counts.items():
            assert int(masks.forward[name]["kernel"].sum()) == a
            assert int(masks.backward[name]["kernel"].sum()) == b
        off = ~np.asarray(masks.backward["attention"]["kernel"])
        assert not np.asarray(theta["attention"]["kernel"])[off].any()


def by_path(tree: Any) -> dict[str, np.ndarray]:
    """What is not None."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): np.asarray(leaf)
        for keys, leaf in flat
    }


def moved(states: list[Any], *name: str) -> list[int]:
    """Steps whose masks are not those of the step before."""
    path = "/".join((*name, "kernel"))
    masks = [by_path(tk.masks(s).forward)[path] for s in states]
    return [t for t in range(1, len(masks)) if (masks[t] != masks[t - 1]).any()]


def test_every_part_keeps_its_own_time_and_its_own_reservoir():
    thetas, states = train(tk.sparse(optax.sgd(0.1), tk.groups(RULES)), params())
    assert moved(states, "attention") == [2, 4, 6]
    assert moved(states, "static") == []
    assert set(moved(states, "body")) <= {3, 6} and moved(states, "body")
    off = ~np.asarray(tk.masks(states[1]).backward["body"]["kernel"])
    before, after = (np.asarray(t["body"]["kernel"]) for t in thetas[:2])
    assert before[off].any()  # the reservoir is there, and untouched
    np.testing.assert_array_equal(before[off], after[off])
    probe = tk.masks(states[1]).probe
    assert bool(probe["attention"]["kernel"]) and probe["body"]["kernel"] is None


def test_a_mixture_of_one_is_the_method_itself():
    method = tk.top_kast(0.8, 0.6, refresh=tk.every(2))
    one, two = (
        train(tk.sparse(optax.adam(0.05), chosen), params())
        for chosen in (method, tk.groups([("*", method)]))
    )
    jax.tree.map(np.testing.assert_array_equal, one[0], two[0])
    jax.tree.map(np.testing.assert_array_equal, one[1], two[1])


FIVE = [
    ("*/head/*", None),
    ("dsr/*", tk.dsr(0.75, threshold=0.1, drop_fraction=0.2, refresh=tk.every(2))),
    ("snfs/*", tk.snfs(0.8, drop_fraction=0.3, refresh=tk.every(3))),
    ("gse/*", tk.gse(0.7, subset=2.0, drop_fraction=0.5, refresh=tk.every(4))),
    ("deep_r/*", tk.deep_r(0.6, l1=0.2, temperature=0.05)),
    ("snip/*", tk.snip(0.9)),
    ("*", None),
]
KERNELS = {"one": (8, 10), "two": (10, 5)}


def five_parts() -> Any:
    """Two kernels for each method, one of them with a bias, and what no method has."""
    draws = np.random.default_rng(0)

    def kernel(*shape: int) -> Any:
        return {"kernel": jnp.asarray(draws.normal(size=shape), jnp.float32)}

    parts: Any = {
        pattern.split("/")[0]: {name: kernel(*s) for name, s in KERNELS.items()}
        for pattern, method in FIVE
        if method is not None
    }
    for part in parts.values():
        part["two"]["bias"] = jnp.ones(5)
    parts["dsr"]["head"] = kernel(5, 3)  # of the rule before that of dsr
    parts["rest"] = kernel(6, 4)
    return parts


def test_five_methods_keep_their_own_budgets():
    """K over a group, k of every kernel, or everything and then the few of SNIP."""
    tx = tk.sparse(optax.sgd(0.1), tk.groups(FIVE), learning_rate=0.1, seed=3)
    thetas, states = train(tx, five_parts(), steps=12)
    dense = {"dsr/head/kernel", "rest/kernel"}
    names = ("dsr", "snfs", "gse", "deep_r", "snip")
    dense |= {f"{name}/two/bias" for name in names}
    sparse = {f"{name}/{layer}/kernel" for name in names for layer in KERNELS}
    rows = {row.path: row.sparse for row in tk.plan(tx, thetas[0]).rows}
    assert rows == dict.fromkeys(dense, False) | dict.fromkeys(sparse, True)

    graph = oracle.erdos_renyi(KERNELS, 0.7)
    sizes: dict[str, set[tuple[int, ...]]] = {name: set() for name in names}
    for t, (theta, state) in enumerate(zip(thetas, states, strict=True)):
        masks = tk.masks(state)
        forward, backward = map(by_path, (masks.forward, masks.backward))
        assert forward.keys() == backward.keys() == sparse
        for name in names:
            a, b = (
                [int(found[f"{name}/{layer}/kernel"].sum()) for layer in KERNELS]
                for found in (forward, backward)
            )
            if name == "snip" and t == 0:  # looks at everything, trains nothing
                assert (a, b) == ([80, 50], [0, 0])
                continue
            assert a == b, (name, t)
            sizes[name].add(tuple(a))
            total = {"dsr": 32, "snfs": 26, "gse": 39, "deep_r": 52, "snip": 13}[name]
            assert sum(a) == total, (name, t)
        values = by_path(theta)
        if t:
            tk.check(theta, state)
            before = by_path(thetas[t - 1])
            assert all((values[path] != before[path]).all() for path in dense)
    assert sizes["gse"] == {tuple(graph[layer] for layer in KERNELS)}
    assert len(sizes["snip"]) == 1
    assert all(len(sizes[name]) > 1 for name in ("dsr", "snfs", "deep_r"))

    times = {
        name: {t for layer in KERNELS for t in moved(states, name, layer)}
        for name in names
    }
    assert times == {
        "dsr": {2, 4, 6, 8, 10, 12},
        "snfs": {3, 6, 9, 12},
        "gse": {4, 8, 12},
        "deep_r": set(range(1, 13)),
        "snip": {1},
    }


def packed_run(steps: int = 7) -> tuple[list[Any], list[Any]]:
    """As `train`, with packed arrays; exported weights in place of parameters."""
    tx = tk.sparse(optax.adam(0.05), tk.groups(RULES), seed=3, layout="packed")
    theta, state, store = tk.start(tx, params())

    def loss(theta: Any, state: Any, t: Any) -> jax.Array:
        alpha = tk.sparsify(theta, tk.masks(state), expanded=True)
        waves = [
            jnp.sum((x - jnp.sin(t + i + jnp.arange(x.size)).reshape(x.shape)) ** 2)
            for i, x in enumerate(jax.tree.leaves(alpha))
        ]
        return sum(waves, jnp.float32(0))

    @jax.jit
    def step(theta: Any, state: Any, t: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(theta, state, t), state, theta)
        return optax.apply_updates(theta, updates), state

    weights, masks = [tk.export(theta, state)], [tk.dense_masks(state)]
    for t in range(steps):
        due = tk.due(tx, t + 1)
        found = tk.probe(loss, theta, state, t) if due else None
        theta, state = step(theta, state, t)
        if due:
            theta, state, store = tk.refresh(tx, theta, state, store, found)
        weights.append(tk.export(theta, state))
        masks.append(tk.dense_masks(state))
    assert list(store.theta) == ["body/kernel"]  # the one with a reservoir
    return weights, masks


def test_packed_does_what_masked_does():
    thetas, states = train(
        tk.sparse(optax.adam(0.05), tk.groups(RULES), seed=3), params()
    )
    weights, masks = packed_run()
    for theta, state, alpha, mine in zip(thetas, states, weights, masks, strict=True):
        want = tk.masks(state)
        for name in ("attention", "body", "static"):
            for a, b in zip(want[:2], mine[:2], strict=True):
                np.testing.assert_array_equal(a[name]["kernel"], b[name]["kernel"])
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
            tk.export(theta, state),
            alpha,
        )


def test_the_plan_names_all_methods():
    tx = tk.sparse(optax.sgd(0.1), tk.groups(RULES))
    plan = tk.plan(tx, params())
    assert plan.method == "dense + rigl + static + top_kast"
    rows = {row.path: row for row in plan.rows}
    assert not rows["head/kernel"].sparse
    assert rows["attention/kernel"].k_forward == 40


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "no rule names a method"),
        ([("*", None)], "no rule names a method"),
        ([("*", 0.9)], "which is no method"),
    ],
)
def test_rules_that_make_no_sense(rules, message):
    with pytest.raises(ValueError, match=message):
        tk.groups(rules)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("body/*", tk.static(0.5))], "no rule covers 'attention/bias'"),
        ([("*", tk.static(0.5)), ("tail/*", None)], "'tail/.' matches no parameter"),
        ([("*", tk.static(0.5)), ("body/*", tk.rigl(0.5))], "put its rule before"),
    ],
)
def test_rules_that_do_not_fit_the_parameters(rules, message):
    tx = tk.sparse(optax.sgd(0.1), tk.groups(rules))
    with pytest.raises(ValueError, match=message):
        tx.init(params())
