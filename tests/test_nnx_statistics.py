"""Statistics out of unmodified NNX models: those of the Linen model of the same weights."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compilation import sizes_in
from flax import nnx

import topkast_jax as tk

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (6, 5, 4, 3))


class Mixed(nnx.Module):
    """Layers of every kind; one is called twice."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.window = nnx.Conv(3, 4, (3, 2), strides=(2, 1), padding=1, rngs=rngs)
        self.point = nnx.Conv(4, 6, (1, 1), rngs=rngs)
        self.split = nnx.LinearGeneral(6, (2, 4), rngs=rngs)
        self.join = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.einsum = nnx.Einsum("bi,io->bo", (8, 8), (8,), rngs=rngs)
        self.twice = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: Any) -> Any:  # [B, 5, 4, 3]
        x = jnp.tanh(self.point(jnp.tanh(self.window(x)))).mean((1, 2))
        x = self.einsum(jnp.tanh(self.join(jnp.tanh(self.split(x)))))
        return jnp.tanh(self.twice(jnp.tanh(self.twice(x))))


class MixedLinen(nn.Module):
    """The same in Linen."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = jnp.tanh(nn.Conv(4, (3, 2), strides=(2, 1), padding=1, name="window")(x))
        x = jnp.tanh(nn.Conv(6, (1, 1), name="point")(x)).mean((1, 2))
        x = jnp.tanh(nn.DenseGeneral((2, 4), name="split")(x))
        x = jnp.tanh(nn.DenseGeneral(8, axis=(-2, -1), name="join")(x))
        x = nn.Einsum((8, 8), "bi,io->bo", name="einsum")(x)
        twice = nn.Dense(8, name="twice")
        return jnp.tanh(twice(jnp.tanh(twice(x))))


AXES = {"split/kernel": "i o o", "join/kernel": "i i o"}


def transformation(
    candidates: str, layout: Any = "masked", axes: Any = None, **options: Any
) -> Any:
    words: Any = dict(candidates=candidates, distribution=tk.uniform) | options
    rules = tk.axes(axes) if axes else None
    return tk.sparse(optax.sgd(0.1), tk.gse(0.5, **words), layout=layout, axes=rules)


def begin(tx: Any, params: Any, layout: Any = "masked") -> Any:
    """theta and state."""
    if layout == "masked":
        return params, tx.init(params)
    return tk.start(tx, params)[:2]


def seen(apply: Any, x: Any, tx: Any, theta: Any, state: Any, key: Any = KEY) -> Any:
    """Gradients of alpha, or of B where that is stored alone, and of the taps."""

    # B is a mask in the masked layout alone.
    dense = bool(jax.tree.leaves(tk.masks(state).backward))

    def loss(given: Any, zeros: Any) -> Any:
        alpha = given if dense else tk.sparsify(given, tk.masks(state))
        y = apply(tk.tap(alpha, zeros, key), x)
        return jnp.mean((y - jnp.cos(jnp.arange(y.size)).reshape(y.shape)) ** 2)

    given = tk.export(theta, state) if dense else theta
    zeros = tk.taps(tx, theta, state)
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(given, zeros)


def of_nnx(graphdef: Any, *rest: Any) -> Any:
    return lambda alpha, x: tk.flax.nnx.merge(graphdef, alpha, *rest)(x)


def of_linen(model: nn.Module) -> Any:
    return lambda alpha, x: tk.flax.apply(model)({"params": alpha}, x)


def leaves(tree: Any) -> dict[str, Any]:
    """`{path: Taps or array}` of a dict or an nnx.State."""
    flat = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, tk.Taps)
    )[0]
    named = {}
    for keys, leaf in flat:
        words = jax.tree_util.keystr(keys, simple=True, separator="/")
        named[words.removesuffix("/value")] = leaf
    return named


def test_statistics_are_those_of_linen_and_bound_every_gradient():
    graphdef, params = nnx.split(Mixed(nnx.Rngs(0)))
    tx = transformation("grabo", axes=AXES)
    grads, stats = seen(of_nnx(graphdef), X, tx, *begin(tx, params))
    assert isinstance(stats, nnx.State)
    dense = nnx.to_pure_dict(params)
    _, theirs = seen(of_linen(MixedLinen()), X, tx, *begin(tx, dense))
    one, two, grads = leaves(stats), leaves(theirs), leaves(grads)
    assert one.keys() == two.keys() and len(one) == 6
    for path, found in one.items():
        np.testing.assert_allclose(found.inputs, two[path].inputs, rtol=1e-5)
        np.testing.assert_allclose(found.outputs, two[path].outputs, rtol=1e-4)
        bound, size = found.inputs * found.outputs, abs(grads[path])
        assert bound.shape == size.shape and not found.signed
        assert (size <= bound * (1 + 1e-5)).all(), path
        assert (size > 1e-4 * bound).any(), path  # many rows cancel


@pytest.mark.parametrize(
    ("make", "model", "x", "axes"),
    [
        pytest.param(
            lambda r: nnx.Linear(3, 4, rngs=r),
            nn.Dense(4),
            X,
            None,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda r: nnx.LinearGeneral((4, 3), (2, 2), axis=(-2, -1), rngs=r),
            nn.DenseGeneral((2, 2), axis=(-2, -1)),
            X,
            {"kernel": "i i o o"},
            marks=pytest.mark.slow,
        ),
        (
            lambda r: nnx.Einsum("bji,io->jbo", (3, 2), rngs=r),
            nn.Einsum((3, 2), "bji,io->jbo", use_bias=False),
            X[:, :2, 0],
            None,
        ),
        (
            lambda r: nnx.Conv(3, 2, (3, 2), padding=((1, 0), (0, 1)), rngs=r),
            nn.Conv(2, (3, 2), padding=((1, 0), (0, 1))),
            X,
            None,
        ),
    ],
    ids=["linear", "general", "einsum", "conv"],
)
def test_sketches_have_the_signs_of_linen(make, model, x, axes):
    graphdef, params = nnx.split(make(nnx.Rngs(0)))
    tx = transformation("graest", axes=axes)
    _, stats = seen(of_nnx(graphdef), x, tx, *begin(tx, params))
    _, theirs = seen(of_linen(model), x, tx, *begin(tx, nnx.to_pure_dict(params)))
    (one,), (two,) = leaves(stats).values(), leaves(theirs).values()
    assert one.signed and np.abs(one.inputs).max() > 0.1
    np.testing.assert_allclose(one.inputs, two.inputs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.outputs, two.outputs, rtol=1e-4, atol=1e-6)


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + jnp.tanh(self.dense(x))


class Stacked(nnx.Module):
    """Three layers under one nnx.scan, rematerialised."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        make = nnx.vmap(Layer, in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=3)(make)(rngs)

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x: Any, layer: Any) -> Any:
            return layer(x)

        return forward(x, self.layers)


