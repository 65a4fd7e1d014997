"""Gradient accumulation: a batch in parts, one after the other, for one update."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.tasks.shared import shared, with_shared

PyTree = Any


def in_parts(
    gradient: Callable[..., Any],
    parts: int,
    count: Callable[[Any], jax.Array] | None,
    carry: PyTree,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
) -> Any:
    """What `gradient` gives for the whole batch, with the activations of one part.

    Part i has the rows i, i + parts, ..., so that a batch that is cut over devices in
    runs of rows stays where it is. What a carry shares (`Shared`) goes from part to part;
    so batch normalisation sees parts, as it does in other codes.

    Args:
      gradient: (carry, batch, key, share) -> ((loss * share, (carry, aux)), gradients of
        loss * share); the loss and `aux` are means over what counts in its batch.
      parts: a divisor of the rows.
      count: see `Task.count`.
      carry: of the whole batch.
      batch: rows are axis 0.
      key: each part draws with its own.
    Returns:
      The same with share 1: means over what counts in the batch.
    """

    values = shared(carry)
    none: list[Any] = [()] * len(values)

    def cut(x: jax.Array) -> jax.Array:
        if not x.ndim:
            return jnp.broadcast_to(x, (parts,))
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    def joined(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]) if x.ndim > 1 else x[-1]

    def counted(batch: Any) -> jax.Array:
        rows = jax.tree.leaves(batch)[0].shape[0]
        return jnp.float32(rows) if count is None else count(batch)

    def one(values: list[Any], piece: Any) -> Any:
        rows, batch, key = piece
        share = counted(batch) / whole
        (loss, (after, aux)), grads = gradient(
            with_shared(rows, values), batch, key, share
        )
        aux = jax.tree.map(lambda x: x * share, aux)
        return (loss, aux, grads), shared(after), with_shared(after, none)

    def add(so_far: Any, piece: Any) -> Any:
        sums, values = so_far
        found, values, rows = one(values, piece)
        return (jax.tree.map(jnp.add, sums, found), values), rows

    whole = jnp.maximum(counted(batch), 1)
    pieces = (
        jax.tree.map(cut, with_shared(carry, none)),
        jax.tree.map(cut, dict(batch)),
        jax.random.split(key, parts),
    )
    shapes = jax.eval_shape(one, values, jax.tree.map(lambda x: x[0], pieces))[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    ((loss, aux, grads), values), rows = jax.lax.scan(add, (zeros, values), pieces)
    after = with_shared(jax.tree.map(joined, rows), values)
    return (loss, (after, aux)), grads
