"""Sparse products in unmodified NNX models: same numbers as the dense model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import topkast_jax as tk

KEY = jax.random.key(0)


class Mixed(nnx.Module):
    """One layer of every kind, those included that cannot multiply by units."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.window = nnx.Conv(16, 16, (3, 3), rngs=rngs)
        self.point = nnx.Conv(16, 32, (1, 1), strides=(2, 2), rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.split = nnx.LinearGeneral(32, (4, 8), rngs=rngs)
        self.join = nnx.LinearGeneral((4, 8), 16, axis=(-2, -1), rngs=rngs)
        self.einsum = nnx.Einsum("bi,oi->bo", (16, 16), (16,), rngs=rngs)
        self.stages = nnx.List([nnx.Linear(16, 16, use_bias=False, rngs=rngs)])
        self.own = nnx.Param(jax.random.normal(rngs.params(), (16, 16)) / 4)
        self.out = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x: Any) -> Any:  # [B, 6, 6, 16]
        x = nnx.relu(self.point(nnx.relu(self.window(x))))
        x = self.norm(x).mean((1, 2))
        x = self.einsum(self.join(jnp.tanh(self.split(x))))
        for stage in self.stages:
            x = stage(x)
        x = self.out(x @ self.own)
        # A kernel that is also read without calling its layer.
        return x @ self.out.kernel.T + x @ self.out.kernel[...]


AXES = {"split/kernel": "i o o", "join/kernel": "i i o", "einsum/kernel": "o i"}


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(16, 16, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + jnp.tanh(self.dense(x))


class Stacked(nnx.Module):
    """Three layers under one nnx.scan, rematerialised; two that share a kernel."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        make = nnx.vmap(Layer, in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=3)(make)(rngs)
        self.one = nnx.Linear(16, 16, rngs=rngs)
        self.two = nnx.Linear(16, 16, rngs=rngs)
        self.two.kernel = self.one.kernel

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x: Any, layer: Any) -> Any:
            return layer(x)

        return self.two(self.one(forward(x, self.layers)))


def transformation(layout: Any, structure: tk.Structure, axes: Any = None, **how: Any):
    how.setdefault("where", tk.kernels)
    method = tk.top_kast(0.5, 0.25, structure=structure, **how)
    rules = tk.axes(axes) if axes else None
    return tk.sparse(optax.adam(0.1), method, layout=layout, axes=rules)


def compare(model: Any, x: Any, tx: Any) -> dict[str, str]:
    """Outputs, gradients and statistics through units against those of dense arrays."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    theta, state, _ = tk.start(tx, params)
    assert isinstance(theta, nnx.State)

    def loss(theta: Any, expanded: bool) -> Any:
        alpha = tk.sparsify(theta, tk.masks(state), expanded=expanded)
        if expanded:
            merged = nnx.merge(graphdef, alpha, rest, copy=True)
        else:
            merged = tk.flax.nnx.merge(graphdef, alpha, rest)
        return jnp.sum(jnp.sin(merged(x))), nnx.state(merged, nnx.BatchStat)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    one, two = gradient(theta, True), gradient(theta, False)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), one, two
    )
    alpha = tk.sparsify(theta, tk.masks(state), expanded=False)
    return tk.flax.nnx.routes(graphdef, (alpha, rest), x)


@pytest.mark.parametrize(
    "layout", ["block", pytest.param("packed", marks=pytest.mark.slow)]
)
def test_every_kind_of_layer(layout):
    x = jax.random.normal(KEY, (2, 6, 6, 16))
    tx = transformation(layout, tk.blocks(8, 8), AXES, where=("*kernel", "own"))
    assert compare(Mixed(nnx.Rngs(0)), x, tx) == {
        "window/kernel": "expanded: Conv has a window of 3x3",
        "point/kernel": "expanded",
        "split/kernel": "expanded",
        "join/kernel": "expanded",
        "einsum/kernel": "expanded",
        "stages/0/kernel": "expanded",
        "own": "expanded: no layer of the model multiplies by it",
        "out/kernel": "expanded",
    }


@pytest.mark.parametrize(
    ("structure", "expected"),
    [(tk.blocks(32, 32), "blocks_rows_first"), (tk.fan_in(1, 64), "columns")],
)
def test_blocks_worth_a_product_of_their_own(structure, expected):
    x = jax.random.normal(KEY, (4, 64))
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    found = compare(model, x, transformation("block", structure))
    assert found == {"kernel": expected}


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"layers/*/kernel": "s i o"}, "expanded"),
        (
            None,
            "expanded: its kernel has 1 axes more than the layer reads; declare them, "
            "and no others, as a stack with tk.axes",
        ),
    ],
)
def test_inside_scan_and_remat(axes, said):
    x = jax.random.normal(KEY, (2, 16))
    tx = transformation("block", tk.blocks(8, 8), axes)
    found = compare(Stacked(nnx.Rngs(0)), x, tx)
    assert found["layers/dense/kernel"] == said
    assert len(found) == 2  # the shared kernel is one


@pytest.mark.slow
def test_attention():
    """Layers that NNX itself builds from others."""
    model = nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0))
    axes = {"out/kernel": "i i o"} | {
        f"{name}/kernel": "i o o" for name in ("query", "key", "value")
    }
    tx = transformation("block", tk.blocks(4, 4), axes)
    found = compare(model, jax.random.normal(KEY, (2, 5, 16)), tx)
    assert set(found.values()) == {"expanded"} and len(found) == 4


class Scaled(nnx.Linear):
    """A layer whose call is not that of nnx.Linear."""

    def __call__(self, x: Any) -> Any:
        return 10 * super().__call__(x)


