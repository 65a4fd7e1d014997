"""What the taps of a kernel see of one product: sums over the rows of its two sides."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from topkast_jax.flax.contraction import Contraction
from topkast_jax.statistics import Tapped, Taps, draw_signs, norms, watch


def of_product(x: Any, y: Any, tapped: Tapped, how: Contraction) -> Any:
    """The result of a product, seen by the taps of its kernel.

    Args:
      x: the input.
      y: the result; a bias changes nothing.
      tapped: the kernel.
      how: the contraction, which `sides` lets pass.
    """
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


def of_convolution(
    x: Any, y: Any, tapped: Tapped, convolve: Callable[[Any, Any], Any]
) -> Any:
    """The result of a convolution, seen by the taps of its kernel.

    Sums over patches, which are never made: they are the gradient of the kernel of the
    same convolution to one channel, whose cotangent is what each place counts for, one
    or a sign.

    Args:
      x: [..., *spatial, channels].
      y: [..., *spatial, features].
      tapped: the kernel, [*window, channels, features].
      convolve: `(x, kernel of one feature) -> result`, as the layer does it, in float32.
    """
    x = lax.stop_gradient(x).astype(jnp.float32)
    signs = None
    counts = jnp.ones((*y.shape[:-1], 1), jnp.float32)
    if tapped.key is not None:
        counts = signs = draw_signs(tapped, x, y.shape[:-1])[..., None]
    zeros = jnp.zeros(np.shape(tapped.taps.inputs))
    seen = jnp.abs(x) if signs is None else x
    _, gradient = jax.vjp(lambda kernel: convolve(seen, kernel), zeros)
    (found,) = gradient(counts)
    return watch(y, tapped, found, signs, tuple(range(y.ndim - 1)), (0,))


def sides(how: Contraction, shape: tuple[int, ...]) -> tuple[int, ...]:
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


def why_not(taps: Taps, wanted: tuple[int, ...]) -> str:
    """Why taps do not fit a product, "" where they do.

    Args:
      taps: of the whole parameter, or of a slice of it.
      wanted: what `sides` says of the product.
    """
    shape, others = taps.inputs.shape, taps.outputs.shape
    stacked = len(shape) - len(wanted)
    if shape[stacked:] != wanted:
        return (
            f"its axes are read as inputs of the sizes {shape[stacked:]}, and the layer "
            f"multiplies by {wanted}; declare them with tk.axes"
        )
    return unstacked(shape[:stacked], others[:stacked])


def unstacked(of_inputs: tuple[int, ...], of_outputs: tuple[int, ...]) -> str:
    """Why the axes of taps that a layer does not read are no stack, "" if they are."""
    if of_inputs == of_outputs:
        return ""
    return (
        f"its kernel has {len(of_inputs)} axes more than the layer reads; declare them, "
        "and no others, as a stack with tk.axes"
    )


def refusal(path: str, reason: str) -> str:
    """What is said of a parameter whose statistics nothing gives."""
    return (
        f"{path!r} has no statistics: {reason}; draw its candidates uniformly "
        "(tk.groups gives it a method of its own), or leave it dense"
    )
