"""Products of Flax layers with meProp's or SWAT's rule of differentiation.

A `Product` stands where a layer keeps the function that multiplies. Both kinds of layers,
Linen's and NNX's, call it in the same way.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from topkast_jax.activations import meprop, swat
from topkast_jax.flax import contraction

Outputs = Callable[..., tuple[int, ...]]
Rule = Callable[[Callable[[Any, Any], Any], Any, Any, Outputs], Any]
"""(product, x, kernel, () -> axes of the result that come from the kernel) -> result."""


@dataclasses.dataclass(frozen=True)
class MeProp:
    """`tk.meprop` of the result, a row being one place's outputs."""

    sparsity: float | None
    k: int | None
    unified: bool

    def __call__(self, product: Any, x: Any, kernel: Any, outputs: Any) -> Any:
        y, row = product(x, kernel), outputs()
        return meprop(y, self.sparsity, k=self.k, axes=row, unified=self.unified)


@dataclasses.dataclass(frozen=True)
class Swat:
    """`tk.swat` of the product."""

    sparsity: float
    activation_sparsity: float

    def __call__(self, product: Any, x: Any, kernel: Any, outputs: Any) -> Any:
        del outputs
        of_x = self.activation_sparsity
        return swat(x, kernel, self.sparsity, activation_sparsity=of_x, product=product)


@dataclasses.dataclass(frozen=True)
class Product:
    """A layer's own product under another rule.

    Attributes:
      dense: what the layer would call.
      kernel: position of the kernel among its arguments; the input comes before it.
      outputs: its arguments -> axes of the result that come from the kernel.
      rule: how it is differentiated.
      path: of the kernel, for errors.
    """

    dense: Callable[..., Any]
    kernel: int
    outputs: Outputs
    rule: Rule
    path: str

    def __call__(self, *operands: Any, **settings: Any) -> Any:
        at = self.kernel
        before, after = operands[: at - 1], operands[at + 1 :]

        def product(x: Any, kernel: Any) -> Any:
            return self.dense(*before, x, kernel, *after, **settings)

        try:
            outputs = functools.partial(self.outputs, *operands)
            return self.rule(product, operands[at - 1], operands[at], outputs)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"{self.path!r}: {error}") from error


def _last(n: int) -> tuple[int, ...]:
    return tuple(range(-n, 0))


def _of_dot_general(x: Any, kernel: Any, dimensions: Any) -> tuple[int, ...]:
    (_, contracted), (_, batch) = dimensions
    return _last(kernel.ndim - len(contracted) - len(batch))


def _of_einsum(text: str, x: Any, kernel: Any) -> tuple[int, ...]:
    how = contraction.of_einsum(text, x.ndim)
    own = set(how.kernel) - set(how.x)
    return tuple(i for i, label in enumerate(how.out) if label in own)


def _of_convolution(*_: Any) -> tuple[int, ...]:
    return _last(1)


def dot_general(rule: Rule, path: str) -> Product:
    """In the place of `jax.lax.dot_general`."""
    return Product(lax.dot_general, 1, _of_dot_general, rule, path)


def einsum(rule: Rule, path: str) -> Product:
    """In the place of `jax.numpy.einsum`, of an equation, an input and a kernel."""
    return Product(jnp.einsum, 2, _of_einsum, rule, path)


def convolution(rule: Rule, path: str) -> Product:
    """In the place of `jax.lax.conv_general_dilated`; channels last."""
    return Product(lax.conv_general_dilated, 1, _of_convolution, rule, path)
