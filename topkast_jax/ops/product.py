"""What an implementation of a sparse product consists of."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array

from topkast_jax.layouts.packed import Index


class Product(NamedTuple):
    """The three products of a layer y = x W, with W on A forward and dW on B.

    Each raises NotImplementedError for what it cannot do, before anything is computed.

    Attributes:
      forward: `(x [n, inputs], values, index) -> y [n, outputs]`, with A.
      input_gradient: `(dy [n, outputs], values, index) -> dx [n, inputs]`, with A.
      weight_gradient: `(x, dy, index) -> [n_B, *unit]`, for all of B.
    """

    forward: Callable[[Array, Array, Index], Array]
    input_gradient: Callable[[Array, Array, Index], Array]
    weight_gradient: Callable[[Array, Array, Index], Array]
