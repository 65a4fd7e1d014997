"""Runs as they lie on disk: found, read, and refused with a reason."""

import datetime
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from experiments import log, paths
from experiments.checkpoint import Checkpoints
from experiments.jobs import SETTINGS

CHECKPOINTS = "checkpoints"
RATIOS = ("time_ratio", "state_bytes_ratio", "memory_ratio")


class Unusable(ValueError):
    """A run that a report cannot show; the message says why."""


class Origin(NamedTuple):
    """Where a run comes from; "-" where it is not known.

    Attributes:
      commit: of the program.
      devices: as in "1 x cpu".
      cores: of the machine.
      jax: its version.
      saved: when the last checkpoint was, UTC.
    """

    commit: str
    devices: str
    cores: str
    jax: str
    saved: str


class Run(NamedTuple):
    """A finished run.

    Attributes:
      folder: where it lies.
      config: JSON data.
      labels: of the sweep, `{"what": "which"}`; empty where there was none.
      rows: of its log.
      metrics: held-out ones after the last step; NaN where they were not finite.
      flops: of the products of training, if zeros cost nothing.
      flops_fraction: of the same for the network without masks.
      seconds: sum of the times of its steps.
      ratios: to the dense step, measured; those of `RATIOS` that there are.
      parameters: weights that are used: all but the zeros of alpha.
      size: all weights, zeros too.
      origin: see `Origin`.
    """

    folder: epath.Path
    config: dict[str, Any]
    labels: dict[str, str]
    rows: list[log.Row]
    metrics: dict[str, float]
    flops: float
    flops_fraction: float
    seconds: float
    ratios: dict[str, float]
    parameters: int
    size: int
    origin: Origin

    @property
    def method(self) -> str:
        """As the config names it."""
        return str(self.config.get("sparse", {}).get("method", "dense"))

    @property
    def simulated(self) -> bool:
        """Whether zeros are stored and multiplied: the masked layout."""
        layout = self.config.get("sparse", {}).get("layout", "masked")
        return self.method != "dense" and layout == "masked"

    def of_kind(self, kind: str) -> list[log.Row]:
        """Rows of a kind."""
        return [row for row in self.rows if row["kind"] == kind]


def find(folders: Iterable[str]) -> list[epath.Path]:
    """Folders of runs, each once: those given, and those in folders that are given.

    Args:
      folders: of this machine, or in a bucket.
    Raises:
      ValueError: no such folder, or nothing in it that looks like a run.
    """
    found: dict[epath.Path, None] = {}
    for given in folders:
        path = paths.folder(given)
        if not path.is_dir():
            raise ValueError(f"{given} is no folder")
        here = (
            [path] if _is_run(path) else sorted(p for p in path.iterdir() if _is_run(p))
        )
        if not here:
            raise ValueError(
                f"{given} holds no run: neither it nor a folder in it has {log.ROWS}"
            )
        found |= dict.fromkeys(here)
    return list(found)


def _is_run(path: epath.Path) -> bool:
    """Also one that has not begun, so that it can be named."""
    return any((path / name).exists() for name in (log.ROWS, SETTINGS, CHECKPOINTS))


def read(folder: epath.Path) -> Run:
    """A finished run.

    Raises:
      Unusable: it goes on, or is damaged.
    """
    try:
        return _read(folder)
    except Unusable:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Unusable(f"damaged: {said}") from error


def _read(folder: epath.Path) -> Run:
    meta, rows = Checkpoints(folder).newest(), log.read(folder)
    if meta is None:
        at = f"step {rows[-1]['step']}" if rows else "the start"
        raise Unusable(f"unfinished: no checkpoint, and the log is at {at}")
    config, last = meta["config"], meta["step"]
    if last != config["steps"]:
        raise Unusable(f"unfinished: step {last} of {config['steps']}")
    kinds: dict[str, list[log.Row]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    for kind in ("train", "eval"):
        told = kinds[kind][-1]["step"] if kind in kinds else 0
        if told != last:
            raise Unusable(
                f"damaged: its log has rows {kind!r} up to step {told}, and its "
                f"checkpoint is of step {last}"
            )
    train, held_out = kinds["train"], kinds["eval"][-1]
    forward = kinds["layers"][-1]["forward"] if "layers" in kinds else {}
    beside = kinds["dense"][-1] if "dense" in kinds else {}
    sizes = _sizes(meta)
    return Run(
        folder,
        config,
        _labels(folder),
        rows,
        {k: _number(v) for k, v in held_out.items() if k not in ("kind", "step")},
        train[-1]["flops"],
        train[-1]["flops_fraction"],
        _seconds(train),
        {name: beside[name] for name in RATIOS if beside.get(name) is not None},
        sum(sizes.values()) - _zeros(sizes, forward),
        sum(sizes.values()),
        _origin(folder, meta),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _seconds(train: Sequence[log.Row]) -> float:
    """Each row has the mean time of the steps since the row before."""
    starts = [0, *(row["step"] for row in train)]
    return sum(
        row["step_time"] * (row["step"] - start)
        for row, start in zip(train, starts, strict=False)
    )


def _sizes(meta: Mapping[str, Any]) -> dict[str, int]:
    """Entries of each parameter in its dense form, by path."""
    kinds = meta["arrays"]["params"]  # "float32[8,6]"
    shapes = {
        path: [int(n) for n in kind.partition("[")[2].rstrip("]").split(",") if n]
        for path, kind in kinds.items()
    }
    packed = {path: said["shape"] for path, said in meta.get("packed", {}).items()}
    return {path: math.prod(shape) for path, shape in (shapes | packed).items()}


def _zeros(sizes: Mapping[str, int], sparsity: Mapping[str, float]) -> int:
    """Exact: a share of zeros times a size is within rounding of an integer."""
    return sum(round(share * sizes[path]) for path, share in sparsity.items())


def _labels(folder: epath.Path) -> dict[str, str]:
    path = folder / SETTINGS
    labels = json.loads(path.read_text()).get("labels", {}) if path.exists() else {}
    return {key: str(value) for key, value in labels.items() if key != "seed"}


def _origin(folder: epath.Path, meta: Mapping[str, Any]) -> Origin:
    def known(value: Any) -> str:
        return "-" if value is None else str(value)

    # Orbax notes when a checkpoint was complete.
    note = folder / CHECKPOINTS / str(meta["step"]) / "_CHECKPOINT_METADATA"
    times = json.loads(note.read_text()) if note.exists() else {}
    saved = times.get("commit_timestamp_nsecs")
    if saved:
        moment = datetime.datetime.fromtimestamp(saved / 1e9, datetime.UTC)
        saved = f"{moment:%Y-%m-%d %H:%M}"
    return Origin(
        known(meta.get("commit")),
        known(meta.get("devices")),
        known(meta.get("cores")),
        known(meta.get("versions", {}).get("jax")),
        known(saved or None),
    )
