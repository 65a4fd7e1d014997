"""Parameters of the networks of the papers' experiments, to the last one."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from experiments.models.resnet import ResNet
from experiments.models.resnet_cifar import CifarResNet
from experiments.models.transformer_xl import TransformerXL
from experiments.models.vgg import VGG
from experiments.models.vit import SimpleViT


def count(model, *inputs, **settings):
    init = functools.partial(model.init, **settings)
    shapes = jax.eval_shape(init, jax.random.key(0), *inputs)["params"]
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("model", "side", "parameters"),
    [
        (ResNet(), 224, 25_557_032),  # torchvision's resnet50
        (CifarResNet(), 32, 853_018),  # He et al.: 0.85M
        (CifarResNet(depth=20), 32, 269_722),  # 0.27M
        (CifarResNet(depth=110), 32, 1_727_962),  # 1.7M
        (CifarResNet(classes=100), 32, 858_868),
        (VGG(), 32, 1_256_730),  # as GSE's code, biases of convolutions included
        (VGG(classes=100), 32, 1_302_900),
        (SimpleViT(), 32, 4_237_930),
        (SimpleViT(classes=100), 32, 4_284_100),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, int) else None,
)
def test_image_models(model, side, parameters):
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    assert count(model, images, train=False) == parameters


WIKITEXT = dict(vocabulary=267_735, cutoffs=(20_000, 40_000, 200_000))

# What the authors' code makes of the authors' settings, biases included. The paper's
# figures: 41M, 277M, 151M, and 257M for the large model of WikiText-103. The last is not
# what the scripts give: their 18 layers hold 245.6M, the rows of all clusters 36.9M (1024,
# 256, 64 and 16 wide), the five projections to and from these widths 2.4M, and the biases of
# the softmax and its entries for clusters 0.3M: 285.2M. What the paper's figure leaves out
# it does not say.
LANGUAGE = {
    "enwik8, 12 layers": (
        dict(vocabulary=204, layers=12, d_model=512, heads=8, d_head=64, d_inner=2048),
        41_055_436,
    ),
    "enwik8, 24 layers": (
        dict(
            vocabulary=204, layers=24, d_model=1024, heads=8, d_head=128, d_inner=3072
        ),
        277_231_820,
    ),
    "WikiText-103, standard": (
        dict(layers=16, d_model=410, heads=10, d_head=41, d_inner=2100, **WIKITEXT),
        151_107_538,
    ),
    "WikiText-103, large": (
        dict(
            layers=18,
            d_model=1024,
            heads=16,
            d_head=64,
            d_inner=4096,
            div_val=4,
            tied_biases=False,
            init_std=0.005,
            **WIKITEXT,
        ),
        285_205_322,
    ),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models(name):
    settings, parameters = LANGUAGE[name]
    model = TransformerXL(memory=4, **settings)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    memory = jax.eval_shape(lambda: model.initial_memory(1))
    assert count(model, tokens, memory, tokens) == parameters


def parts(v, layers, d, heads, e, inner, widths=(), rows=(), *, untied=False):
    """The same by pencil: (blocks, embedding, projections, output)."""
    attention = 5 * d * heads * e  # query, key, value, relative, out; no bias
    feed_forward = 2 * d * inner + inner + d
    block = attention + feed_forward + 2 * 2 * d
    biases = 2 * heads * e * (layers if untied else 1)
    widths, rows = widths or (d,), rows or (v,)
    embedding = sum(w * r for w, r in zip(widths, rows, strict=True))
    clusters = len(rows) - 1
    output = v + clusters * (widths[0] + 1)
    # To the model's width for each cluster, and back from it for the head.
    projections = sum(d * w for w in widths) + d * widths[0] if widths[-1] < d else 0
    return layers * block + biases, embedding, projections, output


def test_by_pencil():
    rows = (20_000, 20_000, 160_000, 67_735)
    assert sum(parts(204, 12, 512, 8, 64, 2048)) == 41_055_436
    assert sum(parts(204, 24, 1024, 8, 128, 3072)) == 277_231_820
    standard = parts(267_735, 16, 410, 10, 41, 2100, (410,) * 4, rows)
    assert sum(standard) == 151_107_538
    large = parts(
        267_735, 18, 1024, 16, 64, 4096, (1024, 256, 64, 16), rows, untied=True
    )
    assert large == (245_569_536, 36_923_760, 2_441_216, 270_810)
    assert sum(large) == 285_205_322
