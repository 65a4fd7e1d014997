"""Attention by content and by distance, over a memory of earlier segments.

Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
2019, arXiv:1901.02860, section 3.3. Letters in shape comments: B rows, T tokens of a
segment, M slots of memory, K = M + T keys, D `d_model`, H heads, E `d_head`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a fully masked slot cannot make NaN; exp() of it is exactly 0.
_MASKED = -1e30


def attention_mask(
    length: Int[Array, " B"], tokens: int, slots: int, same_length: bool = False
) -> Bool[Array, "B 1 T K"]:
    """Which keys a query sees: all real memory, and the segment up to itself.

    Args:
      length: slots of memory that are real, by row.
      tokens: T.
      slots: M, at least 1 with `same_length`.
      same_length: whether every query sees M keys at most, itself included, and not the
        first of a segment M + 1, the last M + T.
    """
    key = jnp.arange(slots + tokens)[None, :]  # [1, K]
    query = jnp.arange(tokens)[:, None]  # [T, 1]
    causal = key <= slots + query  # [T, K]
    if same_length:
        causal &= key > query
    real = key >= slots - length[:, None]  # [B, K]
    return causal[None, None] & real[:, None, None, :]


def distance_embedding(
    keys: int, d_model: int, clamp: int | None = None
) -> Float[Array, "K D"]:
    """Sinusoids of the distances K-1, ..., 1, 0 between a query and a key.

    Args:
      keys: K, memory and segment together.
      d_model: D; the first half of the columns are sines, the rest cosines.
      clamp: distances beyond it all read as `clamp`; None never clamps.
    """
    distance = jnp.arange(keys - 1, -1, -1.0)  # [K]
    if clamp is not None:
        distance = jnp.minimum(distance, clamp)
    rate = 10000 ** (-jnp.arange(0, d_model, 2.0) / d_model)  # [ceil(D / 2)]
    angle = distance[:, None] * rate[None, :]  # [K, ceil(D / 2)]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)[:, :d_model]


def relative_shift(scores: Float[Array, "B H T K"]) -> Float[Array, "B H T K"]:
    """Moves column p of row i, a score for distance K-1-p, to the key at that distance.

    Key j lies M + i - j before query i, so row i moves left by T-1-i. Padding by a
    column and reading the rows one entry longer does so without a gather. What wraps
    around lands on keys in the future, which the mask hides.
    """
    rows, heads, tokens, keys = scores.shape
    padded = jnp.pad(scores, ((0, 0), (0, 0), (0, 0), (1, 0)))  # [B, H, T, K + 1]
    skewed = padded.reshape(rows, heads, keys + 1, tokens)
    return skewed[:, :, 1:].reshape(scores.shape)


class RelativeAttention(nn.Module):
    """Attention over memory and segment by content and by distance (section 3.3).

    The score of query i and key j is (q_i + u) . k_j + (q_i + v) . W_r R_{i-j}, over
    sqrt(E).

    Attributes:
      heads: H.
      d_head: E.
      dropout: on the weights of the attention.
      kernel_init: of all five projections.
      dtype: of the computation, scores and their softmax apart, which are float32 then;
        None: the one of the inputs, for everything.
    """

    heads: int
    d_head: int
    dropout: float = 0.0
    kernel_init: Any = nn.initializers.lecun_normal()
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        segment: Float[Array, "B T D"],
        context: Float[Array, "B K D"],
        distances: Float[Array, "K D"],
        mask: Bool[Array, "B 1 T K"],
        content_bias: Float[Array, "H E"],
        position_bias: Float[Array, "H E"],
        *,
        train: bool,
    ) -> Float[Array, "B T D"]:
        settings: dict[str, Any] = dict(
            use_bias=False, dtype=self.dtype, kernel_init=self.kernel_init
        )

        def project(name: str, x: Array) -> Array:
            features = (self.heads, self.d_head)
            return nn.DenseGeneral(features, name=name, **settings)(x)

        query = project("query", segment)  # [B, T, H, E]
        key = project("key", context)  # [B, K, H, E]
        value = project("value", context)  # [B, K, H, E]
        relative = project("relative", distances)  # [K, H, E]

        scale = self.d_head**-0.5  # on the queries, which are smaller than the scores
        by_content, by_position = (
            (query + bias.astype(query.dtype)[None, None]) * scale
            for bias in (content_bias, position_bias)
        )
        # Without a dtype, scores follow what comes in, as everything else does.
        exact = {} if self.dtype is None else dict(preferred_element_type=jnp.float32)
        content = jnp.einsum("bthe,bkhe->bhtk", by_content, key, **exact)
        position = jnp.einsum("bthe,khe->bhtk", by_position, relative, **exact)
        scores = jnp.where(mask, content + relative_shift(position), _MASKED)
        weights = jax.nn.softmax(scores)  # [B, H, T, K]
        weights = nn.Dropout(self.dropout, deterministic=not train)(weights)
        weights = weights.astype(value.dtype)
        mixed = jnp.einsum("bhtk,bkhe->bthe", weights, value)  # [B, T, H, E]
        out = nn.DenseGeneral(segment.shape[-1], axis=(-2, -1), name="out", **settings)
        return out(mixed)  # [B, T, D]
