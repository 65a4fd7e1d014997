"""meProp and SWAT against their oracle, in functions and in unmodified models."""

import math
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from oracles import activations

import topkast_jax as tk
from topkast_jax.flax.activations import swat_rules

KEY = jax.random.key(0)
# Sums of up to a hundred float32 products, against float64.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def kept_of(size: int, sparsity: float) -> int:
    return round((1 - sparsity) * size)


def share(x: np.ndarray, sparsity: float) -> np.ndarray:
    """x with the zeros of a sparsity: the whole array is one selection."""
    return activations.top_tensor(x, kept_of(x.size, sparsity))


def rows(g: np.ndarray, k: int, unified: bool, axes: int = 1) -> np.ndarray:
    """The k largest entries over the last axes of each row, or the same for all rows."""
    flat = g.reshape(-1, math.prod(g.shape[-axes:]))
    choose = activations.top_columns if unified else activations.top_rows
    return choose(flat, k).reshape(g.shape)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Against the oracle of a layer.

ROWS, INPUTS, OUTPUTS = 7, 9, 10


def layer_inputs() -> list[np.ndarray]:
    """x, w, b and dL/dy, new ones at every call, of which float32 rounds nothing.

    Small integers over 16: their sums are exact in any order, and magnitudes tie.
    """
    seed = time.time_ns() % 2**31
    print(f"seed {seed}")  # pytest shows it when something fails
    random = np.random.default_rng(seed)
    shapes = ((ROWS, INPUTS), (INPUTS, OUTPUTS), (OUTPUTS,), (ROWS, OUTPUTS))
    return [random.integers(-40, 41, s).astype(np.float32) / 16 for s in shapes]


def assert_equal(found: Any, expected: activations.Linear, what: str) -> None:
    for name, one, two in zip(expected._fields, found, expected, strict=True):
        np.testing.assert_array_equal(one, two, f"{name}, {what}")


@pytest.mark.parametrize("full_bias", [True, False])
@pytest.mark.parametrize("unified", [False, True])
def test_a_layer_of_meprop_is_that_of_the_oracle(unified, full_bias):
    def layer(x, w, b, k):
        if full_bias:
            return tk.meprop(x @ w, k=k, unified=unified) + b
        return tk.meprop(x @ w + b, k=k, unified=unified)

    @jax.jit
    def found(x, w, b, dy, k):
        y, back = jax.vjp(lambda *a: layer(*a, k), x, w, b)
        return y, *back(dy)

    inputs = layer_inputs()
    options = {"unified": unified, "full_bias": full_bias}
    for k in range(1, OUTPUTS + 1):
        expected = activations.meprop(*inputs, k, **options)
        assert_equal(found(*inputs, k), expected, f"k={k}")


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize(
    ("of_w", "of_x"), [(0.5, None), (0.8, 0.25), (0.0, 0.7), (0.3, 0.0)]
)
def test_a_layer_of_swat_is_that_of_the_oracle(of_w, of_x, per):
    axes = {"tensor": None, "row": (-1,)}[per]

    @jax.jit
    def found(x, w, b, dy):
        def layer(x, w, b):
            return tk.swat(x, w, of_w, activation_sparsity=of_x, axes=axes) + b

        y, back = jax.vjp(layer, x, w, b)
        return y, *back(dy)

    inputs = layer_inputs()
    size = {"tensor": ROWS * INPUTS, "row": INPUTS}[per]
    of_x = of_w if of_x is None else of_x
    counts = kept_of(INPUTS * OUTPUTS, of_w), kept_of(size, of_x)
    expected = activations.swat(*inputs, *counts, per=per)
    assert_equal(found(*inputs), expected, f"k={counts}")


@pytest.mark.parametrize("name", ["meprop", "unified", "swat"])
def test_fifty_steps_of_a_layer(name):
    """A Dense layer with its bias, trained beside that of the oracle."""
    model, few = nn.Dense(OUTPUTS), kept_of(ROWS * INPUTS, 0.5)
    apply, layer = {
        "meprop": (tk.flax.meprop(model, k=3), lambda *a: activations.meprop(*a, 3)),
        "unified": (
            tk.flax.meprop(model, k=3, unified=True),
            lambda *a: activations.meprop(*a, 3, unified=True),
        ),
        "swat": (
            tk.flax.swat(model, 0.6, activation_sparsity=0.5),
            lambda *a: activations.swat(*a, kept_of(INPUTS * OUTPUTS, 0.6), few),
        ),
    }[name]
    x, wanted = draw(50, ROWS, INPUTS), draw(50, ROWS, OUTPUTS, seed=1)
    params = {"kernel": draw(INPUTS, OUTPUTS, seed=2) / 3, "bias": np.zeros(OUTPUTS)}
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    tx = optax.sgd(0.1, momentum=0.5)

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry

        def loss(params: Any) -> Any:
            y = apply({"params": params}, batch[0])
            return jnp.sum((y - batch[1]) ** 2) / (2 * ROWS)

        updates, state = tx.update(jax.grad(loss)(params), state)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    _, found = jax.jit(lambda *a: lax.scan(step, *a))(
        (params, tx.init(params)), (x, wanted)
    )
    histories = [
        activations.layer_run(
            params["kernel"],
            params["bias"],
            lambda t: (x[t], wanted[t]),
            one,
            learning_rate=0.1,
            momentum=0.5,
        )
        for one in (layer, activations.dense)
    ]
    for t, (w, b) in enumerate(histories[0][1:]):
        for one, two in ((found["kernel"][t], w), (found["bias"][t], b)):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5, err_msg=f"{t}")
    assert abs(histories[0][-1][0] - histories[1][-1][0]).max() > 0.1


