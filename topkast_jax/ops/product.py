"""What an implementation of a sparse product consists of."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array

from topkast_jax.layouts.packed import Index


class Product(NamedTuple):
    """The three products of a layer y = W^T x, with W on A forward and dW on B.

    Activations are [features, n], so that the rows of a block are contiguous, or all of
    them are [n, features]. Each raises NotImplementedError for what it cannot do, before
    anything is computed.

    Attributes:
      forward: `(x [inputs, n], values, index) -> y [outputs, n]`, with A.
      input_gradient: `(dy [outputs, n], values, index) -> dx [inputs, n]`, with A.
      weight_gradient: `(x, dy, index) -> [n_B, *unit]`, for all of B.
      rows_first: activations are [n, features].
    """

    forward: Callable[[Array, Array, Index], Array]
    input_gradient: Callable[[Array, Array, Index], Array]
    weight_gradient: Callable[[Array, Array, Index], Array]
    rows_first: bool = False
