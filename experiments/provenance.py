"""Where a checkpoint comes from, and whether a run may go on from it."""

import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax

from experiments.config import Config, as_json, differences

PACKAGES = (
    "topkast_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
)
# Keys that may change when a run goes on: they do not touch what is computed, or, like
# the mesh, only its rounding.
MAY_CHANGE = frozenset(
    [
        "name",
        "data_dir",
        "data.data_dir",
        "data.threads",
        "data.workers",
        "compilation_cache",
        "profile",
        "log_every",
        "eval_every",
        "eval_batches",
        "save_every",
        "keep",
        "on_nan",
        "dense_steps",
        "mesh",
        "sharding",
    ]
)

LAYOUT = frozenset(["sparse.layout", "sparse.reservoir"])
"""Where the state lives: a checkpoint moves from one layout to another."""


def provenance(config: Config) -> dict[str, Any]:
    """Config, versions, hardware and, where there is one, the commit: JSON data."""
    device = jax.devices()[0]
    return {
        "config": as_json(config),
        "commit": _commit(),
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": f"{jax.local_device_count()} x {device.device_kind}",
        "cores": os.cpu_count(),
    }


def require_same_config(
    workdir: Any, saved: Mapping[str, Any], given: Mapping[str, Any]
) -> list[str]:
    """Says what else changed; raises ValueError if a run computes other things now.

    Args:
      workdir: for the message.
      saved: config of the checkpoint, as JSON data.
      given: config of this run, as JSON data.
    Returns:
      A line for every key of `MAY_CHANGE` and `LAYOUT` that differs.
    """
    changed: list[str] = []
    harmless: list[str] = []
    for path, (before, now) in differences(saved, given).items():
        may = {path, path.split(".")[0]} & (MAY_CHANGE | LAYOUT)
        lines = harmless if may else changed
        lines.append(f"{path} was {before!r}, is {now!r}")
    if changed:
        raise ValueError(
            f"{workdir} holds a run of another config: {'; '.join(changed)}. Give it "
            "that config, or name another --workdir"
        )
    return harmless


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout
        return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    here = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None