# The functions.


@pytest.mark.parametrize("unified", [False, True])
def test_meprop_by_hand(unified):
    g = jnp.array([[1.0, -4.0, 3.0, 0.0], [-2.0, 0.5, -1.0, 1.5]])
    y = jnp.arange(8.0).reshape(2, 4)
    value, back = jax.vjp(lambda y: tk.meprop(y, 0.5, unified=unified), y)
    np.testing.assert_array_equal(value, y)
    expected = [[0, -4, 3, 0], [-2, 0, 0, 1.5]]
    if unified:  # sums of magnitudes 3, 4.5, 4, 1.5
        expected = [[0, -4, 3, 0], [0, 0.5, -1, 0]]
    np.testing.assert_array_equal(back(g)[0], expected)


def test_meprop_over_several_axes():
    g = draw(3, 2, 4)
    back = jax.vjp(lambda y: tk.meprop(y, k=3, axes=(-1, 1)), jnp.zeros(g.shape))[1]
    np.testing.assert_array_equal(back(g)[0], rows(g, 3, False, axes=2))
    back = jax.vjp(lambda y: tk.meprop(y, k=2, axes=(0,)), jnp.zeros(g.shape))[1]
    expected = np.moveaxis(rows(np.moveaxis(g, 0, -1), 2, False), -1, 0)
    np.testing.assert_array_equal(back(g)[0], expected)


def test_a_traced_k():
    g = draw(4, 6)

    @jax.jit
    def gradient(k):
        return jax.grad(lambda y: (g * tk.meprop(y, k=k)).sum())(jnp.zeros(g.shape))

    for k in (1, 4, 6):
        np.testing.assert_array_equal(gradient(k), rows(g, k, False))


@pytest.mark.parametrize("unified", [False, True])
def test_meprop_in_a_network(unified):
    x, w1, b, w2 = (
        draw(8, 5),
        draw(5, 10, seed=1),
        draw(10, seed=2),
        draw(10, 3, seed=3),
    )

    def loss(x, w1, b, w2):
        h = jnp.tanh(tk.meprop(x @ w1, k=3, unified=unified) + b)
        return jnp.sin(h @ w2).sum()

    found = jax.grad(loss, (0, 1, 2, 3))(x, w1, b, w2)
    x, w1, b, w2 = (a.astype(np.float64) for a in (x, w1, b, w2))
    h = np.tanh(x @ w1 + b)
    g2 = np.cos(h @ w2)
    g1 = (g2 @ w2.T) * (1 - h**2)
    kept = rows(g1, 3, unified)
    expected = (kept @ w1.T, x.T @ kept, g1.sum(0), h.T @ g2)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, **CLOSE)
    columns = np.abs(np.asarray(found[1])).sum(0) > 0
    assert columns.sum() == 3 if unified else columns.sum() > 3


@pytest.mark.parametrize("of_x", [None, 0.0, 0.9])
def test_swat_in_a_network(of_x):
    x, w1, w2 = draw(8, 5), draw(5, 10, seed=1), draw(10, 3, seed=2)

    def loss(x, w1, w2):
        h = jnp.tanh(tk.swat(x, w1, 0.6, activation_sparsity=of_x))
        return jnp.sin(tk.swat(h, w2, 0.8, activation_sparsity=of_x)).sum()

    found = jax.value_and_grad(loss, (0, 1, 2))(x, w1, w2)
    x, w1, w2 = (a.astype(np.float64) for a in (x, w1, w2))
    s1, s2 = share(w1, 0.6), share(w2, 0.8)
    h = np.tanh(x @ s1)
    g2 = np.cos(h @ s2)
    g1 = (g2 @ s2.T) * (1 - h**2)
    t1 = share(x, 0.6 if of_x is None else of_x)
    t2 = share(h, 0.8 if of_x is None else of_x)
    expected = (np.sin(h @ s2).sum(), (g1 @ s1.T, t1.T @ g1, t2.T @ g2))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), found, expected
    )
    assert np.any(np.asarray(found[1][1])[s1 == 0])  # what S leaves out is trained


