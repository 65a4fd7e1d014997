"""Sparse products in unmodified Linen models: same numbers as the dense model."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import sizes_in

import topkast_jax as tk

KEY = jax.random.key(0)


class Mixed(nn.Module):
    """One layer of every kind, those included that cannot multiply by blocks."""

    @nn.compact
    def __call__(self, x: Any) -> Any:  # [B, 6, 6, 16]
        x = nn.relu(nn.Conv(16, (3, 3), name="window")(x))
        x = nn.relu(nn.Conv(32, (1, 1), strides=(2, 2), name="point")(x))
        x = x.mean((1, 2))
        x = nn.DenseGeneral((4, 8), name="split")(x)
        x = jnp.tanh(x)
        x = nn.DenseGeneral(16, axis=(-2, -1), name="join")(x)
        x = nn.Einsum((16, 16), "bi,io->bo", name="einsum")(x)
        scale = self.param("kernel", nn.initializers.lecun_normal(), (16, 16))
        return nn.Dense(16, name="out")(x @ scale)


class Stacked(nn.Module):
    """Three layers under one nn.scan, rematerialised."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x: Any, _: None) -> Any:
                return x + jnp.tanh(nn.Dense(16, name="dense")(x)), None

        scan = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scan(name="layers")(x, None)[0]


AXES = {
    "split/kernel": "i o o",
    "join/kernel": "i i o",
    "layers/*/kernel": "s i o",
}


def start(model: nn.Module, x: Any, layout: Any, structure: tk.Structure) -> Any:
    params = model.init(KEY, x)["params"]
    known = jax.tree_util.tree_flatten_with_path(params)[0]
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in known]
    axes = {
        p: a for p, a in AXES.items() if p in names or "layers/dense/kernel" in names
    }
    axes = {
        p: a for p, a in axes.items() if ("layers" in p) == isinstance(model, Stacked)
    }
    method = tk.top_kast(0.5, 0.25, structure=structure)
    tx = tk.sparse(optax.sgd(0.1), method, layout=layout, axes=tk.axes(axes))
    return tk.start(tx, params)


def compare(model: nn.Module, x: Any, layout: Any, structure: tk.Structure) -> Any:
    """Outputs and gradients through units against those through dense arrays."""
    theta, state, _ = start(model, x, layout, structure)
    apply = jax.jit(tk.flax.apply(model))

    def loss(theta: Any, expanded: bool) -> Any:
        alpha = tk.sparsify(theta, tk.masks(state), expanded=expanded)
        run = model.apply if expanded else apply
        return jnp.sum(jnp.sin(run({"params": alpha}, x)))

    one = jax.value_and_grad(loss)(theta, True)
    two = jax.value_and_grad(loss)(theta, False)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), one, two
    )
    alpha = tk.sparsify(theta, tk.masks(state), expanded=False)
    return tk.flax.routes(model, {"params": alpha}, x)


@pytest.mark.parametrize(
    "layout", ["block", pytest.param("packed", marks=pytest.mark.slow)]
)
def test_every_kind_of_layer(layout):
    x = jax.random.normal(KEY, (2, 6, 6, 16))
    found = compare(Mixed(), x, layout, tk.blocks(8, 8))
    assert found == {
        "window/kernel": "expanded: Conv has a window of 3x3",
        "point/kernel": "expanded",
        "split/kernel": "expanded",
        "join/kernel": "expanded",
        "einsum/kernel": "expanded",
        "kernel": "expanded: Mixed is not a Dense, DenseGeneral, Einsum or 1x1 Conv layer",
        "out/kernel": "expanded",
    }


def test_blocks_worth_a_product_of_their_own():
    x = jax.random.normal(KEY, (4, 64))
    for structure, expected in (
        (tk.blocks(32, 32), "blocks_rows_first"),
        (tk.fan_in(1, 64), "columns"),
        (tk.fan_in(), "expanded"),
        (tk.unstructured, "expanded"),
    ):
        found = compare(nn.Dense(128), x, "block", structure)
        assert found == {"kernel": expected}


@pytest.mark.parametrize(
    "structure",
    [
        tk.unstructured,
        pytest.param(tk.blocks(8, 8), marks=pytest.mark.slow),
        pytest.param(tk.fan_in(2, 16), marks=pytest.mark.slow),
    ],
)
def test_inside_scan_and_remat(structure):
    found = compare(Stacked(), jax.random.normal(KEY, (2, 16)), "block", structure)
    assert set(found) == {"layers/dense/kernel"}