@pytest.mark.parametrize(
    "candidates", ["grabo", pytest.param("graest", marks=pytest.mark.slow)]
)
def test_layers_of_a_scan_are_seen_one_by_one(candidates):
    x = jax.random.normal(KEY, (5, 4))
    graphdef, params, rest = nnx.split(Stacked(nnx.Rngs(0)), nnx.Param, ...)
    tx = transformation(candidates, axes={"*/kernel": "s i o"})
    grads, stats = seen(of_nnx(graphdef, rest), x, tx, *begin(tx, params))
    (found,) = leaves(stats).values()
    assert (found.inputs.shape, found.outputs.shape) == ((3, 4, 1), (3, 1, 4))
    assert (abs(found.inputs[0] - found.inputs[1]) > 0).all()
    if candidates == "grabo":
        np.testing.assert_allclose(found.inputs[0, :, 0], abs(x).sum(0), rtol=1e-5)
        size = abs(leaves(grads)["layers/dense/kernel"])
        assert (size <= found.inputs * found.outputs * (1 + 1e-5)).all()


def test_a_layer_that_multiplies_by_blocks_needs_nothing_dense():
    """Its statistics are those of the dense layer, and no array is as large as that."""
    inputs, outputs = 384, 640
    graphdef, params = nnx.split(nnx.Linear(inputs, outputs, rngs=nnx.Rngs(0)))
    x = jax.random.normal(KEY, (5, inputs))
    found = []
    for layout in ("masked", "block"):
        tx = transformation(
            "grabo", layout, structure=tk.blocks(32, 64), subset=0.5
        )  # fmt: skip
        theta, state = begin(tx, params, layout)
        _, stats = seen(of_nnx(graphdef), x, tx, theta, state)
        found += leaves(stats).values()
    one, two = found
    np.testing.assert_allclose(one.inputs, two.inputs, rtol=1e-6)
    np.testing.assert_allclose(one.outputs, two.outputs, rtol=1e-4)

    def step(theta: Any, state: Any) -> Any:
        def loss(theta: Any, zeros: Any) -> Any:
            alpha = tk.tap(tk.sparsify(theta, tk.masks(state)), zeros)
            return jnp.sum(of_nnx(graphdef)(alpha, x) ** 2)

        zeros = tk.taps(tx, theta, state)
        grads, stats = jax.grad(loss, argnums=(0, 1))(theta, zeros)
        return tx.update(grads, state, theta, stats=stats)

    sizes = sizes_in(jax.jit(step).lower(theta, state).compile().as_text())
    # A is half of the units; nothing but it comes near the weight.
    assert inputs * outputs / 2 in sizes
    assert max(sizes) <= inputs * outputs / 2


