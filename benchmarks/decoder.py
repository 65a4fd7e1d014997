"""A byte-level decoder of equal layers that comes in every size and every form.

A layer is causal attention and a feed-forward net, 12 width^2 weights in four kernels,
pre-norm without parameters of its own. Products and activations are in `dtype`; a kernel
may be dense, or the `tk.BlockMatrix` that `tk.sparsify` makes of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import topkast_jax as tk

PyTree = Any
BYTES, HEAD = 256, 128
"""Ids of the vocabulary, and features of an attention head."""


def layer_shapes(width: int, *stack: int) -> PyTree:
    """Kernels of a layer, or of a stack of layers, as float32 shapes."""

    def kernel(inputs: int, outputs: int) -> Any:
        return {"kernel": jax.ShapeDtypeStruct((*stack, inputs, outputs), jnp.float32)}

    return {
        "qkv": kernel(width, 3 * width),
        "out": kernel(width, width),
        "up": kernel(width, 4 * width),
        "down": kernel(4 * width, width),
    }


def embedding_shape(width: int) -> Any:
    """The embedding, which is the output layer too; always dense."""
    return jax.ShapeDtypeStruct((BYTES, width), jnp.float32)


def product(x: jax.Array, kernel: Any, implementation: str | None = None) -> jax.Array:
    """x @ kernel in the dtype of x, whichever form the kernel has."""
    if isinstance(kernel, tk.BlockMatrix):
        stored = tk.BlockMatrix(kernel.values.astype(x.dtype), kernel.index)
        return tk.ops.sparse_matmul(x, stored, implementation)
    return x @ kernel.astype(x.dtype)


def norm(x: jax.Array) -> jax.Array:
    """Layer norm without parameters, in float32."""
    return jax.nn.standardize(x.astype(jnp.float32)).astype(x.dtype)


def layer(
    weights: PyTree, x: jax.Array, implementation: str | None = None
) -> jax.Array:
    """One layer.

    Args:
      weights: as in `layer_shapes`, alpha where they are sparse.
      x: [rows, length, width].
      implementation: of sparse products, see `tk.ops.sparse_matmul`.
    """
    rows, length, width = x.shape

    def times(x: jax.Array, name: str) -> jax.Array:
        return product(x, weights[name]["kernel"], implementation)

    heads = times(norm(x), "qkv").reshape(rows, length, -1, min(HEAD, width))
    mixed = jax.nn.dot_product_attention(*jnp.split(heads, 3, axis=2), is_causal=True)
    x = x + times(mixed.reshape(rows, length, width), "out")
    return x + times(jax.nn.relu(times(norm(x), "up")), "down")


def loss(
    embedding: jax.Array,
    text: jax.Array,
    layers: Callable[[jax.Array], jax.Array],
    dtype: Any = jnp.bfloat16,
) -> jax.Array:
    """Mean cross entropy of the next byte, in nats.

    Args:
      embedding: [BYTES, width].
      text: int32 [rows, length + 1].
      layers: what comes between the embedding and the output.
      dtype: of products and activations.
    """
    table = embedding.astype(dtype)
    x = layers(table[text[:, :-1]])
    logits = norm(x) @ table.T
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), text[:, 1:]
    )
    return jnp.mean(losses)
