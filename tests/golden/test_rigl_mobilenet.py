"""RigL's figures for MobileNet-v1: distributions over layers that are data alone.

Evci et al., "Rigging the Lottery", 2020, arXiv:1911.11134, and what the notebook
rigl/imagenet_resnet/colabs/MobileNet_Counting.ipynb of the authors' code prints. It counts
2 FLOPs a weight and position, and a bias and a relu (in all one FLOP more than the products
have, whose sums begin with a product) for each output; 32 bits a weight and a bias, and
where a layer is sparse a bit for each entry. Three habits of the notebook have to be
followed for its digits: it takes strided layers to be padded twice, so that 113, 57, 29, 15
and 8 positions stand for 112, 56, 28, 14 and 7; it reads a depthwise kernel [3, 3, C, 1] as a
convolution with one output channel, so with one bias and one relu; and ERK counts the
first layer among the layers of the budget (which makes it dense up to 90 %), while uniform
sparsity leaves it out. Depthwise layers are dense and outside the budget.
"""

import math
from typing import NamedTuple

import pytest

import topkast_jax as tk


class Layer(NamedTuple):
    """A kernel (window..., inputs, outputs), and the side of its square of outputs."""

    shape: tuple[int, ...]
    side: int


CHANNELS = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
POINT_SIDES = (112, 56, 56, 28, 28, 14, 14, 14, 14, 14, 14, 7, 7)
DEPTH_SIDES = (112, 57, 56, 29, 28, 15, 14, 14, 14, 14, 14, 8, 7)

LAYERS = {"first": Layer((3, 3, 3, 32), 113)}
for _i, _side in enumerate(POINT_SIDES):
    LAYERS[f"depth_{_i}"] = Layer((3, 3, CHANNELS[_i], 1), DEPTH_SIDES[_i])
    LAYERS[f"point_{_i}"] = Layer((1, 1, *CHANNELS[_i : _i + 2]), _side)
LAYERS["head"] = Layer((1, 1, 1024, 1000), 1)

SHAPES = {p: x.shape for p, x in LAYERS.items() if not p.startswith("depth")}


def totals(counts):
    """(MFLOPs, MB) with so many weights in the layers that are named, the rest dense."""
    flops = size = 0.0
    for path, (shape, side) in LAYERS.items():
        entries, outputs = math.prod(shape), shape[-1]
        k = counts.get(path, entries)
        flops += (2 * k + outputs) * side**2
        size += 4 * (k + outputs) + (entries / 8 if k < entries else 0)
    return flops / 1e6, size / 1e6


def test_dense():
    flops, size = totals({})
    assert f"{flops:.3f}" == "1141.544"
    assert f"{size:.3f}" == "16.864"


# The notebook has fractions of weights where we have whole ones: half a weight of each of
# the layers with 112x112 positions is 0.013 MFLOPs each.
@pytest.mark.parametrize(
    ("sparsity", "erk", "uniform"),
    [
        (0.75, (599.144, 4.888), (330.769, 4.894)),
        (0.85, (439.152, 3.224), (222.666, 3.229)),
        (0.9, (334.134, 2.392), (168.614, 2.396)),
        (0.95, (205.281, 1.560), (114.563, 1.563)),
    ],
)
def test_rows(sparsity, erk, uniform):
    counts = tk.erk(SHAPES, sparsity)
    assert counts["first"] == (864 if sparsity < 0.95 else 657)
    assert sum(counts.values()) == round((1 - sparsity) * 4_164_448)
    flops, size = totals(counts)
    assert flops == pytest.approx(erk[0], abs=0.02)
    assert size == pytest.approx(erk[1], abs=0.0006)
    flops, size = totals(tk.by_path({"first": 0.0})(SHAPES, sparsity, {}))
    assert flops == pytest.approx(uniform[0], abs=0.02)
    assert size == pytest.approx(uniform[1], abs=0.0006)