def test_training_by_statistics():
    """Masks move, and no gradient is seen but that of S."""
    x = jax.random.normal(KEY, (16, 8))
    y = jnp.sin(x @ jax.random.normal(jax.random.key(3), (8, 4)))
    graphdef, theta = nnx.split(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    tx = transformation("grabo", refresh=tk.every(2), drop_fraction=0.5)
    state = tx.init(theta)

    @jax.jit
    def step(theta: Any, state: Any) -> Any:
        def loss(theta: Any, zeros: Any) -> Any:
            alpha = tk.tap(tk.sparsify(theta, tk.masks(state)), zeros)
            return jnp.mean((of_nnx(graphdef)(alpha, x) - y) ** 2)

        zeros = tk.taps(tx, theta, state)
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(theta, zeros)
        updates, state = tx.update(grads[0], state, theta, stats=grads[1])
        return optax.apply_updates(theta, updates), state, value

    masks, losses = [], []
    for _ in range(12):
        (mask,) = jax.tree.leaves(tk.masks(state).forward)
        theta, state, value = step(theta, state)
        masks.append(np.asarray(mask))
        losses.append(float(value))
    tk.check(theta, state)
    assert isinstance(theta, nnx.State) and step._cache_size() == 1
    assert int(state.leaks) == 0
    assert losses[-1] < losses[0]
    assert any((mask != masks[0]).any() for mask in masks)
    assert {int(mask.sum()) for mask in masks} == {16}


def test_meprop_and_a_product_of_its_own_stay():
    """A tap looks at what the layer computes, whatever that is."""

    def twice(*operands: Any, **settings: Any) -> Any:
        return 2 * jax.lax.dot_general(*operands, **settings)

    x = X[:, 0, 0]
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0), dot_general=twice)
    cut = tk.flax.nnx.meprop(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), k=1)
    for each in (model, cut):
        graphdef, params = nnx.split(each)
        tx = transformation("grabo")
        theta, state = begin(tx, params)
        alpha = tk.sparsify(theta, tk.masks(state))
        tapped = tk.tap(alpha, tk.taps(tx, theta, state))
        np.testing.assert_array_equal(
            tk.flax.nnx.merge(graphdef, tapped)(x), nnx.merge(graphdef, alpha)(x)
        )
        _, stats = seen(of_nnx(graphdef), x, tx, theta, state)
        (found,) = leaves(stats).values()
        np.testing.assert_allclose(found.inputs[:, 0], abs(x).sum(0), rtol=1e-6)
        assert (found.outputs > 0).all()


class Scaled(nnx.Linear):
    """A layer whose call is not that of nnx.Linear."""

    def __call__(self, x: Any) -> Any:
        return 10 * super().__call__(x)


class Odd(nnx.Module):
    """A weight of no layer, and one that is read in two ways."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(jnp.ones((3, 3)))
        self.tied = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.tied(x @ self.kernel) @ self.tied.kernel.T


@pytest.mark.parametrize(
    ("make", "shape", "where", "message"),
    [
        (lambda r: Scaled(3, 3, rngs=r), (2, 3), None, "'kernel'.*Scaled is not a Linear"),
        (Odd, (2, 3), "kernel", "'kernel'.*Odd is not a Linear"),
        (Odd, (2, 3), "tied/kernel", "'tied/kernel'.*another way than by calling"),
        (
            lambda r: nnx.Sequential(nnx.Embed(3, 3, rngs=r)),
            (2, 3),
            "layers/0/embedding",
            "'layers/0/embedding'.*no layer of the model multiplies",
        ),
        (
            lambda r: nnx.ConvTranspose(3, 3, (2,), rngs=r),
            (2, 4, 3),
            None,
            "'kernel'.*ConvTranspose is not a Linear",
        ),
        (
            lambda r: nnx.Conv(4, 4, (2,), feature_group_count=2, rngs=r),
            (2, 4, 4),
            None,
            "'kernel'.*Conv: it has feature groups or a mask",
        ),
        (
            lambda r: nnx.Conv(3, 3, (2,), mask=jnp.ones((2, 3, 3)), rngs=r),
            (2, 4, 3),
            None,
            "'kernel'.*Conv has feature groups or a mask",
        ),
        (
            lambda r: nnx.LinearGeneral(3, 3, batch_axis={0: 2}, rngs=r),
            (2, 3, 3),
            None,
            "'kernel'.*LinearGeneral: input and kernel have batch dimensions",
        ),
        (
            lambda r: nnx.LinearGeneral(
                3, 3, dot_general_cls=lambda: jax.lax.dot_general, rngs=r
            ),
            (2, 3),
            None,
            "'kernel'.*LinearGeneral makes its dot_general anew",
        ),
        (
            lambda r: nnx.LinearGeneral(3, (2, 4), rngs=r),
            (2, 3),
            None,
            r"'kernel'.*LinearGeneral: .*read as inputs.*\(3, 2, 1\).*tk.axes",
        ),
        (
            lambda r: nnx.Einsum("bi,io->b", (3, 3), rngs=r),
            (2, 3),
            None,
            "'kernel'.*Einsum: it sums over an axis of input or kernel alone",
        ),
        (
            Stacked,
            (2, 4),
            None,
            "'layers/dense/kernel'.*Linear: its kernel has 1 axes more.*tk.axes",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_observed_is_named(make, shape, where, message):
    graphdef, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)
    options = {} if where is None else {"where": where}
    tx = transformation("grabo", **options)
    state = jax.eval_shape(tx.init, params)
    zeros = tk.taps(tx, params, state)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    apply = of_nnx(graphdef, rest)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda alpha, x: apply(tk.tap(alpha, zeros), x), params, x)
