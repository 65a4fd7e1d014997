"""Statistics out of unmodified Linen models, against dense gradients and unfolded patches."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import gse

import topkast_jax as tk

KEY = jax.random.key(0)


class Mixed(nn.Module):
    """Layers of every kind; one is called twice."""

    @nn.compact
    def __call__(self, x: Any) -> Any:  # [B, 5, 4, 3]
        x = jnp.tanh(nn.Conv(4, (3, 2), strides=(2, 1), padding=1, name="window")(x))
        x = jnp.tanh(nn.Conv(6, (1, 1), name="point")(x)).mean((1, 2))
        x = jnp.tanh(nn.DenseGeneral((2, 4), name="split")(x))
        x = jnp.tanh(nn.DenseGeneral(8, axis=(-2, -1), name="join")(x))
        x = nn.Einsum((8, 8), "bi,io->bo", name="einsum")(x)
        twice = nn.Dense(8, name="twice")
        return jnp.tanh(twice(jnp.tanh(twice(x))))


AXES = {"split/kernel": "i o o", "join/kernel": "i i o"}
X = jax.random.normal(KEY, (6, 5, 4, 3))


def setup(
    model: nn.Module,
    x: Any,
    candidates: str,
    axes: Any = None,
    layout: str = "masked",
    **options: Any,
) -> Any:
    params = model.init(KEY, x)["params"]
    method = tk.gse(0.5, candidates=candidates, distribution=tk.uniform, **options)
    tx = tk.sparse(
        optax.sgd(0.1), method, layout=layout, axes=tk.axes(axes) if axes else None
    )
    if layout == "masked":
        return tx, params, tx.init(params)
    return tx, *tk.start(tx, params)[:2]


def gradients(
    model: nn.Module, x: Any, tx: Any, theta: Any, state: Any, key: Any = None
):
    """Of the dense weights, and of the taps."""
    apply, masks = tk.flax.apply(model), tk.masks(state)
    target = jax.random.normal(jax.random.key(9), jax.eval_shape(
        lambda: apply({"params": tk.sparsify(theta, masks)}, x)).shape)  # fmt: skip

    def loss(added: Any, zeros: Any) -> Any:
        alpha = tk.sparsify(theta, masks)
        alpha = jax.tree.map(jnp.add, alpha, added)
        y = apply({"params": tk.tap(alpha, zeros, key)}, x)
        return jnp.mean((y - target) ** 2)

    nothing = jax.tree.map(jnp.zeros_like, theta)
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(nothing, tk.taps(tx, theta, state))


def test_norms_bound_every_gradient():
    tx, theta, state = setup(Mixed(), X, "grabo", AXES)
    grads, stats = gradients(Mixed(), X, tx, theta, state)
    for name, grad in grads.items():
        found = stats[name]["kernel"]
        assert stats[name]["bias"] is None
        bound = found.inputs * found.outputs  # sizes of 1 spread over the kernel
        assert bound.shape == grad["kernel"].shape
        size = abs(grad["kernel"])
        assert (size <= bound * (1 + 1e-5)).all(), name
        assert (size > 1e-4 * bound).any(), name  # many rows cancel
        assert not found.signed


def test_norms_of_a_convolution_are_those_of_its_patches():
    model = nn.Conv(4, (3, 2), strides=(2, 1), padding=1)
    tx, theta, state = setup(model, X, "grabo")
    grads, stats = gradients(model, X, tx, theta, state)
    h = gse.patches(np.asarray(X), (3, 2), (2, 1), 1)
    found = stats["kernel"]
    np.testing.assert_allclose(
        found.inputs, abs(h).sum(1).reshape(3, 2, 3, 1), rtol=1e-5
    )
    assert found.outputs.shape == (1, 1, 1, 4)
    # With one place in all, the bound is the gradient itself.
    one = X[:1, :3, :2]
    model = nn.Conv(4, (3, 2), padding="VALID")
    tx, theta, state = setup(model, one, "grabo")
    grads, stats = gradients(model, one, tx, theta, state)
    bound = stats["kernel"].inputs * stats["kernel"].outputs
    np.testing.assert_allclose(abs(grads["kernel"]), bound, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Dense(3), X[:, 0, 0]),
        (nn.Conv(2, (2, 2), padding=((1, 0), (0, 1))), X[:2, :3, :2]),
        (nn.Einsum((3, 2), "bji,io->jbo", use_bias=False), X[:, :2, 0]),
    ],
    ids=["dense", "conv", "einsum"],
)
def test_sketches_are_unbiased(model, x):
    tx, theta, state = setup(model, x, "graest")
    n = 10_000
    keys = jax.random.split(jax.random.key(5), n)
    grads, stats = jax.vmap(
        lambda key: gradients(model, x, tx, theta, state, key)
    )(keys)  # fmt: skip
    assert stats["kernel"].signed
    draws = np.asarray(stats["kernel"].inputs * stats["kernel"].outputs, np.float64)
    error = draws.std(0, ddof=1) / np.sqrt(n)
    # At most 32 entries within 4.7 standard errors: one failure in ten thousand keys.
    assert (abs(draws.mean(0) - np.asarray(grads["kernel"][0])) < 4.7 * error).all()
    assert (draws.std(0) > 0).all()


class Stacked(nn.Module):
    """Three layers under one nn.scan, rematerialised."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x: Any, _: None) -> Any:
                return x + jnp.tanh(nn.Dense(4, name="dense")(x)), None

        scan = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scan(name="layers")(x, None)[0]


