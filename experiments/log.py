"""What a run tells: rows in metrics.jsonl, TensorBoard events, lines on a terminal."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import rich.console
import rich.progress
import tensorboardX

from experiments import paths

Row = dict[str, Any]
ROWS = "metrics.jsonl"


def read(workdir: str | os.PathLike[str]) -> list[Row]:
    """Rows of `workdir/metrics.jsonl`; a torn last line is left out."""
    path = paths.folder(workdir) / ROWS
    return list(_rows(path.read_text().splitlines())) if path.exists() else []


def last(workdir: str | os.PathLike[str], kind: str) -> dict[str, Any] | None:
    """Values of the newest row of a kind, None where there is none."""
    for row in reversed(read(workdir)):
        if row.pop("kind") == kind:
            del row["step"]
            return row
    return None


def _rows(lines: list[str]) -> Iterator[Row]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # the process was killed within this line
            return


class Log:
    """Rows of one run.

    A row is `{"step": updates done, "kind": what it is, ...}` with numbers, or mappings
    of numbers by path. NaN and Inf are written as null.

    Args:
      workdir: an existing folder; None writes nothing.
      step: where the run goes on: rows after it are taken out, so that no step is there
        twice. None for a run that begins: all rows are.
      steps: length of the run, for the bar.
    """

    def __init__(
        self, workdir: str | os.PathLike[str] | None, *, step: int | None, steps: int
    ) -> None:
        self._folder = None if workdir is None else paths.folder(workdir)
        self._steps = steps
        self._console = rich.console.Console(file=sys.stdout)
        self._live = self._console.is_terminal
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.description}"),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._bar.add_task("compiling", total=steps, completed=step or 0)
        self._open(step)

    def __enter__(self) -> "Log":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        self._close()

    def _close(self) -> None:
        if self._lines is not None:
            self._lines.close()
        self._writer.close()

    def _open(self, step: int | None) -> None:
        self._lines: paths.Lines | None = None
        # The writer of events knows local files alone.
        on_disk = self._folder is not None and not paths.is_remote(self._folder)
        last = -1 if step is None else step
        if self._folder is not None:
            rows = [row for row in read(self._folder) if row["step"] <= last]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            self._lines = paths.Lines(self._folder / ROWS, text)
        events = str(self._folder / "tensorboard") if on_disk else None
        self._writer = tensorboardX.SummaryWriter(
            events, purge_step=last + 1, write_to_disk=on_disk
        )

    def rewind(self, step: int) -> None:
        """Takes out the rows after a step: the run goes back to it."""
        self._close()
        self._open(step)
        self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        if self._live:
            self._console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds a row, to the file at once."""
        row = {"step": step, "kind": kind, **_plain(values)}
        if self._lines is not None:
            self._lines.add(json.dumps(row, allow_nan=False))
        for name, value in _scalars(values):
            self._writer.add_scalar(f"{kind}/{name}", value, step)
        self._writer.flush()

    def progress(self, step: int, text: str) -> None:
        """Moves the bar; a plain line where there is no terminal."""
        self._bar.update(self._task, completed=step, description=text)
        if not self._live:
            print(f"step {step}/{self._steps}  {text}", flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _scalars(
    values: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)


def duration(seconds: float) -> str:
    """`"1:02:03"` or `"2:03"`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def warn(text: str) -> None:
    """A line on stderr: it must be seen even where stdout goes to a file."""
    print(text, file=sys.stderr, flush=True)
