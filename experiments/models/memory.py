"""The memory of a Transformer-XL: what earlier segments leave for the next one.

Dai et al., 2019, arXiv:1901.02860, section 3.2. Letters in shape comments: B rows, T
tokens of a segment, M slots of memory, D `d_model`, L layers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Memory(NamedTuple):
    """What a segment leaves for the next one; every leaf has the rows as axis 0.

    Attributes:
      hidden: [B, L, M, D] inputs of every layer at the M latest positions, oldest
        first.
      length: [B] how many of the M slots are real, counted from the newest.
    """

    hidden: Float[Array, "B L M D"]
    length: Int[Array, " B"]


def empty_memory(
    rows: int, layers: int, slots: int, d_model: int, dtype: Any = jnp.float32
) -> Memory:
    """Memory before the first segment: `slots` slots per row, none of them attended."""
    return Memory(
        hidden=jnp.zeros((rows, layers, slots, d_model), dtype),  # [B, L, M, D]
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
