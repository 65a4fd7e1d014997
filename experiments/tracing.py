"""Profiles of some steps, for TensorBoard or Perfetto."""

import pathlib

import jax


class Trace:
    """Starts and ends `jax.profiler` around the steps that a config names.

    Args:
      text: "first:last", the steps with first <= step < last; None or "": none.
      folder: where to write.
    Raises:
      ValueError: not two numbers in order.
    """

    def __init__(self, text: str | None, folder: pathlib.Path) -> None:
        self._folder, self._running = folder, False
        self.first, self.last = -1, -1
        if not text:
            return
        first, _, last = text.partition(":")
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise ValueError(f"profile={text!r} must be steps as in 20:25")
        self.first, self.last = int(first), int(last)

    def pause(self, step: int, pause: int) -> int:
        """A pause of the loop after `step`, earlier where the profile begins or ends."""
        return min(s for s in (self.first, self.last, pause) if s > step)

    def at(self, step: int) -> None:
        """Begins or ends where it is time; all steps before are complete."""
        inside = self.first <= step < self.last
        if inside and not self._running:
            jax.profiler.start_trace(self._folder)
        elif self._running and not inside:
            jax.profiler.stop_trace()
        self._running = inside

    def close(self) -> None:
        """Writes what there is where the run ends within the profile."""
        self.at(self.last)