def test_swat_selects_activations_per_example_when_asked():
    x, w, g = draw(4, 6), draw(6, 3, seed=1), draw(4, 3, seed=2)

    def loss(w, axes):
        return (g * tk.swat(x, w, 0.5, axes=axes)).sum()

    each = np.stack([share(row, 0.5) for row in x])
    for axes, kept in ((None, share(x, 0.5)), ((-1,), each)):
        np.testing.assert_allclose(jax.grad(loss)(w, axes), kept.T @ g, **CLOSE)
    assert (each != share(x, 0.5)).any()


def test_swat_of_an_einsum_and_a_convolution():
    x, w, g = draw(2, 6, 6, 3), draw(3, 3, 3, 4, seed=1), draw(2, 4, 4, 4, seed=2)

    def convolve(x, w):
        return lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    found = jax.vjp(lambda x, w: tk.swat(x, w, 0.75, product=convolve), x, w)[1](g)
    np.testing.assert_allclose(found[0], conv_back_input(g, share(w, 0.75)), **CLOSE)
    np.testing.assert_allclose(found[1], conv_back_weight(share(x, 0.75), g), **CLOSE)

    def contract(x, w):
        return jnp.einsum("bti,hoi->bhto", x, w)

    x, w, g = draw(2, 3, 4), draw(2, 5, 4, seed=1), draw(2, 2, 3, 5, seed=2)
    found = jax.vjp(lambda x, w: tk.swat(x, w, 0.5, product=contract), x, w)[1](g)
    expected = (
        np.einsum("bhto,hoi->bti", g, share(w, 0.5)),
        np.einsum("bhto,bti->hoi", g, share(x, 0.5)),
    )
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, two, **CLOSE)


def test_ties_go_to_the_first_and_k_is_exact():
    back = jax.vjp(lambda y: tk.meprop(y, k=2), jnp.zeros((2, 5)))[1]
    np.testing.assert_array_equal(back(-jnp.ones((2, 5)))[0], [[-1, -1, 0, 0, 0]] * 2)
    np.testing.assert_array_equal(
        tk.swat(jnp.eye(3), jnp.ones((3, 3)), 0.5), [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    )
    rounded = jnp.asarray(draw(16, 64)).astype(jnp.bfloat16)
    back = jax.vjp(lambda y: tk.meprop(y, k=13), jnp.zeros_like(rounded))[1]
    found = np.asarray(back(rounded)[0], np.float32)
    np.testing.assert_array_equal(
        found, rows(np.asarray(rounded, np.float32), 13, False)
    )
    assert (np.count_nonzero(found, axis=1) == 13).all()


def test_nothing_left_out_is_dense_bit_for_bit():
    x, w = jnp.asarray(draw(7, 9)), jnp.asarray(draw(9, 5, seed=1))

    def gradients(product):
        return jax.value_and_grad(lambda *a: jnp.sin(product(*a)).sum(), (0, 1))(x, w)

    dense = gradients(jnp.matmul)
    for product in (
        lambda x, w: tk.meprop(x @ w, 0.0),
        lambda x, w: tk.meprop(x @ w, k=5, unified=True),
        lambda x, w: tk.swat(x, w, 0.0),
    ):
        jax.tree.map(np.testing.assert_array_equal, gradients(product), dense)


def test_transformations():
    """jit, vmap, remat and scan: the gradients of the plain loop."""
    x, w = jnp.asarray(draw(4, 6)), jnp.asarray(draw(2, 6, 6, seed=1))

    def layer(h, w):
        return jnp.tanh(tk.meprop(tk.swat(h, w, 0.5), k=2))

    def loop(w, x):
        for one in w:
            x = layer(x, one)
        return jnp.sin(x).sum()

    def scanned(w, x):
        step = jax.checkpoint(lambda h, w: (layer(h, w), None))
        return jnp.sin(lax.scan(step, x, w)[0]).sum()

    gradient = jax.jit(jax.grad(loop, (0, 1)))
    batch = jnp.stack([x, 2 * x, -x])
    expected = [gradient(w, one) for one in batch]
    found = jax.jit(jax.grad(scanned, (0, 1)))(w, x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), found, expected[0]
    )
    found = jax.jit(jax.vmap(jax.grad(loop, (0, 1)), (None, 0)))(w, batch)
    jax.tree.map(
        lambda a, *b: np.testing.assert_allclose(a, np.stack(b), **CLOSE),
        found,
        *expected,
    )


