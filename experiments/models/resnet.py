"""ResNet for ImageNet, version 1.5: the stride of a block is in its 3x3 convolution.

He et al., "Deep Residual Learning for Image Recognition", 2015, arXiv:1512.03385, section
4.1. Version 1 strides in the first 1x1 convolution; the networks of RigL (arXiv:1911.11134)
and Top-KAST (arXiv:2106.03517) are 1.5, as torchvision's is: ResNet-50 has 25,557,032
parameters and 8.2e9 FLOPs for an image of 224x224. Letters in shape comments: B images, H
and W pixels, F filters.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

# He et al., 2015, arXiv:1502.01852: normal with variance 2 / fan_out, as in torchvision.
# RigL's code takes variance 1 / fan_in, cut off at two deviations.
HE_NORMAL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

WINDOW = ((1, 1), (1, 1))
"""Padding of a 3x3 convolution: the same for all strides, where "SAME" is not."""


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; 4F channels come out.

    Attributes:
      filters: F, of the first two convolutions.
      stride: of the 3x3 convolution, and of the shortcut.
      zero_init: the last norm starts with a scale of 0, so the block as its shortcut.
      conv: builds a convolution: (filters, window, **settings).
      norm: builds a norm.
    """

    filters: int
    stride: int
    zero_init: bool
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w 4F"]:
        steps, wide = (self.stride, self.stride), 4 * self.filters
        last = nn.initializers.zeros if self.zero_init else nn.initializers.ones
        y = self.conv(self.filters, (1, 1), name="reduce")(x)
        y = nn.relu(self.norm(name="reduce_norm")(y))
        y = self.conv(
            self.filters, (3, 3), strides=steps, padding=WINDOW, name="spatial"
        )(y)
        y = nn.relu(self.norm(name="spatial_norm")(y))
        y = self.conv(wide, (1, 1), name="expand")(y)
        y = self.norm(scale_init=last, name="expand_norm")(y)
        if x.shape != y.shape:
            x = self.conv(wide, (1, 1), strides=steps, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Stages of bottlenecks; ResNet-50 by default.

    Batch statistics are the collection "batch_stats". Under jit they are those of the
    global batch, also where it is sharded; under `jax.shard_map` name its axis.

    Attributes:
      classes: of the logits.
      stages: blocks of each stage; all but the first stage halve the image.
      width: F of the first stage; it doubles from stage to stage.
      zero_init: see `Bottleneck`; Goyal et al., 2017, arXiv:1706.02677, section 5.1, and
        RigL's code. torchvision's default is not.
      momentum: of the running statistics: how much of the old stays.
      epsilon: added to variances.
      axis_name: mapped axis over which batch statistics are averaged.
      dtype: of activations; None: float32. Parameters, statistics and logits are float32.
    """

    classes: int = 1000
    stages: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    zero_init: bool = True
    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "B H W 3"], *, train: bool
    ) -> Float[Array, "B classes"]:
        """Logits, by the statistics of the batch (`train`) or the running ones."""
        conv = functools.partial(
            nn.Conv, use_bias=False, kernel_init=HE_NORMAL, dtype=self.dtype
        )
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis_name=self.axis_name,
            dtype=self.dtype,
        )
        padding = ((3, 3), (3, 3))
        x = conv(self.width, (7, 7), strides=(2, 2), padding=padding, name="stem")(
            images
        )
        x = nn.relu(norm(name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=WINDOW)
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                block = Bottleneck(
                    self.width * 2**i,
                    2 if i > 0 and j == 0 else 1,
                    self.zero_init,
                    conv,
                    norm,
                    name=f"stage_{i}_block_{j}",
                )
                x = block(x)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)  # [B, channels]
        # Normal with deviation .01, as in Goyal et al. and RigL's code.
        init = nn.initializers.normal(0.01)
        return nn.Dense(self.classes, kernel_init=init, name="head")(x)
