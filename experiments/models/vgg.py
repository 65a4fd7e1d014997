"""The small VGG-16 of GSE: a quarter of the published widths, BatchNorm, two wide layers.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", 2015, arXiv:1409.1556, configuration D; narrowed as in the code of GSE (Heddes
et al., arXiv:2401.06898), 1.3M parameters. Letters in shape comments: B images, H and W
pixels.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from experiments.models.resnet import HE_NORMAL, WINDOW

STAGES = ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3))
"""(multiple of the width, convolutions) of each stage."""


class VGG(nn.Module):
    """Stages of 3x3 convolutions, each halving the image, then three dense layers.

    Convolutions have a bias, though a norm follows, so that counts agree with GSE's code.
    He normal initialization (the head: normal, deviation .01); GSE's code draws all
    weights uniform with variance 1 / (active inputs), its dense baseline as PyTorch does.

    Attributes:
      classes: of the logits.
      width: filters of the first stage.
      hidden: units of the two dense layers.
      dropout: behind both of them, from the rng stream "dropout".
      momentum, epsilon, axis_name, dtype: see `experiments.models.resnet.ResNet`.
    """

    classes: int = 10
    width: int = 16
    hidden: int = 512
    dropout: float = 0.5
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
          ValueError: an image too small for five halvings.
        """
        if min(images.shape[1:3]) < 2 ** len(STAGES):
            raise ValueError(
                f"images are {images.shape[1]}x{images.shape[2]}; VGG halves them "
                f"{len(STAGES)} times, so both must be at least {2 ** len(STAGES)}"
            )
        x = images
        for i, (multiple, layers) in enumerate(STAGES):
            for j in range(layers):
                x = nn.Conv(
                    self.width * multiple,
                    (3, 3),
                    padding=WINDOW,
                    kernel_init=HE_NORMAL,
                    dtype=self.dtype,
                    name=f"stage_{i}_conv_{j}",
                )(x)
                norm = nn.BatchNorm(
                    use_running_average=not train,
                    momentum=self.momentum,
                    epsilon=self.epsilon,
                    axis_name=self.axis_name,
                    dtype=self.dtype,
                    name=f"stage_{i}_norm_{j}",
                )
                x = nn.relu(norm(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)  # [B, 8 width] of an image of 32x32
        for j in range(2):
            init = nn.initializers.he_normal()
            dense = nn.Dense(
                self.hidden, kernel_init=init, dtype=self.dtype, name=f"hidden_{j}"
            )
            x = nn.relu(dense(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        init = nn.initializers.normal(0.01)
        head = nn.Dense(self.classes, kernel_init=init, name="head")
        return head(x.astype(jnp.float32))