def test_forward_mode():
    """SWAT's tangent is that of its gradient; meProp has none, and says so."""
    x, w = draw(4, 6), draw(6, 3, seed=1)
    dx, dw = draw(4, 6, seed=2), draw(6, 3, seed=3)
    _, tangent = jax.jvp(lambda x, w: tk.swat(x, w, 0.5), (x, w), (dx, dw))
    expected = dx @ share(w, 0.5) + share(x, 0.5) @ dw
    np.testing.assert_allclose(tangent, expected, **CLOSE)
    for of, direction, one in (
        (0, dx, dx @ share(w, 0.5)),
        (1, dw, share(x, 0.5) @ dw),
    ):
        fixed = [x, w]

        def alone(a, of=of, fixed=fixed):
            return tk.swat(*[a if i == of else b for i, b in enumerate(fixed)], 0.5)

        tangent = jax.jvp(alone, (fixed[of],), (direction,))[1]
        np.testing.assert_allclose(tangent, one, **CLOSE)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda y: tk.meprop(y, k=1), (x,), (dx,))

    def loss(w):
        return jnp.sin(tk.meprop(tk.swat(x, w, 0.5), k=2)).sum()

    # Forward over reverse: the rules' tangent of y moves the cotangents that are kept.
    product = jax.jvp(jax.grad(loss), (w,), (dw,))[1]
    y, t = x @ share(w, 0.5), share(x, 0.5)
    kept = rows(np.cos(y), 2, False) != 0
    expected = t.T @ np.where(kept, -np.sin(y) * (t @ dw), 0)
    np.testing.assert_allclose(product, expected, **CLOSE)


def test_no_product_for_an_input_that_is_data():
    """The gradient of a first layer costs two products, not three; of data, no selection."""
    x, w = draw(4, 6), draw(6, 3, seed=1)

    def loss(x, w):
        return tk.swat(x, w, 0.5).sum()

    for of, products in (((1,), 2), ((0,), 2), ((0, 1), 3)):
        program = str(jax.make_jaxpr(jax.grad(loss, of))(x, w))
        assert program.count("dot_general") == products


def test_low_precision():
    x = jnp.asarray(draw(8, 16)).astype(jnp.bfloat16)
    w = jnp.asarray(draw(16, 8, seed=1)).astype(jnp.bfloat16)
    y, back = jax.vjp(lambda x, w: tk.meprop(tk.swat(x, w, 0.5), k=3), x, w)
    assert y.dtype == jnp.bfloat16
    assert {g.dtype for g in back(y)} == {jnp.dtype(jnp.bfloat16)}
    # Magnitudes of 512 and 513 rows: equal in bfloat16, whose sums are made in float32.
    g = jnp.ones((513, 2), jnp.bfloat16).at[0, 0].set(0)
    back = jax.vjp(lambda y: tk.meprop(y, k=1, unified=True), jnp.zeros_like(g))[1]
    np.testing.assert_array_equal(back(g)[0].sum(0) > 0, [False, True])