def test_dense_parameters_pass_as_they_are():
    model, x = nn.Dense(4), jnp.ones((2, 8))
    variables = model.init(KEY, x)
    np.testing.assert_array_equal(
        tk.flax.apply(model)(variables, x), model.apply(variables, x)
    )
    assert tk.flax.routes(model, variables, x) == {}


def test_axes_that_do_not_fit_the_layer():
    """A kernel whose declared axes are not what the layer contracts is expanded."""
    model, x = nn.DenseGeneral((4, 8)), jnp.ones((2, 16))
    params = model.init(KEY, x)["params"]
    tx = tk.sparse(optax.sgd(0.1), tk.static(0.5), layout="block")
    theta, state, _ = tk.start(tx, params)
    alpha = tk.sparsify(theta, tk.masks(state))
    (said,) = tk.flax.routes(model, {"params": alpha}, x).values()
    assert said == (
        "expanded: its axes are read as 'i i o', and the layer multiplies as 'i o o'; "
        "declare them with tk.axes"
    )
    dense = model.apply({"params": tk.export(theta, state)}, x)
    np.testing.assert_allclose(
        tk.flax.apply(model)({"params": alpha}, x), dense, rtol=1e-5, atol=1e-6
    )


def test_computes_in_the_dtype_of_the_layer():
    model = nn.Dense(64, dtype=jnp.bfloat16)
    x = jax.random.normal(KEY, (4, 64))
    theta, state, _ = start(model, x, "block", tk.blocks(32, 32))
    alpha = tk.sparsify(theta, tk.masks(state))
    y = tk.flax.apply(model)({"params": alpha}, x)
    assert y.dtype == jnp.bfloat16
    dense = model.apply({"params": tk.export(theta, state)}, x)
    np.testing.assert_allclose(
        y.astype(jnp.float32), dense.astype(jnp.float32), atol=0.05
    )


class Scaled(nn.Dense):
    """A layer whose call is not that of nn.Dense."""

    def __call__(self, x: Any) -> Any:
        return 10 * super().__call__(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Scaled(64), "expanded: Scaled is not a Dense"),
        (nn.Dense(64, precision="highest"), "expanded: the layer asks for a precision"),
    ],
)
def test_layers_with_a_mind_of_their_own_are_expanded(model, reason):
    x = jax.random.normal(KEY, (4, 64))
    (said,) = compare(model, x, "block", tk.blocks(32, 32)).values()
    assert said.startswith(reason)


def test_boxed_kernels():
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    model, x = nn.Dense(64, kernel_init=boxed), jax.random.normal(KEY, (4, 64))
    found = compare(model, x, "block", tk.blocks(32, 32))
    assert set(found) == {"kernel"}


