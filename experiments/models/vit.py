"""SimpleViT: fixed 2D positions, no class token, the mean over patches.

Beyer, Zhai and Kolesnikov, "Better plain ViT baselines for ImageNet-1k", 2022,
arXiv:2205.01580; the tiny one of GSE (Heddes et al., arXiv:2401.06898), 4.2M parameters.
Letters in shape comments: B images, P patches, D `width`, H heads, E `d_head`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def positions(rows: int, columns: int, width: int) -> Float[Array, "P D"]:
    """Sinusoids of a patch's column and row, a quarter of D each for sine and cosine.

    Frequencies fall from 1 to 1 / 10000.

    Raises:
      ValueError: a width that is no multiple of 4, or below 8.
    """
    if width % 4 or width < 8:
        raise ValueError(f"width is {width}; it must be a multiple of 4, at least 8")
    quarter = width // 4
    rate = 10000 ** (-jnp.arange(quarter) / (quarter - 1))  # [D / 4]
    row, column = jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij")
    row, column = (x.reshape(-1, 1) * rate[None] for x in (row, column))  # [P, D / 4]
    waves = jnp.sin(column), jnp.cos(column), jnp.sin(row), jnp.cos(row)
    return jnp.concatenate(waves, axis=-1)


def patches(
    images: Float[Array, "B H W C"], size: int
) -> Float[Array, "B h w size*size*C"]:
    """Cuts images into squares, each a vector, row by row.

    Raises:
      ValueError: an image that squares of this size do not fill.
    """
    images_, height, width, channels = images.shape
    if height % size or width % size:
        raise ValueError(
            f"images are {height}x{width}, which patches of {size}x{size} do not fill"
        )
    rows, columns = height // size, width // size
    cut = images.reshape(images_, rows, size, columns, size, channels)
    return cut.swapaxes(2, 3).reshape(images_, rows, columns, size * size * channels)


class Attention(nn.Module):
    """Self-attention; one kernel makes queries, keys and values, and none has a bias."""

    heads: int
    d_head: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        inner = self.heads * self.d_head
        qkv = nn.Dense(3 * inner, use_bias=False, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(*x.shape[:2], 3, self.heads, self.d_head)
        query, key, value = jnp.moveaxis(qkv, 2, 0)  # [B, P, H, E]
        scores = jnp.einsum(
            "bphe,bqhe->bhpq",
            query * self.d_head**-0.5,
            key,
            preferred_element_type=jnp.float32,
        )
        weights = jax.nn.softmax(scores).astype(value.dtype)  # [B, H, P, P]
        mixed = jnp.einsum("bhpq,bqhe->bphe", weights, value)
        mixed = mixed.reshape(*x.shape[:2], inner)
        return nn.Dense(x.shape[-1], use_bias=False, dtype=self.dtype, name="out")(
            mixed
        )


class FeedForward(nn.Module):
    """Two dense layers around a gelu (the exact one)."""

    d_inner: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        inner = nn.Dense(self.d_inner, dtype=self.dtype, name="in")(x)
        inner = nn.gelu(inner, approximate=False)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="out")(inner)


class SimpleViT(nn.Module):
    """A pre-norm encoder of patches; SimpleViT-tiny by default.

    As in GSE's code, patches are normalised before and after their embedding, and there is
    no norm behind the last block but the head's. Kernels start by fan-in; GSE's code draws
    them uniform with variance 1 / (active inputs). There is nothing random and there are
    no batch statistics: `train` changes nothing.

    Attributes:
      classes: of the logits.
      patch: side of a patch, in pixels.
      width: D.
      layers: blocks of attention and feed-forward.
      heads: H, of `d_head` features each; H * E need not be D.
      d_head: E.
      d_inner: width of the feed-forward layers.
      epsilon: of the layer norms.
      dtype: of activations; None: float32. Parameters, softmaxes and logits are float32.
    """

    classes: int = 10
    patch: int = 4
    width: int = 512
    layers: int = 4
    heads: int = 6
    d_head: int = 64
    d_inner: int = 256
    epsilon: float = 1e-5
    dtype: Any = None

    @nn.compact
    def __call__(
        self, images: Float[Array, "B H W C"], *, train: bool
    ) -> Float[Array, "B classes"]:
        """Logits.

        Raises:
          ValueError: an image that patches do not fill, or a width that is no multiple
            of 4.
        """
        del train

        def norm(name: str, dtype: Any = self.dtype) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=self.epsilon, dtype=dtype, name=name)

        x = norm("patch_norm")(patches(images, self.patch))  # [B, h, w, patch^2 C]
        x = norm("embed_norm")(nn.Dense(self.width, dtype=self.dtype, name="embed")(x))
        rows, columns = x.shape[1:3]
        x = x.reshape(x.shape[0], rows * columns, self.width)  # [B, P, D]
        x = x + positions(rows, columns, self.width).astype(x.dtype)[None]
        for i in range(self.layers):
            attention = Attention(
                self.heads, self.d_head, self.dtype, name=f"block_{i}_attention"
            )
            x = x + attention(norm(f"block_{i}_attention_norm")(x))
            feed = FeedForward(self.d_inner, self.dtype, name=f"block_{i}_feed_forward")
            x = x + feed(norm(f"block_{i}_feed_forward_norm")(x))
        x = jnp.mean(x, axis=1, dtype=jnp.float32)  # [B, D]
        return nn.Dense(self.classes, name="head")(norm("head_norm", jnp.float32)(x))
