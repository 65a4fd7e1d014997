"""Taps at the layers of unmodified Linen models: see `tk.taps`."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from topkast_jax.flax import contraction, layers
from topkast_jax.flax.contraction import Contraction
from topkast_jax.statistics import Tapped, draw_signs, norms, watch

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
        return _convolution(module, args[0], y, tapped)
    x, how = layers.product(module, *args, **kwargs)
    rows = tuple(a for a, label in enumerate(how.x) if label not in how.kernel)
    kept = [label for label in how.kernel if label in how.x]
    signs = None
    if tapped.key is None:
        left = [label for label in how.x if label in how.kernel]
        found = norms(x, rows).transpose([left.index(label) for label in kept])
    else:
        ids = {label: n for n, label in enumerate(dict.fromkeys(how.x))}
        drawn = draw_signs(tapped, x, tuple(x.shape[a] for a in rows))
        found = jnp.einsum(
            lax.stop_gradient(x).astype(jnp.float32),
            [ids[label] for label in how.x],
            drawn,
            [ids[how.x[a]] for a in rows],
            [ids[label] for label in kept],
        )
        of_rows = [how.x[a] for a in rows]
        mine = [label for label in how.out if label in of_rows]
        signs = drawn.transpose([of_rows.index(label) for label in mine])
        sizes = zip(how.out, y.shape, strict=True)
        signs = signs.reshape([n if label in mine else 1 for label, n in sizes])
    across = tuple(a for a, label in enumerate(how.out) if label not in how.kernel)
    rest = [label for label in how.out if label in how.kernel]
    order = tuple(rest.index(label) for label in how.kernel if label in rest)
    return watch(y, tapped, found, signs, across, order)


def _convolution(module: Any, x: Any, y: Any, tapped: Tapped) -> Any:
    """Sums over patches, which are never made.

    They are the gradient of the kernel of the same convolution to one channel, whose
    cotangent is what each place counts for: one, or a sign.
    """
    one = module.clone(
        features=1, use_bias=False, dtype=jnp.float32, param_dtype=jnp.float32
    )
    x = lax.stop_gradient(x).astype(jnp.float32)
    signs = None
    counts = jnp.ones((*y.shape[:-1], 1), jnp.float32)
    if tapped.key is not None:
        counts = signs = draw_signs(tapped, x, y.shape[:-1])[..., None]
    zeros = jnp.zeros(np.shape(tapped.taps.inputs))
    seen = jnp.abs(x) if signs is None else x
    _, gradient = jax.vjp(lambda k: one.apply({"params": {"kernel": k}}, seen), zeros)
    (found,) = gradient(counts)
    return watch(y, tapped, found, signs, tuple(range(y.ndim - 1)), (0,))


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
            raise ValueError(
                f"{'/'.join(path)!r} has no statistics: {reason}; draw its candidates "
                "uniformly (tk.groups gives it a method of its own), or leave it dense"
            )


def _why_not(module: Any, tapped: Tapped, args: Any, kwargs: Any) -> str:
    if not layers.known(module):
        name = type(module).__name__
        return f"{name} is not a Dense, DenseGeneral, Einsum or Conv layer"
    shape = tapped.taps.inputs.shape
    try:
        if isinstance(module, nn.Conv):
            if module.feature_group_count != 1 or module.mask is not None:
                return "Conv has feature groups or a mask"
            size = np.atleast_1d(module.kernel_size).tolist()
            sides = (*size, args[0].shape[-1], 1)
        else:
            x, how = layers.product(module, *args, **kwargs)
            sides = _sides(how, x.shape)
    except NotImplementedError as error:
        return str(error)
    inside = shape[len(shape) - len(sides) :]
    if inside != sides:
        return (
            f"its axes are read as inputs of the sizes {inside}, and the layer "
            f"multiplies by {sides}; declare them with tk.axes"
        )
    return ""


def _sides(how: Contraction, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of a kernel's axes, 1 for those that the input does not have.

    Raises:
      NotImplementedError: no product whose rows are those of its result.
    """
    if any(len(set(side)) < len(side) for side in how):
        raise NotImplementedError("an index is repeated: no plain product")
    x, kernel, out = map(set, how)
    if (x | kernel) - out - (x & kernel) or x - kernel != out - kernel:
        raise NotImplementedError("it sums over an axis of input or kernel alone")
    sizes = dict(zip(how.x, shape, strict=True))
    return tuple(sizes.get(label, 1) for label in how.kernel)
