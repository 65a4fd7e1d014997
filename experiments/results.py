"""Results of a sweep in one small file, which outlives the folders of its runs.

A line a job, JSON: its name, what it depended on, what it ended with, the commit and
devices of the process that wrote it down, and how long the job took, where that process
ran it. So a sweep goes on on another machine.
"""

import fcntl
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import log
from experiments.jobs import Job
from experiments.provenance import provenance

FIELDS = ("name", "settings", "result")
ORIGIN = ("commit", "devices", "cores")
SECONDS = "seconds"


def read(file: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Rows by the name of the job; none where there is no file.

    Raises:
      ValueError: a line that is no row.
    """
    if not file.exists():
        return {}
    rows = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            took = {SECONDS: row[SECONDS]} if SECONDS in row else {}
            rows[row["name"]] = {key: row[key] for key in (*FIELDS, *ORIGIN)} | took
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file}, line {number} is no result of a job: {error}"
            ) from error
    return rows


def known(jobs: Sequence[Job], rows: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    """Jobs that know what the file says of them, where it is of the same settings."""
    found = []
    for job in jobs:
        row = rows.get(job.name)
        same = row is not None and row["settings"] == job.settings()
        found.append(job._replace(kept=row["result"] if row and same else None))
    return found


def write(
    file: pathlib.Path, jobs: Sequence[Job], seconds: float | None = None
) -> None:
    """Adds finished jobs that the file does not have; others keep their lines.

    Processes that write at once wait for each other, and lose nothing.

    Args:
      file: of results.
      jobs: of the sweep.
      seconds: that each took, from the start of its process to its end, or of the last
        one that went on with it.
    """
    folder = os.open(file.parent, os.O_RDONLY)  # locked, so that no lock file is left
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        _write(file, jobs, seconds)
    finally:
        os.close(folder)


def _write(file: pathlib.Path, jobs: Sequence[Job], seconds: float | None) -> None:
    rows = read(file)
    origin = provenance({})
    for job in jobs:
        result = job.result()
        if result is None or job.kept is not None:
            continue
        rows[job.name] = {
            "name": job.name,
            "settings": job.settings(),
            "result": result,
            **{key: origin[key] for key in ORIGIN},
            **({} if seconds is None else {SECONDS: round(seconds, 1)}),
        }
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows.values()))
    os.replace(temporary, file)


def durations(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """How long the jobs of a file took, in a line; "" where it does not say."""
    took = [row[SECONDS] for row in rows.values() if SECONDS in row]
    if not took:
        return ""
    mean, most, total = sum(took) / len(took), max(took), sum(took)
    return (
        f"{len(took)} of {len(rows)} jobs say how long they took: {log.duration(mean)} "
        f"each, {log.duration(most)} at most, {log.duration(total)} in all"
    )
