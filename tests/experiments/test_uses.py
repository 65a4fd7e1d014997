"""How often weights are multiplied by: counted, and read off gradients."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models.tables import Projection, Table
from experiments.tasks.uses import count_uses

SHAPE = (2, 9, 9, 4)


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        (dict(kernel_size=(1, 1)), 81),
        (dict(kernel_size=(1, 1), strides=(2, 2)), 25),
        (dict(kernel_size=(3, 3), padding="VALID"), 49),
        (dict(kernel_size=(3, 3), strides=(2, 2), padding="VALID"), 16),
        (dict(kernel_size=(3, 3), feature_group_count=2, padding="VALID"), 49),
        (dict(kernel_size=(3, 3), feature_group_count=4, padding="CIRCULAR"), 81),
        (dict(kernel_size=(3, 3), kernel_dilation=(2, 2), padding="VALID"), 25),
    ],
)
def test_convolution(settings, positions):
    # The derivative of the sum of all outputs by a weight is the sum of what it is
    # multiplied with: of ones, how often it is used.
    model = nn.Conv(8, use_bias=False, **settings)
    images = jnp.ones(SHAPE)
    params = model.init(jax.random.key(0), images)

    def total(params):
        return model.apply(params, images).sum()

    (times,) = set(np.asarray(jax.grad(total)(params)["params"]["kernel"]).ravel())
    assert count_uses(model, images) == {"kernel": times} == {"kernel": 2 * positions}


def test_padding_counts_as_positions():
    model = nn.Conv(8, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    assert count_uses(model, jax.ShapeDtypeStruct(SHAPE, jnp.float32)) == {
        "kernel": 2 * 5 * 5
    }


class Net(nn.Module):
    """Every kind of layer; one is called twice."""

    @nn.compact
    def __call__(self, tokens: Any) -> Any:  # [B, T]
        table = Table(10, 4, name="table")
        project = Projection(4, 6, nn.initializers.normal(1.0), name="project")
        x = project(table(tokens))  # [B, T, 6]
        twice = nn.Dense(6, name="twice")
        x = twice(twice(x))
        x = nn.Conv(6, (3,), padding="SAME", name="conv")(x)
        x = nn.DenseGeneral((2, 3), name="split")(x)
        x = nn.DenseGeneral(6, axis=(-2, -1), name="join")(x)
        return table.nats(project.attend(x), jnp.zeros((10,)), tokens)


def test_layers_of_every_kind():
    once = 2 * 5
    assert count_uses(Net(), jax.ShapeDtypeStruct((2, 5), jnp.int32)) == {
        "project/kernel": 2 * once,  # to the width of the model, and back
        "twice/kernel": 2 * once,
        "conv/kernel": once,
        "split/kernel": once,
        "join/kernel": once,
        "table/embedding": once,
    }


def test_layers_that_cannot_be_counted_are_named():
    model = nn.Sequential([nn.Dense(3), nn.ConvTranspose(2, (2,))])
    with pytest.raises(NotImplementedError, match=r"layers_1/kernel: .*nn\.Conv"):
        count_uses(model, jax.ShapeDtypeStruct((1, 4, 5), jnp.float32))