def test_nan_is_seen_and_does_not_spread():
    nan = float("nan")
    back = jax.vjp(lambda y: tk.meprop(y, k=1), jnp.zeros((2, 3)))[1]
    g = jnp.array([[1.0, nan, 9.0], [1.0, 3.0, 2.0]])
    np.testing.assert_array_equal(back(g)[0], [[0, nan, 0], [0, 3, 0]])
    back = jax.vjp(lambda y: tk.meprop(y, k=1, unified=True), jnp.zeros((2, 3)))[1]
    np.testing.assert_array_equal(back(g)[0], [[0, nan, 0], [0, 3, 0]])
    w = jnp.array([[nan, 1.0], [2.0, 3.0]])
    y = tk.swat(jnp.ones((1, 2)), w, 0.5)
    np.testing.assert_array_equal(y, [[nan, 3]])
    x = jnp.array([[nan, 1.0], [2.0, 3.0]])
    dw = jax.grad(lambda w: tk.swat(x, w, 0.5).sum())(jnp.ones((2, 2)))
    np.testing.assert_array_equal(dw, [[nan, nan], [3, 3]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y: tk.meprop(y), "meprop: give sparsity or k, one of the two"),
        (
            lambda y: tk.meprop(y, 0.5, k=1),
            "meprop: give sparsity or k, one of the two",
        ),
        (lambda y: tk.meprop(y, 1.0), r"meprop: sparsity=1.0 must lie in \[0, 1\)"),
        (lambda y: tk.meprop(y, 0.9), "of 4 entries would keep none; at most 0.75"),
        (lambda y: tk.meprop(y, k=0), "k=0 would keep nothing; the least is 1"),
        (lambda y: tk.meprop(y, k=5), "k=5 is more than the 4 entries"),
        (lambda y: tk.meprop(y, k=0.9), "k=0.9 must be an integer"),
        (
            lambda y: tk.meprop(y, k=1, axes=(2,)),
            r"axes=\(2,\) are not axes of an array",
        ),
        (
            lambda y: tk.meprop(y, k=1, axes=(1, -1)),
            "are not axes of an array of shape",
        ),
        (lambda y: tk.meprop(y.astype(int), k=1), "y must be real floats, not int32"),
        (lambda y: tk.swat(y, y, -0.1), "swat: weights: sparsity=-0.1 must lie"),
        (lambda y: tk.swat(y, y, 0.99), "swat: weights: sparsity=0.99 of 16 entries"),
        (
            lambda y: tk.swat(y, y, 0.5, activation_sparsity=1.5),
            "swat: activations: sparsity=1.5 must lie",
        ),
        (lambda y: tk.swat(y, y.astype(int), 0.5), "w must be real floats, not int32"),
        (lambda y: tk.flax.meprop(nn.Dense(4)), "tk.flax.meprop: give sparsity or k"),
        (lambda y: tk.flax.swat(nn.Dense(4), 1.0), "tk.flax.swat: sparsity=1.0"),
        (
            lambda y: tk.flax.swat(nn.Dense(4), 0.5, activation_sparsity=2.0),
            "tk.flax.swat: activation_sparsity=2.0",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((4, 4)))


# Unmodified models.


def windows(x: np.ndarray, high: int = 3) -> np.ndarray:
    """[n, h, w, c] as [n, h', w', c, high, high]."""
    return np.lib.stride_tricks.sliding_window_view(x, (high, high), axis=(1, 2))


def conv_back_weight(x: np.ndarray, g: np.ndarray) -> np.ndarray:
    return np.einsum("nhwiab,nhwo->abio", windows(x), g)


def conv_back_input(g: np.ndarray, w: np.ndarray) -> np.ndarray:
    around = np.pad(g, ((0, 0), (2, 2), (2, 2), (0, 0)))
    return np.einsum("nhwoab,abio->nhwi", windows(around), w[::-1, ::-1])


class Mixed(nn.Module):
    """A convolution, two general layers, an einsum and a last layer."""

    @nn.compact
    def __call__(self, x: Any) -> Any:  # [n, 5, 5, 2]
        x = jnp.tanh(nn.Conv(4, (3, 3), padding="VALID", name="conv")(x))
        x = jnp.tanh(nn.DenseGeneral((3, 4), axis=(1, 2, 3), name="split")(x))
        x = jnp.tanh(nn.Einsum((4, 6), "nhi,io->nho", name="einsum")(x))
        return nn.Dense(5, name="out")(x)


CHANGED = ["conv/kernel", "split/kernel", "einsum/kernel"]


def by_hand(params: Any, x: np.ndarray, s: Any, t: Any, r: Any) -> tuple[Any, Any]:
    """Loss and gradients of sum(sin(Mixed)), in float64.

    `s` of weights, `t` of activations, `r(g, axes)` of cotangents sparsify; the last
    layer is left alone.
    """
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    k1, k2, k3, k4 = (p[name]["kernel"] for name in ("conv", "split", "einsum", "out"))
    x = x.astype(np.float64)
    s1, s2, s3 = s(k1), s(k2), s(k3)
    y1 = np.einsum("nhwiab,abio->nhwo", windows(x), s1)
    h1 = np.tanh(y1 + p["conv"]["bias"])
    h2 = np.tanh(np.einsum("nhwc,hwcij->nij", h1, s2) + p["split"]["bias"])
    h3 = np.tanh(np.einsum("nhi,io->nho", h2, s3) + p["einsum"]["bias"])
    y4 = np.einsum("nhi,io->nho", h3, k4) + p["out"]["bias"]
    g4 = np.cos(y4)
    g3 = np.einsum("nho,io->nhi", g4, k4) * (1 - h3**2)
    r3 = r(g3, 1)
    g2 = np.einsum("nho,io->nhi", r3, s3) * (1 - h2**2)
    r2 = r(g2, 2)
    g1 = np.einsum("nij,hwcij->nhwc", r2, s2) * (1 - h1**2)
    r1 = r(g1, 1)
    gradients = {
        "conv": {"kernel": conv_back_weight(t(x), r1), "bias": g1.sum((0, 1, 2))},
        "split": {"kernel": np.einsum("nhwc,nij->hwcij", t(h1), r2), "bias": g2.sum(0)},
        "einsum": {
            "kernel": np.einsum("nhi,nho->io", t(h2), r3),
            "bias": g3.sum((0, 1)),
        },
        "out": {"kernel": np.einsum("nhi,nho->io", h3, g4), "bias": g4.sum((0, 1))},
    }
    return np.sin(y4).sum(), gradients


def same(x: Any, axes: Any = None) -> Any:
    del axes
    return x


def compare(apply: Any, params: Any, x: np.ndarray, expected: Any) -> None:
    def loss(params: Any) -> Any:
        return jnp.sin(apply({"params": params}, x)).sum()

    found = jax.jit(jax.value_and_grad(loss))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        (found[0], dict(found[1])),
        expected,
    )


