"""Taps at the layers of unmodified Linen models: see `tk.taps`."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from topkast_jax.flax import contraction, layers, sums
from topkast_jax.statistics import Tapped

Path = tuple[str, ...]


def observe(module: Any, y: Any, tapped: Tapped, *args: Any, **kwargs: Any) -> Any:
    """The result of a layer, seen by the taps of its kernel.

    Args:
      module: a layer that `require` lets pass.
      y: what it gave, bias included.
      tapped: its kernel.
      *args: what it was called with.
      **kwargs: what it was called with.
    """
    if isinstance(module, nn.Conv):
        return sums.of_convolution(args[0], y, tapped, _one_channel(module))
    x, how = layers.product(module, *args, **kwargs)
    return sums.of_product(x, y, tapped, how)


def _one_channel(module: Any) -> Callable[[Any, Any], Any]:
    one = module.clone(
        features=1, use_bias=False, dtype=jnp.float32, param_dtype=jnp.float32
    )
    return lambda x, kernel: one.apply({"params": {"kernel": kernel}}, x)


def require(
    call: Callable[..., Any],
    variables: Mapping[str, Any],
    tapped: Mapping[Path, Tapped],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Checks that a layer can be observed at every tap.

    Args:
      call: `model.apply`, or what does the same.
      variables: without taps.
      tapped: kernels with taps, by path.
      *args: of the call; nothing is computed.
      **kwargs: of the call.
    Raises:
      ValueError: a parameter is named, and why it has no statistics.
    """
    reasons: dict[Path, str] = {}

    def record(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_call(*args, **kwargs)
        path = (*context.module.path, "kernel")
        if context.method_name == "__call__" and path in tapped:
            why = _why_not(context.module, tapped[path], args, kwargs)
            reasons[path] = reasons.get(path) or why
        return out

    def recorded(variables: Any, *args: Any, **kwargs: Any) -> None:
        with nn.intercept_methods(record):
            call(variables, *args, **kwargs)

    contraction.abstract_call(recorded, variables, *args, **kwargs)
    for path in tapped:
        reason = reasons.get(path, "no layer of the model multiplies by it")
        if reason:
            raise ValueError(sums.refusal("/".join(path), reason))


def _why_not(module: Any, tapped: Tapped, args: Any, kwargs: Any) -> str:
    if not layers.known(module):
        name = type(module).__name__
        return f"{name} is not a Dense, DenseGeneral, Einsum or Conv layer"
    try:
        if isinstance(module, nn.Conv):
            if module.feature_group_count != 1 or module.mask is not None:
                return "Conv has feature groups or a mask"
            size = np.atleast_1d(module.kernel_size).tolist()
            wanted: tuple[int, ...] = (*size, args[0].shape[-1], 1)
        else:
            x, how = layers.product(module, *args, **kwargs)
            wanted = sums.sides(how, x.shape)
    except NotImplementedError as error:
        return str(error)
    return sums.why_not(tapped.taps, wanted)
