"""Several processes that train together: how they meet, and what they agree on.

Everything here is a no-op, or the value itself, for a process alone.
"""

import os
import pathlib
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils


def join(text: str) -> None:
    """Makes this process one of several; before anything else asks for devices.

    Args:
      text: "" for a process alone; "auto" where the surroundings tell (Cloud TPU,
        Slurm); else "address:port,processes,number": where process 0 listens, how many
        there are, and which of them this is.
    Raises:
      ValueError: anything else.
    """
    if not text:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if text == "auto":
        jax.distributed.initialize()
        _quiet()
        return
    address, *numbers = text.split(",")
    if (
        len(numbers) != 2
        or not all(n.isdecimal() for n in numbers)
        or ":" not in address
    ):
        raise ValueError(
            f"distributed={text!r} must be 'auto', or address:port,processes,number as "
            "in 10.0.0.1:1234,4,0"
        )
    processes, number = map(int, numbers)
    if number >= processes:
        raise ValueError(
            f"distributed={text!r}: {processes} processes have the numbers 0 to "
            f"{processes - 1}"
        )
    jax.distributed.initialize(address, processes, number)
    _quiet()


def _quiet() -> None:
    """Process 0 talks for all of them; errors of any are seen."""
    if not is_first():
        nowhere = pathlib.Path(os.devnull)
        sys.stdout = nowhere.open("w")


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def of_first(value: int) -> int:
    """The value that process 0 has."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def largest(value: int) -> int:
    """The largest of the values that processes have."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def wait(name: str) -> None:
    """Returns when every process has come to this line."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
