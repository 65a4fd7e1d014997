"""Transformer-XL: relative positions and a memory of earlier segments.

Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
2019, arXiv:1901.02860. Letters in shape comments: B rows, T tokens of a segment, M
slots of memory, K = M + T keys, D `d_model`, H heads, E `d_head`, L layers, V ids.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, so that a fully masked slot cannot make NaN; exp() of it is exactly 0.
_MASKED = -1e30


class Memory(NamedTuple):
    """What a segment leaves for the next one; every leaf has the rows as axis 0.

    Attributes:
      hidden: [B, L, M, D] inputs of every layer at the M latest positions, oldest
        first.
      length: [B] how many of the M slots are real, counted from the newest.
    """

    hidden: Float[Array, "B L M D"]
    length: Int[Array, " B"]


def empty_memory(rows: int, layers: int, slots: int, d_model: int) -> Memory:
    """Memory before the first segment: `slots` slots per row, none of them attended."""
    return Memory(
        hidden=jnp.zeros((rows, layers, slots, d_model)),  # [B, L, M, D]
        length=jnp.zeros((rows,), jnp.int32),  # [B]
    )


def forget(memory: Memory, start: Bool[Array, " B"]) -> Memory:
    """Empties the memory of the rows in `start`, whose text does not go on."""
    return Memory(
        hidden=jnp.where(start[:, None, None, None], 0, memory.hidden),
        length=jnp.where(start, 0, memory.length),
    )


def remember(memory: Memory, layer_inputs: Sequence[Float[Array, "B T D"]]) -> Memory:
    """Appends a segment's layer inputs, keeps the M newest, and cuts the gradient."""
    inputs = jnp.stack(layer_inputs, axis=1)  # [B, L, T, D]
    slots, tokens = memory.hidden.shape[2], inputs.shape[2]
    hidden = jnp.concatenate([memory.hidden, inputs], axis=2)[:, :, tokens:]
    length = jnp.minimum(memory.length + tokens, slots)  # [B]
    return Memory(jax.lax.stop_gradient(hidden), length)


