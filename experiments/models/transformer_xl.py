"""Transformer-XL: relative positions and a memory of earlier segments.

Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
2019, arXiv:1901.02860. Letters in shape comments: B rows, T tokens of a segment, M
slots of memory, K = M + T keys, D `d_model`, H heads, E `d_head`, L layers, V ids.
"""

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from experiments.models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from experiments.models.memory import Memory, empty_memory, forget, remember
from experiments.models.relative_attention import (
    RelativeAttention,
    attention_mask,
    distance_embedding,
)
from experiments.models.tables import Table, cross_entropy

__all__ = [
    "Block",
    "FeedForward",
    "Memory",
    "RelativeAttention",
    "TransformerXL",
    "attention_mask",
    "distance_embedding",
    "empty_memory",
    "forget",
    "remember",
]


class FeedForward(nn.Module):
    """Two dense layers around a relu, position by position."""

    d_inner: int
    dropout: float = 0.0
    kernel_init: Any = nn.initializers.lecun_normal()
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, train: bool) -> Array:
        settings: dict[str, Any] = dict(dtype=self.dtype, kernel_init=self.kernel_init)
        inner = nn.Dense(self.d_inner, name="in", **settings)(x)  # [B, T, d_inner]
        inner = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(inner))
        return nn.Dense(x.shape[-1], name="out", **settings)(inner)  # [B, T, D]


