"""Jobs of a sweep: read from its file, checked, and found again on disk.

A sweep file is data, as in configs/sweeps/patterns.py: `get_sweep()` returns a list of

    dict(
        name="blocks-90-seed-1",  # its folder
        config="configs/quickstart.py:structure=blocks:8x128,forward=0.9",
        overrides={"steps": 500, "seed": 1},  # of keys of the config
        labels={"pattern": "blocks 8x128", "sparsity": "90/80", "seed": 1},
    )

Labels are for the table: the first says which row, the second, where there is one,
which column, and `seed` what is averaged over.
"""

import difflib
import json
import os
import re
import runpy
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from experiments import log, paths
from experiments.config import as_json, flatten

FIELDS = frozenset(["name", "config", "overrides", "labels"])
SETTINGS = "job.json"
# Rows of the log, and what a result takes of them: FLOPs of training, zeros costing
# nothing, and the time of a step, both as shares of the dense network's.
COSTS = (("train", "flops_fraction"), ("dense", "time_ratio"))


class Job(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: its folder in the workdir of the sweep.
      config: file, or file:arguments.
      overrides: `{"dotted.key": value}` of the config.
      labels: `{"what": "which"}`, for the table.
      folder: of the run; it may lie in a bucket.
      steps: its length.
      kept: what it ended with, where a file of results says so.
    """

    name: str
    config: str
    overrides: dict[str, Any]
    labels: dict[str, str]
    folder: epath.Path
    steps: int
    kept: dict[str, Any] | None = None

    def arguments(self) -> list[str]:
        """Those of experiments.train."""
        settings = (f"--config.{key}={value}" for key, value in self.overrides.items())
        return [f"--config={self.config}", f"--workdir={self.folder}", *settings]

    def command(self) -> str:
        """The same by hand, for a shell."""
        return shlex.join(["python", "-m", "experiments.train", *self.arguments()])

    def settings(self) -> dict[str, Any]:
        """What the run depends on, as JSON data."""
        return {"config": self.config, "overrides": self.overrides}

    def places(self) -> list[str]:
        """Names of the labels that say where in the table it stands."""
        return [label for label in self.labels if label != "seed"]

    def result(self) -> dict[str, Any] | None:
        """The evaluation after the last step, and what the run cost (`COSTS`).

        None if the run is not finished.
        """
        if self.kept is not None:
            return self.kept
        rows = [row for row in log.read(self.folder) if row["kind"] == "eval"]
        saved = self.folder / "checkpoints" / str(self.steps)  # after the evaluation
        if not rows or rows[-1]["step"] != self.steps or not saved.is_dir():
            return None
        costs = {
            name: row[name]
            for kind, name in COSTS
            if (row := log.last(self.folder, kind)) and name in row
        }
        return {k: v for k, v in rows[-1].items() if k not in ("kind", "step")} | costs


def load(path: str, workdir: str | os.PathLike[str]) -> list[Job]:
    """The jobs of a sweep file, in order; their configs are loaded as train does.

    Args:
      path: of the file.
      workdir: of the sweep, with the folders of the jobs; may lie in a bucket.
    Raises:
      ValueError: a job that cannot be run as it stands, named; or a folder that holds a
        finished run of other settings.
      OSError: no such file.
    """
    get_sweep = runpy.run_path(path).get("get_sweep")
    if get_sweep is None:
        raise ValueError(f"{path} has no get_sweep()")
    folder = paths.folder(workdir)
    jobs: dict[str, Job] = {}
    for number, given in enumerate(get_sweep()):
        job = _read(f"{path}: job {number}", given, folder)
        if job.name in jobs:
            raise ValueError(f"{path}: two jobs have the name {job.name!r}")
        jobs[job.name] = job
    if not jobs:
        raise ValueError(f"{path}: get_sweep() gives no jobs")
    _require_labels(path, list(jobs.values()))
    return list(jobs.values())


def _require_labels(path: str, jobs: list[Job]) -> None:
    """Every job has a place in the table, and none that of another."""
    names = max((job.places() for job in jobs), key=len)
    taken: dict[tuple[str, ...], str] = {}
    for job in jobs:
        here = job.places()
        if not 1 <= len(here) <= 2 or here != names[: len(here)]:
            raise ValueError(
                f"{path}, {job.name}: labels {here} must be one or two besides seed, "
                f"the same for every job; others have {names}"
            )
        place = tuple(job.labels.get(name, "") for name in (*names, "seed"))
        if place in taken:
            raise ValueError(f"{path}: {taken[place]} and {job.name} have equal labels")
        taken[place] = job.name


def _read(where: str, given: Mapping[str, Any], workdir: epath.Path) -> Job:
    if set(given) != FIELDS:
        raise ValueError(
            f"{where} has {', '.join(given) or 'nothing'}; a job has "
            f"{', '.join(sorted(FIELDS))}"
        )
    name, path = given["name"], given["config"]
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"{where}: name {name!r} must be letters, digits, '_', '-' and '.'"
        )
    labels = {key: str(value) for key, value in given["labels"].items()}
    overrides = dict(given["overrides"])
    try:
        config = configuration(path, overrides)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{where}, {name}: {_told(error)}") from error
    job = Job(name, path, overrides, labels, workdir / name, config.steps)
    _require_same_settings(job)
    return job


def _require_same_settings(job: Job) -> None:
    """Of a finished run; one that goes on is compared by train itself."""
    path = job.folder / SETTINGS
    if job.result() is None or not path.exists():
        return
    found, settings = json.loads(path.read_text()), job.settings()
    if {key: found.get(key) for key in settings} != settings:  # labels may change
        raise ValueError(
            f"{job.folder} holds a run of other settings, see {SETTINGS} there; name "
            "another --workdir, or another job"
        )


def configuration(path: str, overrides: Mapping[str, Any]) -> Any:
    """The config of a file (`file:arguments`) with overrides by dotted key.

    Raises:
      ValueError: an override of no key, or of no plain value; and what the file raises.
    """
    parser: Any = ConfigFileFlagParser
    config: Any = parser("config").parse(path)
    _ = config.steps  # a missing file is kept quiet until then
    known = flatten(as_json(config))
    for key, value in overrides.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"override {key}: the config has no such key{hint}")
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"override {key}={value!r} must be a number or a string")
        config.update_from_flattened_dict({key: value})
    return config


def _told(error: Exception) -> str:
    """The last line that the user can do something with."""
    if isinstance(error, OSError) and error.__cause__:
        error = error.__cause__  # type: ignore[assignment]
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        return lines[-1].removeprefix("ValueError: ")
    return " ".join(lines)