def attention_mask(
    length: Int[Array, " B"], tokens: int, slots: int
) -> Bool[Array, "B 1 T K"]:
    """Which keys a query sees: all real memory, and the segment up to itself."""
    key = jnp.arange(slots + tokens)[None, :]  # [1, K]
    causal = key <= slots + jnp.arange(tokens)[:, None]  # [T, K]
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
    """

    heads: int
    d_head: int
    dropout: float = 0.0

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
        def project(name: str, x: Array) -> Array:
            features = (self.heads, self.d_head)
            return nn.DenseGeneral(features, use_bias=False, name=name)(x)

        query = project("query", segment)  # [B, T, H, E]
        key = project("key", context)  # [B, K, H, E]
        value = project("value", context)  # [B, K, H, E]
        relative = project("relative", distances)  # [K, H, E]

        scale = self.d_head**-0.5  # on the queries, which are smaller than the scores
        by_content = (query + content_bias[None, None]) * scale
        by_position = (query + position_bias[None, None]) * scale
        content = jnp.einsum("bthe,bkhe->bhtk", by_content, key)
        position = jnp.einsum("bthe,khe->bhtk", by_position, relative)
        scores = jnp.where(mask, content + relative_shift(position), _MASKED)
        weights = jax.nn.softmax(scores)  # [B, H, T, K]
        weights = nn.Dropout(self.dropout, deterministic=not train)(weights)
        mixed = jnp.einsum("bhtk,bkhe->bthe", weights, value)  # [B, T, H, E]
        out = nn.DenseGeneral(
            segment.shape[-1], axis=(-2, -1), use_bias=False, name="out"
        )
        return out(mixed)  # [B, T, D]


class FeedForward(nn.Module):
    """Two dense layers around a relu, position by position."""

    d_inner: int
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, train: bool) -> Array:
        inner = nn.relu(nn.Dense(self.d_inner, name="in")(x))  # [B, T, d_inner]
        inner = nn.Dropout(self.dropout, deterministic=not train)(inner)
        return nn.Dense(x.shape[-1], name="out")(inner)  # [B, T, D]


class Block(nn.Module):
    """Attention and feed-forward, each with a residual and a layer norm."""

    heads: int
    d_head: int
    d_inner: int
    dropout: float
    attention_dropout: float
    norm: Literal["pre", "post"]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: Float[Array, "B M D"],
        distances: Float[Array, "K D"],
        mask: Bool[Array, "B 1 T K"],
        biases: tuple[Float[Array, "H E"], Float[Array, "H E"]],
        *,
        train: bool,
    ) -> Float[Array, "B T D"]:
        pre = self.norm == "pre"
        attention_norm = nn.LayerNorm(name="attention_norm")
        feed_forward_norm = nn.LayerNorm(name="feed_forward_norm")
        attention = RelativeAttention(
            self.heads, self.d_head, self.attention_dropout, name="attention"
        )
        feed_forward = FeedForward(self.d_inner, self.dropout, name="feed_forward")
        drop = nn.Dropout(self.dropout, deterministic=not train)

        context = jnp.concatenate([memory, x], axis=1)  # [B, K, D]
        context = attention_norm(context) if pre else context
        segment = context[:, memory.shape[1] :]  # [B, T, D]
        x = x + drop(attention(segment, context, distances, mask, *biases, train=train))
        x = x if pre else attention_norm(x)
        x = x + drop(feed_forward(feed_forward_norm(x) if pre else x, train=train))
        return x if pre else feed_forward_norm(x)


class TransformerXL(nn.Module):
    """Language model over token ids that carries its memory explicitly.

    Attributes:
      vocabulary: V, ids in [0, V).
      layers: L blocks.
      d_model: D, width of the residual stream and of the embedding.
      heads: H attention heads of `d_head` features each; H * E need not be D.
      d_head: E.
      d_inner: width of the feed-forward layer.
      memory: M, positions of earlier segments that stay visible; 0 for none.
      dropout: on embeddings, distances, and what every sublayer returns.
      attention_dropout: on attention weights.
      clamp: distances beyond it read as `clamp`; None never clamps.
      tied_biases: one u and one v for all layers, as in the paper, or a pair per layer.
      tied_softmax: the output layer is the embedding, transposed, or one of its own.
      norm: "post", as in the paper, or "pre", which trains with less warm-up.
    """

    vocabulary: int
    layers: int
    d_model: int
    heads: int
    d_head: int
    d_inner: int
    memory: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    clamp: int | None = None
    tied_biases: bool = True
    tied_softmax: bool = True
    norm: Literal["pre", "post"] = "post"

    def initial_memory(self, rows: int) -> Memory:
        """Memory before the first segment of `rows` texts."""
        return empty_memory(rows, self.layers, self.memory, self.d_model)

    def _biases(self, suffix: str = "") -> tuple[Array, Array]:
        def bias(name: str) -> Array:
            shape = (self.heads, self.d_head)  # [H, E]
            return self.param(name + suffix, nn.initializers.normal(0.02), shape)

        return bias("content_bias"), bias("position_bias")

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "B T"], memory: Memory, *, train: bool = False
    ) -> tuple[Float[Array, "B T V"], Memory]:
        """Logits of each position's next token, and the memory for the next segment.

        Args:
          tokens: [B, T] ids of a segment; any T.
          memory: what the call on the segment before returned, or `initial_memory`.
          train: draw dropout, from the rng stream "dropout".
        """
        drop = nn.Dropout(self.dropout, deterministic=not train)
        width = self.d_model
        # Rows of unit length, so that tied logits start near unit variance; the input
        # is scaled back to unit variance per entry.
        embed = nn.Embed(
            self.vocabulary,
            width,
            embedding_init=nn.initializers.normal(width**-0.5),
            name="embed",
        )
        mask = attention_mask(memory.length, tokens.shape[1], self.memory)
        distances = distance_embedding(mask.shape[-1], width, self.clamp)  # [K, D]
        distances = drop(distances)
        shared = self._biases() if self.tied_biases else None

        x = drop(embed(tokens) * width**0.5)  # [B, T, D]
        distances = distances.astype(x.dtype)
        layer_inputs = []
        for i in range(self.layers):
            layer_inputs.append(x)
            block = Block(
                self.heads,
                self.d_head,
                self.d_inner,
                self.dropout,
                self.attention_dropout,
                self.norm,
                name=f"block_{i}",
            )
            biases = shared or self._biases(f"_{i}")
            past = memory.hidden[:, i]  # [B, M, D]
            x = block(x, past, distances, mask, biases, train=train)
        if self.norm == "pre":
            x = nn.LayerNorm(name="final_norm")(x)
        x = drop(x)
        if self.tied_softmax:
            bias = self.param("head_bias", nn.initializers.zeros, (self.vocabulary,))
            logits = embed.attend(x) + bias[None, None]  # [B, T, V]
        else:
            logits = nn.Dense(self.vocabulary, name="head")(x)  # [B, T, V]
        return logits, remember(memory, layer_inputs)