class Block(nn.Module):
    """Attention and feed-forward, each with a residual and a layer norm."""

    heads: int
    d_head: int
    d_inner: int
    dropout: float
    attention_dropout: float
    norm: Literal["pre", "post"]
    kernel_init: Any = nn.initializers.lecun_normal()
    dtype: Any = None

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
        settings: dict[str, Any] = dict(dtype=self.dtype, kernel_init=self.kernel_init)
        attention_norm = nn.LayerNorm(dtype=self.dtype, name="attention_norm")
        feed_forward_norm = nn.LayerNorm(dtype=self.dtype, name="feed_forward_norm")
        attention = RelativeAttention(
            self.heads,
            self.d_head,
            self.attention_dropout,
            name="attention",
            **settings,
        )
        feed_forward = FeedForward(
            self.d_inner, self.dropout, name="feed_forward", **settings
        )
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
      d_model: D, width of the residual stream.
      heads: H attention heads of `d_head` features each; H * E need not be D.
      d_head: E.
      d_inner: width of the feed-forward layer.
      memory: M, positions of earlier segments that stay visible; 0 for none.
      dropout: on embeddings, distances, and what every sublayer returns.
      attention_dropout: on attention weights.
      clamp: distances beyond it read as `clamp`; None never clamps.
      same_length: whether every position sees M positions, itself included, wherever it
        stands in its segment, as in the authors' evaluation.
      tied_biases: one u and one v for all layers, as in the paper, or a pair per layer.
      tied_softmax: the output layer is the embedding, transposed, or one of its own.
      norm: "post", as in the paper, or "pre", which trains with less warm-up.
      d_embed: width of the embedding, if it is not D: it is projected then.
      cutoffs: where clusters of rarer ids begin, see experiments/models/adaptive.py.
      div_val: each cluster's embedding is narrower than the one before by this factor.
      tied_projections: "all", "tail" or "none", see `AdaptiveSoftmax`.
      init_std: of a normal distribution for all kernels, biases u and v, and the
        embedding, as in the authors' code (.02; .005 for the large WikiText-103 model);
        None: kernels by fan-in, and embeddings of unit variance.
      projection_std: the same for projections of embeddings, .01 there.
      dtype: of activations and memory; None: float32. Parameters, the statistics of
        norms, softmaxes and logits are float32 always.
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
    same_length: bool = False
    tied_biases: bool = True
    tied_softmax: bool = True
    norm: Literal["pre", "post"] = "post"
    d_embed: int | None = None
    cutoffs: tuple[int, ...] = ()
    div_val: int = 1
    tied_projections: Literal["all", "tail", "none"] = "tail"
    init_std: float | None = None
    projection_std: float = 0.01
    dtype: Any = None

    def initial_memory(self, rows: int) -> Memory:
        """Memory before the first segment of `rows` texts."""
        dtype = jnp.float32 if self.dtype is None else self.dtype
        return empty_memory(rows, self.layers, self.memory, self.d_model, dtype)

    def _kernel_init(self) -> Any:
        if self.init_std is None:
            return nn.initializers.lecun_normal()
        return nn.initializers.normal(self.init_std)

    def _biases(self, suffix: str = "") -> tuple[Array, Array]:
        std = 0.02 if self.init_std is None else self.init_std

        def bias(name: str) -> Array:
            shape = (self.heads, self.d_head)  # [H, E]
            return self.param(name + suffix, nn.initializers.normal(std), shape)

        return bias("content_bias"), bias("position_bias")

    def _embedding(self) -> Table | AdaptiveEmbedding:
        """One table, or one for each cluster where there is something to adapt."""
        # Rows of unit length, so that tied logits start near unit variance; the input
        # is scaled back to unit variance per entry.
        std = self.d_model**-0.5 if self.init_std is None else self.init_std
        init = nn.initializers.normal(std)
        width = self.d_model if self.d_embed is None else self.d_embed
        if not self.cutoffs and width == self.d_model:
            return Table(
                self.vocabulary, width, self.dtype, embedding_init=init, name="embed"
            )
        return AdaptiveEmbedding(
            self.vocabulary,
            tuple(self.cutoffs),
            width,
            self.d_model,
            self.div_val,
            embedding_init=init,
            projection_init=nn.initializers.normal(self.projection_std),
            dtype=self.dtype,
            name="embed",
        )

    def _head(
        self, embed: Table | AdaptiveEmbedding, x: Array, targets: Array | None
    ) -> Array:
        """Logits [B, T, V] of the last layer's output, or nats [B, T] of targets."""
        if isinstance(embed, AdaptiveEmbedding):
            softmax = AdaptiveSoftmax(
                embed,
                self.tied_softmax,
                self.tied_projections,
                embedding_init=embed.embedding_init,
                projection_init=embed.projection_init,
                dtype=self.dtype,
                name="head",
            )
            return softmax(x, targets)
        if not self.tied_softmax:  # not narrowed: float32 logits ask for float32 inputs
            head = nn.Dense(
                self.vocabulary, kernel_init=self._kernel_init(), name="head"
            )
            logits = head(x.astype(jnp.float32))
            return logits if targets is None else cross_entropy(logits, targets)
        bias = self.param("head_bias", nn.initializers.zeros, (self.vocabulary,))
        if targets is None:
            return embed.attend(x) + bias[None, None]
        return embed.nats(x, bias, targets)

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        memory: Memory,
        targets: Int[Array, "B T"] | None = None,
        *,
        train: bool = False,
    ) -> tuple[Float[Array, "B T V"] | Float[Array, "B T"], Memory]:
        """Logits of each position's next token, and the memory for the next segment.

        Args:
          tokens: [B, T] ids of a segment; any T.
          memory: what the call on the segment before returned, or `initial_memory`.
          targets: [B, T] next ids. With them -log p of each, in nats, takes the place of
            the logits, and logits are not kept for the backward pass; the way for large
            vocabularies.
          train: draw dropout, from the rng stream "dropout".
        Raises:
          ValueError: cutoffs, `div_val` or `tied_projections` that make no sense.
        """
        drop = nn.Dropout(self.dropout, deterministic=not train)
        width = self.d_model
        embed = self._embedding()
        mask = attention_mask(
            memory.length, tokens.shape[1], self.memory, self.same_length
        )
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
                self._kernel_init(),
                self.dtype,
                name=f"block_{i}",
            )
            biases = shared or self._biases(f"_{i}")
            past = memory.hidden[:, i]  # [B, M, D]
            x = block(x, past, distances, mask, biases, train=train)
        if self.norm == "pre":
            x = nn.LayerNorm(dtype=self.dtype, name="final_norm")(x)
        return self._head(embed, drop(x), targets), remember(memory, layer_inputs)