@pytest.fixture(scope="module")
def mixed() -> Any:
    x = draw(4, 5, 5, 2)
    return x, Mixed().init(KEY, x)["params"]


@pytest.mark.parametrize("unified", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_meprop_in_a_model(mixed, unified):
    x, params = mixed

    def r(g: np.ndarray, axes: int) -> np.ndarray:
        size = math.prod(g.shape[-axes:])
        return rows(g, round(0.5 * size), unified, axes)

    apply = tk.flax.meprop(Mixed(), 0.5, unified=unified, where=CHANGED)
    compare(apply, params, x, by_hand(params, x, same, same, r))


def test_swat_in_a_model(mixed):
    x, params = mixed
    apply = tk.flax.swat(Mixed(), 0.5, activation_sparsity=0.75, where=CHANGED)
    expected = by_hand(
        params, x, lambda w: share(w, 0.5), lambda h: share(h, 0.75), same
    )
    compare(apply, params, x, expected)


@pytest.mark.slow
def test_swat_by_distribution_in_a_model(mixed):
    x, params = mixed
    shapes = {
        "conv/kernel": (3, 3, 2, 4),
        "split/kernel": (36, 12),
        "einsum/kernel": (4, 6),
    }
    counts = tk.erk(shapes, 0.5)
    shares = {math.prod(s): 1 - counts[p] / math.prod(s) for p, s in shapes.items()}
    assert len({round(s, 3) for s in shares.values()}) > 1
    inputs = {4 * 5 * 5 * 2: 72, 4 * 9 * 4: 432, 4 * 3 * 4: 24}  # to the kernel's size
    apply = tk.flax.swat(Mixed(), 0.5, distribution=tk.erk, where=CHANGED)
    expected = by_hand(
        params,
        x,
        lambda w: share(w, shares[w.size]),
        lambda h: share(h, shares[inputs[h.size]]),
        same,
    )
    compare(apply, params, x, expected)


@pytest.mark.parametrize("of_x", [None, 0.75])
def test_swat_by_distribution(of_x):
    """SWAT-ERK: each layer's own share, for its weights and its activations."""
    shapes = {"a": (3, 3, 2, 4), "b": (36, 12), "c": (24, 6)}
    rules = swat_rules(0.5, of_x, tk.erk, "swat")(shapes)
    assert len({rule.sparsity for rule in rules.values()}) == 3
    kept = {p: round((1 - r.sparsity) * math.prod(shapes[p])) for p, r in rules.items()}
    assert kept == tk.erk(shapes, 0.5)
    for rule in rules.values():
        assert rule.activation_sparsity == (of_x or rule.sparsity)


def test_nothing_left_out_is_the_dense_model_bit_for_bit(mixed):
    x, params = mixed

    def gradients(apply: Any) -> Any:
        def loss(params):
            return jnp.sin(apply({"params": params}, x)).sum()

        return jax.value_and_grad(loss)(params)

    dense = gradients(Mixed().apply)
    for apply in (tk.flax.meprop(Mixed(), 0.0), tk.flax.swat(Mixed(), 0.0)):
        jax.tree.map(np.testing.assert_array_equal, gradients(apply), dense)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: None) -> Any:
        return x + jnp.tanh(nn.Dense(8, name="dense")(x)), None


