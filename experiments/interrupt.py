"""Ctrl-C and SIGTERM: the first asks the loop to save and leave, the second kills.

Several processes must leave after the same step, so each waits for `agree`.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax

from experiments import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Context in which `signal` is None until the process is asked to leave.

    Outside of the main thread, where Python cannot install handlers, it stays None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked = 0
        self._before: dict[int, Any] = {}

    def agree(self) -> None:
        """Makes a signal that any process got known to all; at the same step of each."""
        self.signal = distributed.largest(self._asked) or None

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._on_signal) for s in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._asked = number
        if jax.process_count() == 1:
            self.signal = number
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        said = (
            f"\n{signal.Signals(number).name}: saving after this step, then leaving; "
        )
        # Not print: a handler may run in the middle of another print.
        os.write(2, f"{said}send it again to kill\n".encode())
