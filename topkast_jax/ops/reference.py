"""The meaning of a sparse product: expand the matrix, multiply, gather.

Not only a reference: where units are single entries and not very few, nothing in XLA beats
it. The dense matrix lives for the length of one product, and so does the dense gradient.
"""

from jaxtyping import Array

from topkast_jax.layouts.packed import Index, expand, gather
from topkast_jax.ops.product import Product


def _forward(x: Array, values: Array, index: Index) -> Array:
    return index.here.matrix(expand(values, index)).T @ x


def _input_gradient(dy: Array, values: Array, index: Index) -> Array:
    return index.here.matrix(expand(values, index)) @ dy


def _weight_gradient(x: Array, dy: Array, index: Index) -> Array:
    return gather(index.here.from_matrix(x @ dy.T), index)


expanded = Product(_forward, _input_gradient, _weight_gradient)
