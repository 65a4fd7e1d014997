"""Image models: gradients, batch statistics, bfloat16, sparse products, and their parts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

import topkast_jax as tk
from experiments.models import vit
from experiments.models.resnet import Bottleneck, ResNet
from experiments.models.resnet_cifar import CifarResNet, shortcut
from experiments.models.vgg import VGG
from experiments.models.vit import SimpleViT

MODELS = {
    "resnet": ResNet(5, stages=(1, 1), width=4, zero_init=False),
    "resnet_cifar": CifarResNet(5, depth=8, width=4),
    "vgg": VGG(5, width=2, hidden=8, dropout=0.0),
    "vit": SimpleViT(5, width=16, layers=1, heads=2, d_head=8, d_inner=24),
}
SIDES = {"resnet": 32, "resnet_cifar": 8, "vgg": 32, "vit": 8}
NORMED = ["resnet", "resnet_cifar", "vgg"]
SPARSE = {
    "resnet": "*stage_1*/shortcut/kernel",  # 1x1
    "resnet_cifar": "*stage_1*/second/kernel",  # 3x3, which no product by units does
    "vgg": "*hidden_1/kernel",
    "vit": "*qkv/kernel",
}


def draw(name):
    rng = np.random.default_rng(0)
    side = SIDES[name]
    images = rng.normal(size=(4, side, side, 3)).astype(np.float32)
    return jnp.asarray(images), jnp.asarray([0, 4, 2, 2])


@functools.cache
def start(name):
    """Images, labels, and variables in which no bias or statistic is at its start."""
    images, labels = draw(name)
    init = jax.jit(functools.partial(MODELS[name].init, train=False))
    variables = init(jax.random.key(0), images)

    def moved(path, x):
        move = np.random.default_rng(x.size).uniform(0, 0.3, x.shape)
        return x + jnp.asarray(move, x.dtype) if x.ndim == 1 else x

    return images, labels, jax.tree_util.tree_map_with_path(moved, variables)


@functools.cache
def trained(name):
    """(logits, updates), and gradients, of a call in training."""
    images, labels, variables = start(name)

    @jax.jit
    def call(params):
        def loss(params):
            out = MODELS[name].apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(out[0], labels)
            return losses.mean(), out

        return jax.grad(loss, has_aux=True)(params)

    grads, out = call(variables["params"])
    return out, grads


@functools.cache
def evaluated(name):
    images, _, variables = start(name)
    return jax.jit(functools.partial(MODELS[name].apply, train=False))(
        variables, images
    )


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] if name in ("resnet", "vgg") else []
        )
        for name in MODELS
    ],
)
def test_every_parameter_gets_a_gradient(name):
    (logits, _), grads = trained(name)
    assert logits.shape == (4, 5)
    assert logits.dtype == jnp.float32
    # A bias right before a norm over the batch changes nothing.
    free = {
        p for p in flatten_dict(grads, sep="/") if name == "vgg" and "conv" in p
    } & {p for p in flatten_dict(grads, sep="/") if p.endswith("bias")}
    for path, grad in flatten_dict(grads, sep="/").items():
        assert jnp.isfinite(grad).all(), path
        assert path in free or jnp.abs(grad).max() > 1e-6, path


@pytest.mark.parametrize("name", MODELS)
def test_training_moves_the_statistics(name):
    _, _, variables = start(name)
    (logits, updates), _ = trained(name)
    before = flatten_dict(variables.get("batch_stats", {}), sep="/")
    after = flatten_dict(updates.get("batch_stats", {}), sep="/")
    assert before.keys() == after.keys()
    assert bool(before) == (name in NORMED)
    for path in before:
        assert after[path].dtype == jnp.float32
        assert jnp.abs(after[path] - before[path]).max() > 1e-4, path
    same = jnp.allclose(logits, evaluated(name), atol=1e-4)
    assert same == (name not in NORMED)


def test_statistics_are_running_means():
    images, _, variables = start("resnet_cifar")
    (_, updates), _ = trained("resnet_cifar")
    kernel = variables["params"]["stem"]["kernel"]
    pre = jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    before = variables["batch_stats"]["stem_norm"]
    after = updates["batch_stats"]["stem_norm"]
    for name, now in {"mean": pre.mean((0, 1, 2)), "var": pre.var((0, 1, 2))}.items():
        expected = 0.9 * before[name] + 0.1 * now
        np.testing.assert_allclose(after[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NORMED)
def test_axis_name_joins_the_statistics(name):
    images, _, variables = start(name)
    model = MODELS[name].clone(axis_name="data")

    @jax.jit
    @functools.partial(jax.vmap, in_axes=0, out_axes=0, axis_name="data")
    def half(images):
        return model.apply(variables, images, train=True, mutable=["batch_stats"])

    logits, updates = half(images.reshape(2, 2, *images.shape[1:]))
    (expected, whole), _ = trained(name)
    np.testing.assert_allclose(logits.reshape(4, 5), expected, rtol=1e-3, atol=1e-4)
    for mine, joint in zip(
        jax.tree.leaves(updates), jax.tree.leaves(whole), strict=True
    ):
        np.testing.assert_allclose(mine[0], joint, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(mine[0], mine[1])


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_for_activations_alone(name):
    images, _, variables = start(name)
    model = MODELS[name].clone(dtype=jnp.bfloat16)
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    seen = set()

    def note(next_call, args, kwargs, context):
        out = next_call(*args, **kwargs)
        if context.method_name == "__call__" and context.module.name != "head":
            seen.add((type(context.module).__name__, str(out.dtype)))
        return out

    def call(variables, images):
        with nn.intercept_methods(note):
            return model.apply(variables, images, train=True, mutable=["batch_stats"])

    logits, updates = jax.eval_shape(call, variables, images)
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(updates)} <= {jnp.dtype("float32")}
    layers = {(kind, dtype) for kind, dtype in seen if kind in ("Conv", "Dense")}
    assert layers
    assert {dtype for _, dtype in layers} == {"bfloat16"}


@pytest.mark.parametrize("name", ["resnet_cifar", "vit"])
def test_bfloat16_is_close(name):
    images, _, variables = start(name)
    model = MODELS[name].clone(dtype=jnp.bfloat16)
    logits = jax.jit(functools.partial(model.apply, train=False))(variables, images)
    expected = evaluated(name)
    spread = jnp.std(expected)
    assert 0 < jnp.abs(logits - expected).max() < 0.1 * spread


@pytest.mark.parametrize("name", MODELS)
def test_sparse_weights_go_in_unchanged_models(name):
    model = MODELS[name]
    images, _, variables = start(name)
    settings = dict(train=True, mutable=["batch_stats"])
    out, _ = trained(name)
    apply = tk.flax.apply(model)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    plain = jax.jit(lambda v: apply(v, images, **settings))(variables)
    jax.tree.map(close, plain, out)

    method = tk.static(0.5, structure=tk.blocks(4, 4), where=SPARSE[name])
    tx = tk.sparse(optax.sgd(0.1), method, layout="block")
    theta, state, _ = tk.start(tx, variables["params"])
    alpha = tk.sparsify(theta, tk.masks(state))
    dense = tk.export(theta, state)
    given = {**variables, "params": alpha}
    (how,) = tk.flax.routes(model, given, images, train=False).values()
    assert ("window of 3x3" in how) == (name == "resnet_cifar")

    @jax.jit
    def both(alpha, dense):
        units = apply({**variables, "params": alpha}, images, **settings)
        return units, model.apply({**variables, "params": dense}, images, **settings)

    units, expected = both(alpha, dense)
    assert jnp.abs(expected[0] - out[0]).max() > 1e-4  # half of a kernel is gone
    jax.tree.map(close, units, expected)


def test_convolutions_start_as_he_et_al_have_it():
    model = CifarResNet(depth=8, width=32)
    init = jax.jit(functools.partial(model.init, train=False))
    params = init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    kernels = {p: x for p, x in flatten_dict(params, sep="/").items() if x.ndim == 4}
    assert len(kernels) == 7
    for path, kernel in kernels.items():
        expected = np.sqrt(2 / (9 * kernel.shape[-1]))  # by what goes out
        assert abs(kernel.std() / expected - 1) < 4 / np.sqrt(kernel.size), path


def test_zero_init_begins_with_the_shortcut():
    conv = functools.partial(nn.Conv, use_bias=False)
    norm = functools.partial(nn.BatchNorm, use_running_average=False)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 8)), jnp.float32)
    for zero in (True, False):
        block = Bottleneck(2, 1, zero, conv, norm)
        y, _ = block.init_with_output(jax.random.key(0), x)
        assert bool(jnp.array_equal(y, nn.relu(x))) == zero
    assert ResNet().zero_init
    assert not CifarResNet().zero_init


def test_shortcut_without_parameters():
    x = jnp.arange(1.0, 33.0).reshape(1, 4, 4, 2)
    y = shortcut(x, 5, 2)
    np.testing.assert_array_equal(y[0, :, :, 1:3], x[0, ::2, ::2])
    assert not y[..., [0, 3, 4]].any()
    np.testing.assert_array_equal(shortcut(x, 2, 1), x)


def test_patches_and_positions_one_by_one():
    images = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    cut = vit.patches(jnp.asarray(images), 2)
    assert cut.shape == (2, 2, 3, 12)
    for r in range(2):
        for c in range(3):
            square = images[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
            np.testing.assert_array_equal(cut[:, r, c], square.reshape(2, 12))

    found = vit.positions(2, 3, 8)
    for r in range(2):
        for c in range(3):
            expected = [
                np.sin(c), np.sin(c / 10000), np.cos(c), np.cos(c / 10000),
                np.sin(r), np.sin(r / 10000), np.cos(r), np.cos(r / 10000),
            ]  # fmt: skip
            np.testing.assert_allclose(found[3 * r + c], expected, atol=1e-6)


def test_attention_of_patches_by_loops():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 8)).astype(np.float32)
    layer = vit.Attention(heads=2, d_head=4)
    params = layer.init(jax.random.key(1), x)["params"]
    found = layer.apply({"params": params}, x)
    qkv = x @ np.asarray(params["qkv"]["kernel"], np.float64)  # [B, P, 3 H E]
    out = np.asarray(params["out"]["kernel"], np.float64)
    expected = np.zeros(x.shape)
    for b in range(2):
        for i in range(3):
            for h in range(2):
                q, k, v = (slice(8 * n + 4 * h, 8 * n + 4 * h + 4) for n in range(3))
                scores = [qkv[b, i, q] @ qkv[b, j, k] / 2 for j in range(3)]
                weights = np.exp(scores) / np.exp(scores).sum()
                mixed = sum(weights[j] * qkv[b, j, v] for j in range(3))
                expected[b, i] += mixed @ out[4 * h : 4 * h + 4]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_dropout_draws_in_training_alone():
    model = MODELS["vgg"].clone(dropout=0.5)
    images, _, variables = start("vgg")

    @functools.partial(jax.jit, static_argnames="train")
    def run(key, train):
        rngs = {"dropout": jax.random.key(key)}
        settings = dict(train=train, mutable=["batch_stats"], rngs=rngs)
        return model.apply(variables, images, **settings)[0]

    assert jnp.array_equal(run(0, True), run(0, True))
    assert not jnp.array_equal(run(0, True), run(1, True))
    np.testing.assert_allclose(run(0, False), evaluated("vgg"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "side", "message"),
    [
        (CifarResNet(depth=18), 32, r"depth is 18; it must be 6n \+ 2"),
        (CifarResNet(depth=2), 32, "depth is 2"),
        (VGG(), 16, "images are 16x16; VGG halves them 5 times.*at least 32"),
        (SimpleViT(patch=5), 32, "images are 32x32, which patches of 5x5 do not fill"),
        (SimpleViT(width=30), 32, "width is 30; it must be a multiple of 4"),
    ],
)
def test_what_cannot_be_is_named(model, side, message):
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    init = functools.partial(model.init, train=False)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(init, jax.random.key(0), images)
