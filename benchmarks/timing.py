"""Times that can be compared: taken in turns, in one process, medians.

A busy machine slows everything for seconds at a time, so a ratio is taken within each
round, between runs that stood next to each other, and the median over rounds is told.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax


class Contest(NamedTuple):
    """Seconds of every contestant in every round.

    Attributes:
      seconds: name -> one number per round.
    """

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """Median seconds of a contestant."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> float:
        """Median over rounds of the time of `name` over that of `to` in that round."""
        pairs = zip(self.seconds[name], self.seconds[to], strict=True)
        return statistics.median(a / b for a, b in pairs)


class Contestant(NamedTuple):
    """One thing to time.

    Attributes:
      run: what is timed, until the arrays it returns are ready.
      prepare: what comes right before, untimed.
    """

    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None


def in_turns(contestants: Mapping[str, Contestant], rounds: int) -> Contest:
    """Times contestants round-robin; the round before the first compiles and warms up.

    Args:
      contestants: by name.
      rounds: at least 1. Every other round runs backwards, so that none always follows
        the same neighbour.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        names = list(contestants) if turn % 2 else list(contestants)[::-1]
        for name in names:
            jax.block_until_ready(contestants[name].prepare())
            start = time.perf_counter()
            jax.block_until_ready(contestants[name].run())
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return Contest(seconds)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1])] + [cell.rjust(w) for cell, w in rest]
        return f"| {' | '.join(padded)} |"

    first, *rest = widths
    rule = f"| {'-' * first} | {' | '.join('-' * (w - 1) + ':' for w in rest)} |"
    return "\n".join([line(header), rule, *map(line, rows)])


def hardware() -> str:
    """One line: processor, cores, load, device and versions."""
    device = jax.devices()[0]
    parts = [_processor(), f"{_cores()} cores"]
    if hasattr(os, "getloadavg"):
        parts.append(f"load {os.getloadavg()[0]:.1f} at the end")
    if device.platform != "cpu":
        parts.append(device.device_kind)
    return ", ".join([*parts, f"jax {jax.__version__}", f"on {device.platform}"])


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            for text in lines:
                if text.startswith("model name"):
                    return text.partition(":")[2].strip()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()