@pytest.mark.parametrize(
    ("text", "x", "kernel", "axes"),
    [
        ("bi,io->bo", (4, 16), (16, 8), "i o"),
        ("...i,oi->...o", (2, 3, 16), (8, 16), "o i"),
        ("bti,iho->bhto", (2, 3, 8), (8, 4, 8), "i o o"),
        ("bhti,ohi->bto", (2, 4, 3, 8), (16, 4, 8), "o i i"),
        ("bih,hio->ob", (2, 8, 4), (4, 8, 8), "i i o"),
    ],
)
def test_einsums_that_are_plain_products(text, x, kernel, axes):
    """Wherever the axes lie; given to the layer, or to its call."""
    x = jax.random.normal(KEY, x)
    model = nn.Einsum(kernel, bias_init=nn.initializers.normal())
    params = model.init(KEY, x, text)["params"]
    method = tk.top_kast(0.5, 0.25, structure=tk.blocks(4, 4))
    rules = tk.axes({"kernel": axes})
    tx = tk.sparse(optax.sgd(0.1), method, layout="block", axes=rules)
    theta, state, _ = tk.start(tx, params)

    def loss(theta: Any, expanded: bool) -> Any:
        alpha = tk.sparsify(theta, tk.masks(state), expanded=expanded)
        run = model.apply if expanded else tk.flax.apply(model)
        return jnp.sum(jnp.sin(run({"params": alpha}, x, einsum_str=text)))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    one, two = gradient(theta, True), gradient(theta, False)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), one, two
    )
    alpha = tk.sparsify(theta, tk.masks(state))
    same = nn.Einsum(kernel, text)
    assert tk.flax.routes(same, {"params": alpha}, x) == {"kernel": "expanded"}
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    assert tk.flax.routes(same, {"params": alpha}, shape) == {"kernel": "expanded"}


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (
            nn.Einsum((4, 8, 8), "bhi,hio->bho"),
            (2, 4, 8),
            "input, kernel and output have an axis in common",
        ),
        (
            nn.Einsum((8, 8), "bi,ii->bi", use_bias=False),
            (2, 8),
            "an index is repeated: no plain product",
        ),
        (
            nn.Einsum((8, 8), "bi,io->o", use_bias=False),
            (2, 8),
            "it sums over an axis of input or kernel alone",
        ),
        (
            nn.Einsum((2, 8, 8), "bi,bio->bo"),
            (2, 8),
            "input, kernel and output have an axis in common",
        ),
        (
            nn.Einsum((8, 8), "i...,...o->io", use_bias=False),
            (8, 8),
            "no plain product of input and kernel: 'i...,...o->io'",
        ),
        (
            nn.Einsum((8, 16), "bi,oi->bo"),
            (2, 16),
            "its axes are read as 'i o', and the layer multiplies as 'o i'; declare "
            "them with tk.axes",
        ),
        (
            nn.Einsum((8, 16), "bi,io->bo", preferred_element_type=jnp.float32),
            (2, 8),
            "the layer asks for an element type",
        ),
    ],
)
def test_einsums_that_are_expanded(model, shape, reason):
    x = jax.random.normal(KEY, shape)
    (said,) = compare(model, x, "block", tk.blocks(8, 8)).values()
    assert said == f"expanded: {reason}"


def test_dense_general_contracts_any_axes():
    x = jax.random.normal(KEY, (8, 3, 4))
    model = nn.DenseGeneral(16, axis=(0, 2))
    params = model.init(KEY, x)["params"]
    rules = tk.axes({"kernel": "i i o"})
    tx = tk.sparse(optax.sgd(0.1), tk.static(0.5), layout="block", axes=rules)
    theta, state, _ = tk.start(tx, params)
    alpha = tk.sparsify(theta, tk.masks(state))
    assert tk.flax.routes(model, {"params": alpha}, x) == {"kernel": "expanded"}
    dense = model.apply({"params": tk.export(theta, state)}, x)
    np.testing.assert_allclose(
        tk.flax.apply(model)({"params": alpha}, x), dense, rtol=1e-5, atol=1e-6
    )


def test_a_wrong_call_is_refused_by_the_layer():
    model, x = nn.Einsum((16, 8), "bi,io->bo"), jnp.ones((2, 16))
    params = model.init(KEY, x)["params"]
    tx = tk.sparse(optax.sgd(0.1), tk.static(0.5), layout="block")
    theta, state, _ = tk.start(tx, params)
    alpha = tk.sparsify(theta, tk.masks(state))
    with pytest.raises(ValueError, match="einsum_str"):
        tk.flax.apply(model)({"params": alpha}, x, "bi,io->ob")


@pytest.mark.parametrize("inside", [True, False])
def test_a_stack_is_expanded_inside_its_scan(inside: bool) -> None:
    """Where it is left by units until then; else all of it is dense at once."""

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            class Layer(nn.Module):
                @nn.compact
                def __call__(self, x: Any, _: None) -> Any:
                    return x + jnp.tanh(nn.Dense(48, use_bias=False)(x)), None

            scan = nn.scan(
                nn.remat(Layer),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=16,
            )
            return scan(name="layers")(x, None)[0]

    model, x = Deep(), jnp.ones((2, 48))
    tx = tk.sparse(
        optax.adam(0.1),
        tk.static(0.95),
        layout="packed",
        axes=tk.axes({"*/kernel": "s i o"}),
    )
    theta, state, _ = tk.start(tx, model.init(KEY, x)["params"])

    def loss(theta: Any) -> jax.Array:
        alpha = tk.sparsify(theta, tk.masks(state), expanded=not inside)
        return jnp.sum(tk.flax.apply(model)({"params": alpha}, x) ** 2)

    sizes = sizes_in(jax.jit(jax.grad(loss)).lower(theta).compile().as_text())
    layer = 48 * 48
    assert layer in sizes  # one is made
    assert (max(sizes) < 2 * layer) == inside
    assert (16 * layer in sizes) != inside
