"""Matrices that a language model uses at both ends: rows by id, and projections.

Press and Wolf, "Using the Output Embedding to Improve Language Models", 2017,
arXiv:1608.05859. Letters in shape comments: B rows, T tokens, V ids, d width of a row.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float, Int


class Table(nn.Embed):
    """Rows by id; with a `dtype`, products with all rows still come out in float32."""

    def attend(self, query: Float[Array, "B T d"]) -> Float[Array, "B T V"]:
        """Products of each query with each row."""
        query, rows = self.promote_dtype(query, self.embedding, dtype=self.dtype)
        if self.dtype is None:  # products and logits follow what comes in
            return jnp.dot(query, rows.T)
        return _products(query, rows)

    def nats(
        self,
        query: Float[Array, "B T d"],
        bias: Float[Array, " V"],
        targets: Int[Array, "B T"],
        others: Float[Array, "B T n"] | None = None,
    ) -> Float[Array, "B T"]:
        """Cross entropy of the softmax over all rows, and over entries that others give.

        The logits live only while this is computed: the backward pass makes them again
        (one more product in exchange for [B, T, V] floats).

        Args:
          query: inputs of the products.
          bias: of each row.
          targets: numbers of rows; from V on, of the others.
          others: logits of what is no row of this table.
        """
        query, rows = self.promote_dtype(query, self.embedding, dtype=self.dtype)
        return _nats(query, rows, bias, targets, others)


def _products(query: Array, rows: Array) -> Array:
    return jnp.einsum("btd,vd->btv", query, rows, preferred_element_type=jnp.float32)


@jax.checkpoint
def _nats(query: Array, rows: Array, bias: Array, targets: Array, others: Any) -> Array:
    logits = _products(query, rows) + bias[None, None]
    if others is not None:
        logits = jnp.concatenate([logits, others], axis=-1)
    return cross_entropy(logits, targets)


def cross_entropy(
    logits: Float[Array, "B T n"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """-log softmax(logits)[target] in nats, position by position."""
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - own


class Projection(nn.Module):
    """A matrix that is used in both directions."""

    inputs: int
    outputs: int
    kernel_init: Any
    dtype: Any = None

    def setup(self) -> None:
        self.kernel = self.param(
            "kernel", self.kernel_init, (self.inputs, self.outputs)
        )

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        return jnp.dot(*promote_dtype(x, self.kernel, dtype=self.dtype))

    def attend(self, y: Float[Array, "... outputs"]) -> Float[Array, "... inputs"]:
        """From the outputs back, by the same matrix transposed."""
        y, kernel = promote_dtype(y, self.kernel, dtype=self.dtype)
        return jnp.dot(y, kernel.T)