def twice(*operands: Any, **settings: Any) -> Any:
    return 2 * jax.lax.dot_general(*operands, **settings)


@pytest.mark.parametrize(
    ("make", "shape", "reason"),
    [
        (lambda r: Scaled(16, 16, rngs=r), (4, 16), "Scaled is not a Linear"),
        (
            lambda r: nnx.Linear(16, 16, precision="highest", rngs=r),
            (4, 16),
            "the layer asks for a precision",
        ),
        (
            lambda r: nnx.Linear(16, 16, preferred_element_type=jnp.float32, rngs=r),
            (4, 16),
            "the layer asks for a preferred_element_type",
        ),
        (
            lambda r: nnx.Linear(16, 16, dot_general=twice, rngs=r),
            (4, 16),
            "the layer has a dot_general of its own",
        ),
        (
            lambda r: nnx.LinearGeneral(8, 8, batch_axis={0: 4}, rngs=r),
            (4, 3, 8),
            "input and kernel have batch dimensions in common",
        ),
        (
            lambda r: nnx.Einsum("bhi,hio->bho", (4, 8, 8), rngs=r),
            (2, 4, 8),
            "input, kernel and output have an axis in common",
        ),
        (
            lambda r: nnx.LinearGeneral(16, (2, 8), rngs=r),
            (4, 16),
            "its axes are read as 'i i o', and the layer multiplies as 'i o o'",
        ),
        (
            lambda r: nnx.Conv(16, 16, (1,), feature_group_count=2, rngs=r),
            (2, 4, 16),
            "Conv has feature groups",
        ),
    ],
)
def test_layers_that_are_expanded(make, shape, reason):
    x = jax.random.normal(KEY, shape)
    (said,) = compare(
        make(nnx.Rngs(0)), x, transformation("block", tk.blocks(8, 8))
    ).values()
    assert said.startswith(f"expanded: {reason}")


def test_computes_in_the_dtype_of_the_layer():
    model = nnx.Linear(64, 64, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jax.random.normal(KEY, (4, 64))
    graphdef, params = nnx.split(model)
    theta, state, _ = tk.start(transformation("block", tk.blocks(32, 32)), params)
    alpha = tk.sparsify(theta, tk.masks(state))
    y = tk.flax.nnx.merge(graphdef, alpha)(x)
    assert y.dtype == jnp.bfloat16
    dense = nnx.merge(graphdef, tk.export(theta, state))(x)
    np.testing.assert_allclose(
        y.astype(jnp.float32), dense.astype(jnp.float32), atol=0.05
    )


def test_nothing_but_the_merged_model_changes():
    model, x = nnx.Linear(16, 16, rngs=nnx.Rngs(0)), jax.random.normal(KEY, (4, 16))
    before = model(x)
    graphdef, params = nnx.split(model)
    same = tk.flax.nnx.merge(graphdef, params)
    assert same.dot_general is jax.lax.dot_general  # dense parameters pass as they are
    np.testing.assert_array_equal(same(x), before)
    theta, state, _ = tk.start(transformation("block", tk.blocks(8, 8)), params)
    alpha = tk.sparsify(theta, tk.masks(state))
    merged = tk.flax.nnx.merge(graphdef, alpha)
    assert type(merged) is nnx.Linear
    merged(x)
    assert model.dot_general is jax.lax.dot_general
    np.testing.assert_array_equal(model(x), before)


def trained(layout: Any, method: tk.Method, steps: int = 4) -> Any:
    """What two NNX layers export after some steps, masks chosen anew in between."""
    model: Any = nnx.Sequential(
        nnx.Linear(16, 16, rngs=nnx.Rngs(0)),
        jnp.tanh,
        nnx.Linear(16, 8, rngs=nnx.Rngs(1)),
    )
    graphdef, params = nnx.split(model, nnx.Param)
    tx = tk.sparse(optax.adam(0.1), method, layout=layout)
    store: Any = None
    if layout == "masked":
        theta, state = params, tx.init(params)
    else:
        theta, state, store = tk.start(tx, params)
    x = jax.random.normal(KEY, (8, 16))

    def loss(theta: Any, state: Any) -> Any:
        alpha = tk.sparsify(theta, tk.masks(state))
        return jnp.mean((tk.flax.nnx.merge(graphdef, alpha)(x) - 1) ** 2)

    @jax.jit
    def step(theta: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(theta, state), state, theta)
        return optax.apply_updates(theta, updates), state

    for made in range(1, steps + 1):
        due = store is not None and tk.due(tx, made)
        found = tk.probe(loss, theta, state) if due and method.probe else None
        theta, state = step(theta, state)
        if due:
            theta, state, store = tk.refresh(tx, theta, state, store, found)
    tk.check(theta, state)
    return tk.export(theta, state)


GROUPED: Any = dict(refresh=tk.every(2), structure=tk.blocks(4, 4))
METHODS = {
    "top_kast": tk.top_kast(0.5, 0.25, **GROUPED),
    "rigl": tk.rigl(0.5, **GROUPED),
}


@pytest.mark.parametrize(
    ("layout", "method"),
    [
        ("block", "top_kast"),
        pytest.param("packed", "top_kast", marks=pytest.mark.slow),
        pytest.param("block", "rigl", marks=pytest.mark.slow),
    ],
)
def test_states_train_in_every_layout(layout, method):
    """As the masked layout trains them, which defines the meaning."""
    one, two = (trained(each, METHODS[method]) for each in ("masked", layout))
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, two
    )
