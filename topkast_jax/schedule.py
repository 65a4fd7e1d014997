"""When masks change, and how numbers move with the step."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from topkast_jax._types import Due, Schedule

LOOKED_AT = (0, *(2**n for n in range(21)))
"""Steps at which schedules are looked at before training."""


@dataclasses.dataclass(frozen=True)
class Every:
    """Due at start, start + n, ... while below `stop`; never at step 0. See `every`."""

    n: int
    start: int
    stop: int | None = None

    def __call__(self, step: Any) -> Any:
        due = (step > 0) & (step >= self.start) & ((step - self.start) % self.n == 0)
        return due if self.stop is None else due & (step < self.stop)


@dataclasses.dataclass(frozen=True)
class At:
    """Due at the listed steps. See `at`."""

    steps: tuple[int, ...]

    def __call__(self, step: Any) -> Any:
        due = step == self.steps[0]
        for other in self.steps[1:]:
            due = due | (step == other)
        return due


def at_step(number: float | Schedule, step: Any) -> Any:
    """A number, or the value of a schedule at a step."""
    return number(step) if callable(number) else number


def require_at_least(least: float | int, **numbers: float | Schedule) -> None:
    """Raises ValueError naming a number below `least`; schedules pass."""
    for name, number in numbers.items():
        if not callable(number) and not number >= least:
            raise ValueError(f"{name}={number} must be at least {least:g}")


def every(n: int, start: int | None = None, stop: int | None = None) -> Every:
    """Due every `n` steps: at `start` (default `n`), start + n, ... below `stop`.

    The masks chosen are those used *in* the step at which the schedule is due. Step 0
    uses the initial masks and is never due.

    Raises:
      ValueError: `n` below 1, or a schedule that never fires.
    Example:
      >>> [step for step in range(50) if every(10, stop=40)(step)]
      [10, 20, 30]
    """
    start = n if start is None else start
    if n < 1:
        raise ValueError(f"every: n={n} must be at least 1")
    if start < 0:
        raise ValueError(f"every: start={start} must not be negative")
    first = start if start > 0 else n
    if stop is not None and stop <= first:
        raise ValueError(
            f"every({n}, start={start}, stop={stop}) never fires: it would be due first "
            f"at step {first}; raise stop, or use tk.static for fixed masks"
        )
    return Every(n, start, stop)


def at(steps: Sequence[int]) -> At:
    """Due at the listed steps, each at least 1.

    Raises:
      ValueError: an empty list (it never fires) or a step below 1.
    Example:
      >>> [step for step in range(50) if at([5, 20])(step)]
      [5, 20]
    """
    listed = tuple(sorted({int(step) for step in steps}))
    if not listed:
        raise ValueError("at: an empty list of steps never fires")
    if listed[0] < 1:
        raise ValueError(f"at: step {listed[0]}: refreshes begin at step 1")
    return At(listed)


def first_due(due: Due, steps: int) -> int | None:
    """First step in [1, steps) at which a schedule fires; None if it never does.

    Example:
      >>> first_due(every(10, start=25), steps=100)
      25
    """
    fires = np.asarray(due(np.arange(steps)))[1:]
    return int(np.argmax(fires)) + 1 if fires.any() else None


def cosine(value: float, stop: int) -> Schedule:
    """`value / 2 * (1 + cos(pi * step / stop))`, 0 from `stop` on.

    Drop fraction of RigL (arXiv 1911.11134) and GSE (arXiv 2401.06898).
    Example:
      >>> [round(float(cosine(0.3, 100)(step)), 3) for step in (0, 50, 100)]
      [0.3, 0.15, 0.0]
    """
    if stop < 1:
        raise ValueError(f"cosine: stop={stop} must be at least 1")

    def schedule(step: Any) -> Any:
        angle = math.pi * jnp.minimum(step, stop) / stop
        return value / 2 * (1 + jnp.cos(angle))

    return schedule


def cubic(start_value: float, end_value: float, start: int, stop: int) -> Schedule:
    """Cubic ramp from `start_value` to `end_value` between steps `start` and `stop`.

    `end + (start - end) * (1 - progress)**3`: fast first, then slow.

    Example:
      >>> [round(float(cubic(0.0, 0.8, 0, 100)(step)), 3) for step in (0, 50, 100)]
      [0.0, 0.7, 0.8]

    Reference:
      Zhu and Gupta, "To prune, or not to prune", 2017, arXiv 1710.01878.
    """
    if not 0 <= start < stop:
        raise ValueError(f"cubic: needs 0 <= start < stop, got {start} and {stop}")

    def schedule(step: Any) -> Any:
        progress = jnp.clip((step - start) / (stop - start), 0.0, 1.0)
        return end_value + (start_value - end_value) * (1 - progress) ** 3

    return schedule
