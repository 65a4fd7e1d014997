"""What an entry is worth: `(leaf, memory) -> scores`, elementwise, any layout."""

import jax.numpy as jnp
from jaxtyping import Array

from topkast_jax._types import Leaf, Memory


def magnitude(leaf: Leaf, memory: Memory = ()) -> Array:
    """abs(theta)."""
    del memory
    return jnp.abs(leaf.value)


def gradient(leaf: Leaf, memory: Memory = ()) -> Array:
    """abs(dL/dtheta); zero where the gradient is not seen."""
    del memory
    return jnp.abs(leaf.grad)


def saliency(leaf: Leaf, memory: Memory = ()) -> Array:
    """abs(theta * dL/dtheta), the first-order change of the loss at removal."""
    del memory
    return jnp.abs(leaf.value * leaf.grad)


def momentum(leaf: Leaf, memory: Memory) -> Array:
    """abs of a running mean of gradients that the method keeps as its memory."""
    del leaf
    return jnp.abs(memory)
