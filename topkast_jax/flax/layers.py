"""Linen layers read as products of their input and their kernel."""

from typing import Any

import flax.linen as nn
import numpy as np

from topkast_jax.flax import contraction
from topkast_jax.flax.contraction import Contraction

LAYERS = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv)


def known(module: nn.Module) -> bool:
    """Whether calling a module is what calling one of `LAYERS` is."""
    own = type(module).__call__
    return any(isinstance(module, layer) and own is layer.__call__ for layer in LAYERS)


def product(module: Any, x: Any, *more: Any, **named: Any) -> tuple[Any, Contraction]:
    """What a layer called with these arguments multiplies by its kernel, and how.

    Raises:
      NotImplementedError: no plain product.
    """
    if isinstance(module, nn.Einsum):
        (text,) = {module.einsum_str, *more, *named.values()} - {None}
        return x, contraction.of_einsum(text, x.ndim)
    if isinstance(module, nn.Conv):
        return _pointwise(module, x)
    axes, batch = (-1,), ()
    features = tuple(np.atleast_1d(module.features).tolist())
    if isinstance(module, nn.DenseGeneral):
        axes = np.atleast_1d(module.axis).tolist()
        batch = np.atleast_1d(module.batch_dims).tolist()
    inputs = sorted(a % x.ndim for a in axes)
    dimensions = ((inputs, range(len(inputs))), (batch, batch))
    rank = len(inputs) + len(features)
    return x, contraction.of_dot_general(dimensions, x.ndim, rank)


def _pointwise(module: Any, x: Any) -> tuple[Any, Contraction]:
    size = tuple(np.atleast_1d(module.kernel_size).tolist())
    if set(size) != {1}:
        raise NotImplementedError(f"Conv has a window of {'x'.join(map(str, size))}")
    if module.feature_group_count != 1 or module.mask is not None:
        raise NotImplementedError("Conv has feature groups or a mask")
    if module.padding not in ("SAME", "VALID"):
        raise NotImplementedError(f"Conv has the padding {module.padding!r}")
    if set(np.atleast_1d(module.input_dilation or 1).tolist()) != {1}:
        raise NotImplementedError("Conv dilates its input")
    if module.conv_general_dilated or module.conv_general_dilated_cls:
        raise NotImplementedError("the layer has a convolution of its own")
    steps = tuple(np.broadcast_to(module.strides or 1, len(size)).tolist())
    return contraction.of_pointwise(x, size, steps)
