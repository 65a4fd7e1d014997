"""Numbers of entries that follow a schedule of sparsity.

A distribution works on the host, by exact rules, and the sparsity of a step is known on
the device alone. So it is asked in advance for every thousandth, and what lies between
two of them is interpolated.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from topkast_jax._types import Schedule
from topkast_jax.distribution import Copies, Distribution, Shapes, require_sparsity
from topkast_jax.schedule import LOOKED_AT, at_step

PARTS = 1000
"""Sparsities are asked for in thousandths, the last of them .999."""


def first_value(sparsity: float | Schedule, name: str = "sparsity") -> float:
    """The sparsity of step 0.

    Raises:
      ValueError: a number, or a value of a schedule at step 0, 1, 2, 4, ... 2^20, that
        is no sparsity.
    """
    if not callable(sparsity):
        require_sparsity(sparsity, name)
        return sparsity
    values = {step: np.asarray(sparsity(step)) for step in LOOKED_AT}
    for step, value in values.items():
        if value.shape != ():
            raise ValueError(
                f"{name}: the schedule gives an array of shape {value.shape} at step "
                f"{step}, not a number"
            )
        require_sparsity(float(value), f"{name} at step {step}")
    return float(values[0])


def refuse(name: str, reason: str, **sparsities: float | Schedule) -> None:
    """Raises ValueError where a sparsity is a schedule that a method cannot follow."""
    for which, sparsity in sparsities.items():
        if callable(sparsity):
            raise ValueError(
                f"{name}: {which} must be a number, not a schedule: {reason}"
            )


def table(
    distribution: Distribution, shapes: Shapes, copies: Copies
) -> Mapping[str, tuple[int, ...]]:
    """`{path: entries kept at sparsity 0, .001, ..., .999}`, on the host.

    Where the distribution cannot have a sparsity, what it gives for the nearest that it
    can.

    Raises:
      ValueError: it can have none.
    """
    return _table(distribution, tuple(shapes.items()), tuple(copies.items()))


@functools.lru_cache(maxsize=64)
def _table(
    distribution: Distribution, shapes: tuple[Any, ...], copies: tuple[Any, ...]
) -> Mapping[str, tuple[int, ...]]:
    reached: dict[int, dict[str, int]] = {}
    problem: ValueError | None = None
    for level in range(PARTS):
        try:
            asked = distribution(dict(shapes), level / PARTS, dict(copies))
            reached[level] = asked
        except ValueError as error:
            problem = error
    if not reached:
        raise ValueError(f"no sparsity can be reached: {problem}") from problem
    there = np.array(sorted(reached))
    nearest = there[np.abs(there[:, None] - np.arange(PARTS)).argmin(axis=0)]
    return {path: tuple(reached[i][path] for i in nearest) for path, _ in shapes}


def at(counts: Sequence[int], sparsity: float | Schedule, step: Any) -> Int[Array, ""]:
    """What a row of a table says at a step: int32, exact at every thousandth.

    Sparsities outside [0, .999] are taken for the nearest within.
    """
    place = jnp.asarray(at_step(sparsity, step), jnp.float32) * PARTS
    near = jnp.round(place)
    place = jnp.where(abs(place - near) < 1e-3, near, place)
    place = jnp.clip(place, 0, PARTS - 1)
    below = jnp.minimum(jnp.floor(place).astype(jnp.int32), PARTS - 2)
    kept = jnp.asarray(np.asarray(counts, np.int32))
    change = (kept[below + 1] - kept[below]).astype(jnp.float32)
    return kept[below] + jnp.round((place - below) * change).astype(jnp.int32)
