"""Runs the jobs of a sweep one after the other, each in a process of its own.

    python -m experiments.sweep --sweep=configs/sweeps/patterns.py [--workdir=runs/patterns]

The same command resumes: finished jobs are skipped, an interrupted one goes on from its
checkpoint. A job's folder, workdir/name, is that of `experiments.train`, with what it
printed in log.txt. A job that fails is reported, and the others go on. Several processes
may run one sweep: a job belongs to the one that holds its lock.

Jobs share a cache of compiled programs, workdir/.cache, unless JAX_COMPILATION_CACHE_DIR
names another: seeds of one config are compiled once.

    ... --print_commands     prints one command a job, for a cluster's launcher; with
                             --workdir=gs://bucket/sweep, or to print its --table, jobs
                             may lie in a bucket
    ... --table              prints the results so far in Markdown, means over seeds
    ... --results=FILE       keeps what jobs ended with in a file, and takes from it what
                             is there: a sweep goes on on another machine

Exit codes: 0 all is done, or in the hands of another process; 1 jobs failed; 2 bad
input, found before the first job; 130 and 143 stopped by Ctrl-C and SIGTERM, which the
running job gets too: the first lets it save, a second one kills it.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import IO, Any

from absl import flags

from experiments import command, log, paths, results
from experiments.jobs import SETTINGS, Job, load
from experiments.table import table

FAILED = 1
PROGRAM = (sys.executable, "-m", "experiments.train")
CACHE = "JAX_COMPILATION_CACHE_DIR"
OUTPUT = "log.txt"
# What object stores cannot do, and what to do about it.
UNLOCKED = (
    "processes that write it wait for each other by a lock of its folder, and a bucket "
    "has none; name a file of this machine, and copy it"
)
UNLOCKED_JOBS = (
    "jobs that run here are locked and append to their log.txt, and a bucket can do "
    "neither; name a folder of this machine, or run what --print_commands prints"
)


class Child:
    """The process of the running job; signals sent to this one are passed on to it."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def passing_on(self) -> Iterator[None]:
        """Within it, Ctrl-C and SIGTERM go to the job, and end the sweep after it."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, job: Job, lock: IO[str], cache: pathlib.Path) -> int:
        """Trains; returns the exit code."""
        told = job.settings() | {"labels": job.labels}
        (job.folder / SETTINGS).write_text(json.dumps(told, indent=1) + "\n")
        with pathlib.Path(job.folder, OUTPUT).open("ab") as output:
            self._process = subprocess.Popen(
                [*PROGRAM, *job.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={CACHE: str(cache.absolute()), **os.environ},
                process_group=0,  # a terminal's Ctrl-C would reach it twice
                pass_fds=[lock.fileno()],  # held as long as the job lives
            )
            if self.signal is not None:  # came before there was a process
                self._process.send_signal(self.signal)
            return self._process.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        if self._process is not None:
            self._process.send_signal(number)


@contextlib.contextmanager
def locked(folder: os.PathLike[str]) -> Iterator[IO[str] | None]:
    """A lock on a job's folder, or None if another process has it.

    The system frees it when the last process that holds it ends, however it ends.
    """
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield lock


def run(jobs: list[Job], cache: pathlib.Path, keep: pathlib.Path | None = None) -> int:
    """Runs what is not finished, in order; returns the exit code.

    Args:
      jobs: of the sweep.
      cache: folder of compiled programs.
      keep: file of results; None for none.
    """
    child, failed, elsewhere = Child(), 0, 0
    seconds: list[float] = []
    todo = [job for job in jobs if job.result() is None]
    print(f"{len(jobs)} jobs, {len(jobs) - len(todo)} of them finished", flush=True)
    with child.passing_on():
        for number, job in enumerate(todo, 1):
            with locked(job.folder) as lock:
                if lock is None:
                    elsewhere += 1
                    continue
                if job.result() is not None:  # another process was faster
                    continue
                began = time.perf_counter()
                code = child.run(job, lock, cache)
            if child.signal is not None:
                print(f"stopped at {job.name}; the same command goes on", flush=True)
                return 128 + child.signal
            result = job.result()
            if code or result is None:
                failed += 1
                log.warn(f"{job.name}: failed, exit code {code}: {_last_line(job)}")
                continue
            seconds.append(time.perf_counter() - began)
            if keep is not None:
                results.write(keep, [job], seconds[-1])
            left = sum(seconds) / len(seconds) * (len(todo) - number)
            print(
                f"{number}/{len(todo)} {job.name}: {_words(result)}, in "
                f"{log.duration(seconds[-1])}; about {log.duration(left)} left",
                flush=True,
            )
    if elsewhere:
        print(f"{elsewhere} jobs are left to another process, which has them")
    if failed:
        log.warn(f"{failed} jobs failed; the same command tries them again")
    return FAILED if failed else 0


def _words(result: dict[str, Any]) -> str:
    numbers = {k: v for k, v in result.items() if isinstance(v, int | float)}
    return "  ".join(f"{name} {value:.3f}" for name, value in numbers.items())


def _last_line(job: Job) -> str:
    path = pathlib.Path(job.folder, OUTPUT)
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    said = [line.strip() for line in lines if line.strip()]
    return f"{said[-1] if said else 'it said nothing'} ({path})"


def main(argv: list[str]) -> int:
    """Runs, or prints what was asked for."""
    del argv
    path = flags.FLAGS.sweep
    if path is None:
        raise command.BadInput("--sweep is missing, as in configs/sweeps/patterns.py")
    workdir = flags.FLAGS.workdir or f"runs/{pathlib.Path(path).stem}"
    reads_only = flags.FLAGS.table or flags.FLAGS.print_commands
    with command.checking():
        keep = flags.FLAGS.results and paths.local(
            flags.FLAGS.results, "--results", UNLOCKED
        )
        if not reads_only:
            paths.local(workdir, "--workdir", UNLOCKED_JOBS)
        jobs = load(path, workdir)
        if keep:
            jobs = results.known(jobs, results.read(keep))
            results.write(keep, jobs)
        if flags.FLAGS.table:
            print(table(jobs, *flags.FLAGS.metric.split(",")))
            if keep and (said := results.durations(results.read(keep))):
                print(f"\n{said}")
            return 0
    if flags.FLAGS.print_commands:
        for job in jobs:
            print(job.command())
        return 0
    return run(jobs, pathlib.Path(workdir, ".cache"), keep)


if __name__ == "__main__":
    flags.DEFINE_string("sweep", None, "File with get_sweep().")
    flags.DEFINE_string("workdir", None, "Where to write; default runs/<file's name>.")
    flags.DEFINE_string("results", None, "File of results to read and to add to.")
    flags.DEFINE_bool("print_commands", False, "Print the commands, run nothing.")
    flags.DEFINE_bool("table", False, "Print the results so far, run nothing.")
    flags.DEFINE_string("metric", "bits_per_byte", "Of the table, or several.")
    command.run(main)
