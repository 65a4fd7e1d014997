"""The transformation: maskings, landing, leaks, NaN, merging, drop-in, errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk

X = jax.random.normal(jax.random.key(1), (16, 6))
Y = jax.random.normal(jax.random.key(2), (16, 3))


def start():
    one, two = jax.random.split(jax.random.key(0))
    return {
        "one": {"kernel": jax.random.normal(one, (6, 10)), "bias": jnp.zeros(10)},
        "two": {"kernel": jax.random.normal(two, (10, 3)), "bias": jnp.zeros(3)},
    }


def objective(alpha):
    hidden = jnp.tanh(X @ alpha["one"]["kernel"] + alpha["one"]["bias"])
    return jnp.mean((hidden @ alpha["two"]["kernel"] + alpha["two"]["bias"] - Y) ** 2)


def trainer(tx):
    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda t: objective(tk.sparsify(t, tk.masks(state))))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def run(tx, steps, params=None):
    params = start() if params is None else params
    state, step = tx.init(params), trainer(tx)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_clock_of_refresh_and_probe():
    """Due at 3 and 6: masks of steps 3 and 6 are new; the probe runs in steps 2 and 5."""
    tx = tk.sparse(optax.sgd(0.1), tk.rigl(0.7, refresh=tk.every(3)))
    params, state = start(), None
    state, step = tx.init(params), trainer(tx)
    moved, probed = [], []
    for t in range(8):
        before = tk.masks(state)
        if bool(before.probe["one"]["kernel"]):
            probed.append(t)
        params, state = step(params, state)
        if float(tk.metrics.churn(before, tk.masks(state))):
            moved.append(t + 1)
    assert (moved, probed) == ([3, 6], [2, 5])


def test_first_step_can_probe():
    tx = tk.sparse(optax.sgd(0.1), tk.rigl(0.7, refresh=tk.every(1)))
    state = tx.init(start())
    assert bool(tk.masks(state).probe["one"]["kernel"])


def test_momentum_and_decay_move_nothing_off_b():
    """Masked on the way in alone, momentum and weight decay would move the reservoir."""
    method = tk.top_kast(0.8, 0.6, refresh=tk.every(2))
    tx = tk.sparse(optax.adamw(0.1, weight_decay=0.5), method)
    params = start()
    state, step = tx.init(params), trainer(tx)
    for _ in range(5):
        outside = ~tk.masks(state).backward["one"]["kernel"]
        before = params["one"]["kernel"]
        params, state = step(params, state)
        after = params["one"]["kernel"]
        np.testing.assert_array_equal(after[outside], before[outside])
        assert bool(jnp.any(after != before))


def test_forgotten_sparsify_is_caught():
    tx = tk.sparse(optax.adam(0.01), tk.top_kast(0.8, 0.6))
    params = start()
    state = tx.init(params)
    _, state = tx.update(jax.grad(objective)(params), state, params)
    assert tk.health(state).leaks == 1
    with pytest.raises(ValueError, match="sparsify"):
        tk.check(params, state)


def test_weights_off_the_mask_are_caught():
    params, state = run(tk.sparse(optax.adam(0.01), tk.set_(0.8)), 2)
    tk.check(params, state)
    params["two"]["kernel"] += 1.0
    with pytest.raises(ValueError, match=r"'two/kernel': \d+ weights off the mask"):
        tk.check(params, state)


def test_first_nonfinite_gradient_is_named():
    tx = tk.sparse(optax.sgd(0.1), tk.top_kast(0.8, 0.6, refresh=tk.every(1)))
    params = start()
    state, step = tx.init(params), trainer(tx)
    params, state = step(params, state)
    masks = tk.masks(state)
    grads = jax.tree.map(jnp.zeros_like, params)
    inside = masks.forward["two"]["kernel"]
    grads["two"]["kernel"] = jnp.where(inside, jnp.nan, 0.0)
    _, state = tx.update(grads, state, params)
    found = tk.health(state).nonfinite
    assert (found.path, found.step) == ("two/kernel", 1)
    assert found.count == int(inside.sum())
    # no masks are chosen from a tree with NaN
    assert float(tk.metrics.churn(masks, tk.masks(state))) == 0


def test_no_refresh_from_infinite_parameters():
    tx = tk.sparse(optax.sgd(0.1), tk.top_kast(0.8, 0.6, refresh=tk.every(1)))
    params = start()
    state = tx.init(params)
    params["one"]["kernel"] = params["one"]["kernel"].at[0].set(jnp.inf)
    grads = jax.tree.map(jnp.zeros_like, params)
    _, after = tx.update(grads, state, params)
    assert float(tk.metrics.churn(tk.masks(state), tk.masks(after))) == 0


@pytest.mark.parametrize(
    "name", ["top_kast", "rigl", pytest.param("set", marks=pytest.mark.slow)]
)
def test_drop_in_is_sparsify(name):
    method = {
        "top_kast": tk.top_kast(0.8, 0.6, refresh=tk.every(2)),
        "set": tk.set_(0.8, refresh=tk.every(2)),
        "rigl": tk.rigl(0.8, refresh=tk.every(2)),
    }[name]
    tx = tk.sparse(optax.adamw(0.05), method)
    dropped = tk.drop_in(tx)
    params = start()
    state, step = tx.init(params), trainer(tx)
    drop_state = dropped.init(params)
    alpha = tk.export(params, drop_state)

    @jax.jit
    def plain_step(alpha, state):  # a trainer that knows nothing of masks
        updates, state = dropped.update(jax.grad(objective)(alpha), state, alpha)
        return optax.apply_updates(alpha, updates), state

    for _ in range(9):
        params, state = step(params, state)
        alpha, drop_state = plain_step(alpha, drop_state)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            tk.export(params, state),
            alpha,
        )
        ours, theirs = tk.masks(state).forward, tk.masks(drop_state).forward
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert tk.health(drop_state).leaks == 0
    exported = tk.export(alpha, drop_state)
    jax.tree.map(np.testing.assert_array_equal, exported, alpha)  # zeros are exact


def test_drop_in_notices_a_dense_start():
    tx = tk.drop_in(tk.sparse(optax.sgd(0.1), tk.top_kast(0.8, 0.6)))
    params = start()
    state = tx.init(params)
    updates, state = tx.update(jax.grad(objective)(params), state, params)
    assert tk.health(state).leaks == 1
    landed = optax.apply_updates(params, updates)
    jax.tree.map(np.testing.assert_array_equal, tk.export(landed, state), landed)


@pytest.mark.parametrize(
    "method",
    [
        tk.top_kast(0.0, 0.0, penalty=0.0),
        tk.set_(0.0, refresh=tk.every(2)),
        tk.static(0.0),
    ],
    ids=["top_kast", "set", "static"],
)
def test_sparsity_zero_is_dense_training(method):
    """Bit for bit, eagerly; under jit XLA fuses the two differently."""
    inner = optax.adamw(0.01)
    tx = tk.sparse(inner, method)
    params, plain = start(), start()
    state, plain_state = tx.init(params), inner.init(plain)
    for _ in range(4):
        masks = tk.masks(state)
        grads = jax.grad(lambda t, m=masks: objective(tk.sparsify(t, m)))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, plain_state = inner.update(
            jax.grad(objective)(plain), plain_state, plain
        )
        plain = optax.apply_updates(plain, updates)
    jax.tree.map(np.testing.assert_array_equal, params, plain)


def test_backward_everything_and_a_equals_b():
    everything = tk.sparse(optax.sgd(0.1), tk.top_kast(0.9, 0.0))
    masks = tk.masks(everything.init(start()))
    assert bool(masks.backward["one"]["kernel"].all())
    same = tk.sparse(optax.sgd(0.1), tk.top_kast(0.8, 0.8))
    masks = tk.masks(same.init(start()))
    jax.tree.map(np.testing.assert_array_equal, masks.forward, masks.backward)


def test_decoupled_penalty_keeps_its_ratio_under_adam():
    """B outside A decays 1/D times faster; through Adam that ratio would be lost."""
    rate, penalty = 0.1, 0.01
    tx = tk.sparse(
        optax.adam(rate),
        tk.top_kast(0.8, 0.5, penalty=penalty, penalty_mode="decoupled"),
        learning_rate=rate,
    )
    params = start()
    state = tx.init(params)
    masks = tk.masks(state)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, state, params)
    theta, u = params["one"]["kernel"], updates["one"]["kernel"]
    a, b = masks.forward["one"]["kernel"], masks.backward["one"]["kernel"]
    np.testing.assert_allclose(u[a], -rate * penalty * theta[a], rtol=1e-5)
    density = int(a.sum()) / a.size
    np.testing.assert_allclose(
        u[b & ~a], -rate * penalty / density * theta[b & ~a], rtol=1e-5
    )
    assert not bool(jnp.any(u[~b]))


def test_shapes_only_init_and_plan():
    tx = tk.sparse(optax.adam(0.1), tk.top_kast(0.8, 0.6))
    shapes = jax.eval_shape(start)
    abstract = jax.eval_shape(tx.init, shapes)
    concrete = jax.eval_shape(lambda: tx.init(start()))
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)
    plan = tk.plan(tx, shapes)
    rows = {row.path: row for row in plan.rows}
    assert (rows["one/kernel"].k_forward, rows["one/kernel"].k_backward) == (12, 24)
    assert rows["one/kernel"].slots == 2
    assert not rows["one/bias"].sparse
    assert "one/kernel" in str(plan)
    assert plan.slotless == ()
    flat = tk.plan(tk.sparse(optax.flatten(optax.adam(0.1)), tk.static(0.5)), shapes)
    assert flat.slotless == ("one/kernel", "two/kernel")
    assert "no slot" in str(flat)


def test_plan_wants_what_tk_sparse_made():
    tx = optax.chain(tk.sparse(optax.adam(0.1), tk.static(0.5)))
    with pytest.raises(ValueError, match=r"tk\.sparse returned"):
        tk.plan(tx, start())


def test_states_of_multi_transform_merge():
    def label(path, _):
        return "first" if path[0].key == "one" else "second"

    tx = optax.multi_transform(
        {
            "first": tk.sparse(optax.sgd(0.1), tk.top_kast(0.8, 0.6)),
            "second": tk.sparse(optax.adam(0.1), tk.static(0.5)),
        },
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )
    params, state = run(tx, 3)
    sparsity = tk.metrics.sparsity(tk.masks(state))
    assert sparsity["one/kernel"] == (0.8, 0.6)
    assert sparsity["two/kernel"] == (0.5, 0.5)
    tk.check(params, state)


def test_prefix_labels_merge():
    tx = optax.multi_transform(
        {
            "first": tk.sparse(optax.sgd(0.1), tk.top_kast(0.8, 0.6)),
            "dense": optax.sgd(0.1),
        },
        {"one": "first", "two": "dense"},
    )
    params, state = run(tx, 2)
    alpha = tk.export(params, state)
    assert alpha["two"]["kernel"] is params["two"]["kernel"]
    assert int((alpha["one"]["kernel"] != 0).sum()) == 12


def test_two_claims_on_a_parameter():
    tx = optax.chain(
        tk.sparse(optax.sgd(0.1), tk.static(0.5)),
        tk.sparse(optax.sgd(0.1), tk.static(0.5)),
    )
    with pytest.raises(ValueError, match="both hold 'one/kernel'"):
        tk.masks(tx.init(start()))


def test_no_sparse_state():
    with pytest.raises(ValueError, match=r"no state of tk\.sparse"):
        tk.masks(optax.adam(0.1).init(start()))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tk.top_kast(0.8, 0.9), "backward_sparsity=0.9 is above"),
        (lambda: tk.top_kast(1.0, 0.9), r"forward_sparsity=1.0 must lie in \[0, 1\)"),
        (lambda: tk.top_kast(0.9, -0.1), "backward_sparsity=-0.1"),
        (lambda: tk.top_kast(0.9, 0.8, penalty=-1.0), "penalty=-1"),
        (lambda: tk.top_kast(0.9, 0.8, stop=-1), "stop=-1"),
        (lambda: tk.static(1.2), "sparsity=1.2"),
        (lambda: tk.set_(0.9, drop_fraction=1.5), "drop_fraction=1.5"),
        (lambda: tk.sparse(optax.sgd(0.1), tk.static(0.5), layout="blocky"), "blocky"),
        (
            lambda: tk.sparse(
                optax.sgd(0.1), tk.top_kast(0.9, 0.8, penalty_mode="decoupled")
            ),
            "learning_rate",
        ),
    ],
)
def test_refused_when_built(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (tk.static(0.9, where="*/weights"), r"'\*/weights' matches no parameter"),
        (tk.static(0.9, where=re.compile("x")), "'x' matches no parameter"),
        (tk.static(0.9, where=lambda path, shape: False), "selects no parameter"),
        (tk.static(0.99), "would keep k=0"),
        (
            tk.static(0.5, distribution=tk.by_path({"no/*": 0.1})),
            "matches no parameter",
        ),
    ],
)
def test_refused_at_init(method, says):
    with pytest.raises(ValueError, match=says):
        jax.eval_shape(tk.sparse(optax.sgd(0.1), method).init, start())


def test_axes_are_checked():
    method = tk.static(0.5)
    with pytest.raises(ValueError, match="names 3 axes"):
        tk.sparse(optax.sgd(0.1), method, axes=tk.axes({"one/kernel": "s i o"})).init(
            start()
        )
    with pytest.raises(ValueError, match="matches no parameter"):
        tk.sparse(optax.sgd(0.1), method, axes=tk.axes({"x": "i o"})).init(start())
    with pytest.raises(ValueError, match="letters"):
        tk.axes({"x": "i q"})


def test_update_needs_parameters():
    tx = tk.sparse(optax.sgd(0.1), tk.static(0.5))
    params = start()
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(params, tx.init(params))


def test_evaluating_raw_parameters_shows():
    params, state = run(tk.sparse(optax.sgd(0.1), tk.top_kast(0.8, 0.5)), 3)
    assert float(objective(params)) != float(objective(tk.export(params, state)))


def test_seed_draws():
    def masks(seed):
        tx = tk.sparse(optax.sgd(0.1), tk.static(0.5), seed=seed)
        return tk.masks(tx.init(start())).forward["one"]["kernel"]

    assert bool((masks(1) == masks(1)).all())
    assert bool((masks(1) != masks(2)).any())


def test_ema_of_alpha_has_the_zeros_of_the_mask():
    params, state = run(tk.sparse(optax.adam(0.05), tk.static(0.7)), 1)
    ema = optax.ema(0.9)
    averaged, _ = ema.update(tk.export(params, state), ema.init(params))
    off = ~tk.masks(state).forward["one"]["kernel"]
    assert not bool(jnp.any(averaged["one"]["kernel"][off]))