@pytest.mark.parametrize("candidates", ["grabo", "graest"])
def test_layers_of_a_scan_are_seen_one_by_one(candidates):
    x = jax.random.normal(KEY, (5, 4))
    tx, theta, state = setup(Stacked(), x, candidates, {"*/kernel": "s i o"})
    grads, stats = gradients(Stacked(), x, tx, theta, state, KEY)
    found = stats["layers"]["dense"]["kernel"]
    assert (found.inputs.shape, found.outputs.shape) == ((3, 4, 1), (3, 1, 4))
    if candidates == "grabo":
        np.testing.assert_allclose(
            found.inputs[0, :, 0], abs(x).sum(0), rtol=1e-5
        )  # fmt: skip
        bound = found.inputs * found.outputs * (1 + 1e-5)
        assert (abs(grads["layers"]["dense"]["kernel"]) <= bound).all()
        assert (abs(found.inputs[0] - found.inputs[1]) > 0).all()


def test_a_layer_that_multiplies_by_blocks_is_seen_as_well():
    x = jax.random.normal(KEY, (5, 64))
    model = nn.Dense(64)
    options = dict(structure=tk.blocks(32, 32))
    one, two = (
        stats_alone(model, x, *setup(model, x, "grabo", layout=layout, **options))
        for layout in ("masked", "block")
    )
    np.testing.assert_allclose(one.inputs, two.inputs, rtol=1e-6)
    np.testing.assert_allclose(one.outputs, two.outputs, rtol=1e-4)


def stats_alone(model: nn.Module, x: Any, tx: Any, theta: Any, state: Any) -> Any:
    def loss(zeros: Any) -> Any:
        alpha = tk.tap(tk.sparsify(theta, tk.masks(state)), zeros)
        return jnp.sum(tk.flax.apply(model)({"params": alpha}, x) ** 2)

    return jax.grad(loss)(tk.taps(tx, theta, state))["kernel"]


@pytest.mark.parametrize("candidates", ["grabo", "graest"])
def test_training_by_statistics(candidates):
    """Masks move, and no gradient is seen but that of S."""
    x = jax.random.normal(KEY, (16, 8))
    y = jnp.sin(x @ jax.random.normal(jax.random.key(3), (8, 4)))
    model = nn.Dense(4)
    tx, theta, state = setup(
        model, x, candidates, refresh=tk.every(2), drop_fraction=0.5
    )
    first = tk.masks(state).forward["kernel"]

    @jax.jit
    def step(theta: Any, state: Any, t: Any) -> Any:
        def loss(theta: Any, zeros: Any) -> Any:
            alpha = tk.tap(
                tk.sparsify(theta, tk.masks(state)), zeros, jax.random.key(t)
            )
            return jnp.mean((tk.flax.apply(model)({"params": alpha}, x) - y) ** 2)

        zeros = tk.taps(tx, theta, state)
        value, (grads, stats) = jax.value_and_grad(loss, argnums=(0, 1))(theta, zeros)
        updates, state = tx.update(grads, state, theta, stats=stats)
        return optax.apply_updates(theta, updates), state, value

    losses = []
    for t in range(20):
        theta, state, value = step(theta, state, t)
        losses.append(float(value))
    tk.check(theta, state)
    assert int(state.leaks) == 0
    assert losses[-1] < losses[0]
    assert (tk.masks(state).forward["kernel"] != first).any()


class Odd(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3))
        return nn.Conv(3, (2, 2), feature_group_count=3, name="grouped")(x) @ kernel


@pytest.mark.parametrize(
    ("model", "where", "message"),
    [
        (Odd(), ["kernel"], "'kernel' has no statistics: Odd is not a Dense"),
        (
            Odd(),
            ["grouped/kernel"],
            "'grouped/kernel' has no statistics: Conv has feature",
        ),
        (Mixed(), ["split/kernel"], r"'split/kernel'.*read as inputs.*\(6, 2, 1\)"),
    ],
)
def test_what_cannot_be_observed_is_named(model, where, message):
    tx, theta, state = setup(model, X, "grabo", where=where)
    with pytest.raises(ValueError, match=message):
        gradients(model, X, tx, theta, state)


def test_a_stack_that_is_not_declared_is_named():
    x = jax.random.normal(KEY, (5, 4))
    tx, theta, state = setup(Stacked(), x, "grabo")
    with pytest.raises(ValueError, match="'layers/dense/kernel'.*1 axes more.*tk.axes"):
        gradients(Stacked(), x, tx, theta, state)


def test_signs_need_a_key():
    model, x = nn.Dense(3), X[:, 0, 0]
    tx, theta, state = setup(model, x, "graest")
    with pytest.raises(ValueError, match="tk.tap: random signs are drawn anew"):
        gradients(model, x, tx, theta, state)


def test_methods_without_statistics_have_no_taps():
    tx, theta, state = setup(nn.Dense(3), X[:, 0, 0], "uniform")
    assert jax.tree.leaves(tk.taps(tx, theta, state)) == []
