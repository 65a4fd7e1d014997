"""ResNet for CIFAR, with shortcuts that have no parameters (option A).

He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385, section
4.2; the ResNet-56 of GSE (arXiv:2401.06898), 853,018 parameters with 10 classes. Letters
in shape comments: B images, H and W pixels, F filters.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.models.resnet import HE_NORMAL, WINDOW


def shortcut(x: Float[Array, "B H W C"], filters: int, stride: int) -> Array:
    """Every `stride`-th pixel, and zeros for the channels that are missing.

    The paper does not say where the zeros go; here, as in GSE's code, half of them go
    before the channels and half behind.
    """
    x = x[:, ::stride, ::stride]
    more = filters - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut.

    Attributes: see `experiments.models.resnet.Bottleneck`.
    """

    filters: int
    stride: int
    zero_init: bool
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w F"]:
        steps = (self.stride, self.stride)
        last = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        y = self.conv(strides=steps, name="first")(x)
        y = nn.relu(self.norm(name="first_norm")(y))
        y = self.conv(name="second")(y)
        y = self.norm(scale_init=last, name="second_norm")(y)
        return nn.relu(shortcut(x, self.filters, self.stride) + y)


class CifarResNet(nn.Module):
    """Three stages of n basic blocks, 6n + 2 layers.

    Weights start as He et al. have it. GSE's code takes variance 2 / fan_in instead, then
    draws all weights anew, uniform with variance 1 / (active inputs).

    Attributes:
      classes: of the logits.
      depth: 6n + 2: 20, 32, 44, 56, 110 in the paper.
      width: F of the first stage; it doubles from stage to stage.
      zero_init: the last norm of each block starts with a scale of 0.
      momentum, epsilon, axis_name, dtype: see `experiments.models.resnet.ResNet`.
    """

    classes: int = 10
    depth: int = 56
    width: int = 16
    zero_init: bool = False
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "B H W 3"], *, train: bool
    ) -> Float[Array, "B classes"]:
        """Logits, by the statistics of the batch (`train`) or the running ones.

        Raises:
          ValueError: a depth that is not 6n + 2.
        """
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(
                f"depth is {self.depth}; it must be 6n + 2: 8, 14, 20, 26, 32, ..."
            )
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )

        def conv_of(filters: int) -> Any:
            return functools.partial(
                nn.Conv,
                filters,
                (3, 3),
                padding=WINDOW,
                use_bias=False,
                kernel_init=HE_NORMAL,
                dtype=self.dtype,
            )

        x = conv_of(self.width)(name="stem")(images)
        x = nn.relu(norm(name="stem_norm")(x))
        for i in range(3):
            filters = self.width * 2**i
            for j in range(blocks):
                block = BasicBlock(
                    filters,
                    2 if i > 0 and j == 0 else 1,
                    self.zero_init,
                    conv_of(filters),
                    norm,
                    name=f"stage_{i}_block_{j}",
                )
                x = block(x)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)  # [B, 4 width]
        init = nn.initializers.he_normal()
        return nn.Dense(self.classes, kernel_init=init, name="head")(x)
