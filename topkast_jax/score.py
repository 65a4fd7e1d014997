"""What an entry is worth: `(leaf, memory) -> scores`, elementwise, NumPy or JAX."""

from typing import Any

from topkast_jax._types import Memory, View


def magnitude(leaf: View, memory: Memory = ()) -> Any:
    """abs(theta)."""
    del memory
    return abs(leaf.value)


def gradient(leaf: View, memory: Memory = ()) -> Any:
    """abs(dL/dtheta); zero where the gradient is not seen."""
    del memory
    return abs(leaf.grad)


def saliency(leaf: View, memory: Memory = ()) -> Any:
    """abs(theta * dL/dtheta), the first-order change of the loss at removal."""
    del memory
    return abs(leaf.value * leaf.grad)


def momentum(leaf: View, memory: Memory) -> Any:
    """abs of a running mean of gradients that the method keeps as its memory."""
    del leaf
    return abs(memory)