class Stacked(nn.Module):
    """Three layers under one nn.scan, rematerialised."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        scan = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scan(name="layers")(x, None)[0]


def test_inside_scan_and_remat():
    """Each layer of a stack chooses for itself."""
    x = draw(4, 8)
    params = Stacked().init(KEY, x)["params"]

    def loss(params: Any, apply: Any) -> Any:
        return jnp.sin(apply({"params": params}, x)).sum()

    def loop(variables: Any, x: Any) -> Any:
        stack = variables["params"]["layers"]["dense"]
        for w, b in zip(stack["kernel"], stack["bias"], strict=True):
            x = x + jnp.tanh(tk.swat(x, w, 0.75) + b)
        return x

    apply = tk.flax.swat(Stacked(), 0.75)
    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    one, two = (gradient(params, a) for a in (apply, loop))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), one, two)


class Odd(nn.Module):
    """A parameter called kernel that no layer multiplies by, and a layer of its own."""

    @nn.compact
    def __call__(self, x: Any, wide: bool = True) -> Any:
        scale = self.param("kernel", nn.initializers.ones, (8, 8))
        x = nn.Dense(8, name="in", dot_general=lax.dot_general)(x @ scale)
        if not wide:
            return x
        return nn.Dense(8, name="wide")(x)


def test_layers_by_pattern():
    x = draw(4, 8)
    variables = Odd().init(KEY, x)

    def call(*args: Any, **how: Any) -> Any:
        return tk.flax.meprop(Odd(), 0.5, **how)(variables, *args)

    np.testing.assert_array_equal(call(x), Odd().apply(variables, x))
    np.testing.assert_array_equal(call(x, where="w*"), Odd().apply(variables, x))
    with pytest.raises(ValueError, match="'none/\\*' matches no parameter; there are"):
        call(x, where=["wide/*", "none/*"])
    with pytest.raises(ValueError, match="'in/kernel': the layer has a dot_general of"):
        call(x, where="in/*")
    with pytest.raises(ValueError, match="'kernel': Odd is not a Dense"):
        call(x, where="kernel")
    with pytest.raises(ValueError, match="no layer of the model can be changed"):
        call(x, False)
    with pytest.raises(ValueError, match="selects no parameter"):
        call(x, where=lambda path, shape: shape[0] > 8)
    with pytest.raises(
        ValueError, match="'wide/kernel': meprop: k=9 is more than the 8"
    ):
        tk.flax.meprop(Odd(), k=9)(variables, x)
    with pytest.raises(
        ValueError, match="'wide/kernel': swat: weights: sparsity=0.999"
    ):
        tk.flax.swat(Odd(), 0.999)(variables, x)


# Together with sparse weights.


def sparse_parts(layout: str) -> tuple[Any, Any, Any]:
    x = draw(4, 16)
    model = nn.Sequential([nn.Dense(16), jnp.tanh, nn.Dense(8)])
    params = model.init(KEY, x)["params"]
    tx = tk.sparse(optax.adam(0.01), tk.top_kast(0.75, 0.5), layout=layout)
    theta, state, _ = tk.start(tx, params)
    return model, (theta, state), x


@pytest.mark.parametrize(
    "layout", [pytest.param("packed", marks=pytest.mark.slow), "block"]
)
@pytest.mark.parametrize("change", ["meprop", "swat"])
def test_with_sparse_weights_in_other_layouts(layout, change):
    model, (theta, state), x = sparse_parts(layout)
    how = (0.0,) if change == "swat" else (0.75,)
    more = {"activation_sparsity": 0.75} if change == "swat" else {}
    apply = getattr(tk.flax, change)(model, *how, **more)

    def loss(theta: Any, expanded: Any) -> Any:
        alpha = tk.sparsify(theta, tk.masks(state), expanded=expanded)
        return jnp.sin(apply({"params": alpha}, x)).sum()

    one = jax.value_and_grad(loss)(theta, None)
    two = jax.value_and_grad(loss)(theta, True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), one, two)


def test_with_sparse_weights():
    """Weights on A, and a gradient on B, of activations and cotangents that are sparse."""
    x, model = draw(4, 16), nn.Dense(8, use_bias=False)
    params = {"kernel": jnp.asarray(draw(16, 8, seed=1))}
    tx = tk.sparse(optax.sgd(0.1), tk.top_kast(0.75, 0.5))
    masks = tk.masks(tx.init(params))
    a, b = (np.asarray(m["kernel"]) for m in (masks.forward, masks.backward))
    g = np.cos(x.astype(np.float64) @ np.where(a, params["kernel"], 0))
    for apply, expected in (
        (tk.flax.swat(model, 0.0, activation_sparsity=0.75), share(x, 0.75).T @ g),
        (tk.flax.meprop(model, k=3), x.T @ rows(g, 3, False)),
    ):

        def loss(theta: Any, apply: Any = apply) -> Any:
            alpha = tk.sparsify(theta, masks)
            return jnp.sin(apply({"params": alpha}, x)).sum()

        found = jax.grad(loss)(params)["kernel"]
        np.testing.assert_allclose(found, np.where(b, expected, 0), **CLOSE)


@pytest.mark.parametrize(
    "names",
    [
        ("dense", "meprop", "swat"),
        pytest.param(("unified", "both"), marks=pytest.mark.slow),
    ],
)
def test_training(names):
    """The loss falls, with each method alone and with sparse weights, each in its own way."""
    x = draw(64, 12)
    y = np.sin(x[:, :4] * 2)
    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(4)])
    params = model.init(KEY, x)["params"]
    hidden = "layers_0/kernel"
    runs = {
        "dense": (model.apply, optax.adam(0.02)),
        "meprop": (tk.flax.meprop(model, 0.75, where=hidden), optax.adam(0.02)),
        "unified": (
            tk.flax.meprop(model, 0.75, unified=True, where=hidden),
            optax.adam(0.02),
        ),
        "swat": (tk.flax.swat(model, 0.5), optax.adam(0.02)),
        "both": (
            tk.flax.swat(model, 0.0, activation_sparsity=0.75),
            tk.sparse(optax.adam(0.02), tk.top_kast(0.5, 0.25, refresh=tk.every(5))),
        ),
    }
    ends = {}
    for name in names:
        apply, tx = runs[name]
        theta, state = params, tx.init(params)

        def loss(theta: Any, state: Any, apply: Any = apply, name: str = name) -> Any:
            alpha = tk.sparsify(theta, tk.masks(state)) if name == "both" else theta
            return ((apply({"params": alpha}, x) - y) ** 2).mean()

        @jax.jit
        def step(theta: Any, state: Any, loss: Any = loss, tx: Any = tx) -> Any:
            value, gradients = jax.value_and_grad(loss)(theta, state)
            updates, state = tx.update(gradients, state, theta)
            return optax.apply_updates(theta, updates), state, value

        values = []
        for _ in range(40):
            theta, state, value = step(theta, state)
            values.append(float(value))
        assert values[-1] < 0.6 * values[0], (name, values[0], values[-1])
        ends[name] = values[-1]
    assert len(set(ends.values())) == len(ends)


# NNX.


class Other(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(2, 4, (3, 3), padding="VALID", rngs=rngs)
        self.split = nnx.LinearGeneral((3, 3, 4), (3, 4), axis=(1, 2, 3), rngs=rngs)
        self.einsum = nnx.Einsum("nhi,io->nho", (4, 6), (6,), rngs=rngs)
        self.out = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = jnp.tanh(self.split(jnp.tanh(self.conv(x))))
        return self.out(jnp.tanh(self.einsum(x)))


@pytest.mark.parametrize("change", ["meprop", "swat"])
def test_in_an_nnx_model(change):
    x, model = draw(4, 5, 5, 2), Other(nnx.Rngs(0))
    changed = getattr(tk.flax.nnx, change)(model, 0.5, where=CHANGED)
    graphdef, state = nnx.split(changed, nnx.Param)
    assert hash(graphdef) == hash(nnx.split(changed, nnx.Param)[0])
    params = nnx.to_pure_dict(state)
    if change == "swat":

        def half(a):
            return share(a, 0.5)

        expected = by_hand(params, x, half, half, same)
    else:
        expected = by_hand(
            params,
            x,
            same,
            same,
            lambda g, n: rows(g, round(0.5 * math.prod(g.shape[-n:])), False, n),
        )

    def apply(variables: Any, x: Any) -> Any:
        filled = jax.tree.unflatten(
            jax.tree.structure(state), jax.tree.leaves(variables["params"])
        )
        return nnx.merge(graphdef, filled)(x)

    compare(apply, params, x, expected)
    assert model.conv.conv_general_dilated is lax.conv_general_dilated


def test_nnx_layers_by_pattern():
    model = Other(nnx.Rngs(0))
    with pytest.raises(ValueError, match="'none' matches no parameter"):
        tk.flax.nnx.swat(model, 0.5, where="none")
    model.out.dot_general = lambda *a, **k: lax.dot_general(*a, **k)
    with pytest.raises(
        ValueError, match="'out/kernel': the layer has a dot_general of"
    ):
        tk.flax.nnx.swat(model, 0.5, where="out/*")
    changed = tk.flax.nnx.meprop(model, k=5)
    with pytest.raises(
        ValueError, match="'conv/kernel': meprop: k=5 is more than the 4"
    ):
        changed(draw(4, 5, 5, 2))


def test_sparse_weights_in_an_nnx_model():
    """Kernels that are lists of units are expanded where the product is another."""
    x = draw(4, 16)
    model = tk.flax.nnx.meprop(nnx.Linear(16, 8, rngs=nnx.Rngs(0)), k=3)
    graphdef, params = nnx.split(model, nnx.Param)
    method = tk.top_kast(0.75, 0.5, structure=tk.blocks(4, 4))
    tx = tk.sparse(optax.sgd(0.1), method, layout="block")
    theta, state, _ = tk.start(tx, params)

    def loss(theta: Any, expanded: bool) -> Any:
        alpha = tk.sparsify(theta, tk.masks(state), expanded=expanded)
        merge = nnx.merge if expanded else tk.flax.nnx.merge
        return jnp.sin(merge(graphdef, alpha)(x)).sum()

    one, two = (jax.value_and_grad(loss)(theta, e) for e in (True, False))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), one, two)
    alpha = tk.sparsify(theta, tk.masks(state))
    (said,) = tk.flax.nnx.routes(graphdef, [alpha], x).values()
    assert said == "expanded: the layer has a dot_general of its own"
