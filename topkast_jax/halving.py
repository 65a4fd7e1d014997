"""Sums that are equal to the last bit on every backend."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np


def total(x: Any, axes: int) -> Any:
    """Sum over the last `axes` axes, the same to the last bit on any backend.

    By additions of halves: a library's own reduction adds in an order of its own on
    every backend, so that two layouts would choose different units.
    """
    if x.dtype.itemsize < 4:  # sums of small floats are rounded as a compiler likes
        x = x.astype(np.float32)
    shape = x.shape[: x.ndim - axes]
    x = x.reshape(*shape, math.prod(x.shape[x.ndim - axes :]))
    while x.shape[-1] > 1:
        half, odd = divmod(x.shape[-1], 2)
        last = x[..., 2 * half :]
        x = x[..., :half] + x[..., half : 2 * half]
        if odd:
            where: Any = np if isinstance(x, np.ndarray) else jnp
            x = where.concatenate([x[..., :-1], x[..., -1:] + last], axis=-1)
    return x.reshape(shape)
