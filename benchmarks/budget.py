"""What a training with theta on the host takes, against what is there."""

import pathlib
import shutil
from typing import Any, NamedTuple

import jax

import topkast_jax as tk

PyTree = Any


class Budget(NamedTuple):
    """Bytes, all told before anything is made.

    Attributes:
      parameters: B, and what is dense.
      positions: of the units of B.
      moments: state of the optimizer, float32 copies of small parameters included.
      step: the most that a training step holds, by XLA's analysis: these three,
        gradients, activations and what else XLA plans.
      refresh: the most that the device holds at a refresh: the old arrays, the new ones,
        fresh moments, and four copies of the largest moment while it is moved.
      theta: the reservoir.
      work: what a refresh holds on the host beside it: copies of B, sets of units, and
        one parameter at a time in float32.
    """

    parameters: int
    positions: int
    moments: int
    step: int
    refresh: int
    theta: int
    work: int

    @property
    def device(self) -> int:
        """The most that the device holds."""
        return max(self.step, self.refresh)


class Room(NamedTuple):
    """Bytes that are there.

    Attributes:
      device: None where the device has the memory of the host.
      host: free memory.
      files: free space for a mapped theta; None where theta is in memory.
      held: what this process holds already: Python, JAX, compiled programs.
    """

    device: int | None
    host: int
    files: int | None
    held: int = 0


def budget(dense: PyTree, theta: PyTree, opt_state: PyTree, step: int) -> Budget:
    """From shapes alone.

    Args:
      dense: shapes of the dense parameters.
      theta, opt_state: from `tk.shapes`.
      step: bytes of the compiled step.
    """
    forward = tk.masks(opt_state).forward
    places = jax.tree.leaves(forward)
    parameters, positions = size_of(theta), size_of(forward)
    moments = size_of(opt_state) - positions
    sparse = [
        (whole, kept)
        for whole, kept, index in zip(
            jax.tree.leaves(dense),
            jax.tree.leaves(theta),
            jax.tree.structure(theta).flatten_up_to(forward),
            strict=True,
        )
        if index is not None
    ]
    largest = max(whole.size for whole, _ in sparse)
    slot = 4 * max(kept.size for _, kept in sparse)
    return Budget(
        parameters,
        positions,
        moments,
        step,
        2 * (parameters + positions) + 3 * moments + 4 * slot,
        size_of([whole for whole, _ in sparse]),
        3 * parameters + 36 * sum(x.size for x in places) + 5 * 4 * largest,
    )


def size_of(tree: PyTree) -> int:
    """Bytes of all arrays, or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def room(files: str | None) -> Room:
    """What this machine has; `files` is the folder of a mapped theta."""
    stats = jax.devices()[0].memory_stats() or {}
    device = None if jax.default_backend() == "cpu" else stats.get("bytes_limit")
    free = None
    if files is not None:
        folder = pathlib.Path(files).absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
    return Room(device, _host(), free, _held())


def require(need: Budget, there: Room) -> None:
    """Checks a budget.

    Raises:
      ValueError: something does not fit; it is named, with what is there.
    """
    host = need.work + (need.theta if there.files is None else 0)
    checks = [("host memory", host, there.host), ("files", need.theta, there.files)]
    if there.device is None:  # one memory for both
        checks[0] = ("memory, device and host in one", host + need.device, there.host)
    else:
        checks.append(("device memory", need.device, there.device))
    for name, needed, found in checks:
        if found is not None and needed > found:
            raise ValueError(
                f"{name}: {gib(needed)} GiB are needed, and {gib(found)} GiB are there; "
                "take fewer layers, a larger sparsity, --theta=bfloat16, or map theta "
                "into files with --reservoir=FOLDER"
            )


def table(need: Budget, there: Room) -> str:
    """Lines of the budget."""
    same = there.device is None
    lines = [
        ("device: parameters", need.parameters, None),
        ("device: positions", need.positions, None),
        ("device: optimizer state", need.moments, None),
        ("device: in a step, at most", need.step, there.device),
        ("device: in a refresh, at most", need.refresh, there.device),
        ("host: theta", need.theta, there.host if there.files is None else there.files),
        ("host: in a refresh, beside it", need.work, None),
        ("host: held by the process already", there.held, None),
    ]
    told = [
        f"  {name:<34}{gib(needed):>9} GiB"
        + ("" if found is None else f"   of {gib(found)}")
        for name, needed, found in lines
    ]
    if same:
        told.append("  the device is the host: one memory for both")
    return "\n".join(told)


def gib(number: float) -> str:
    """As it is printed."""
    return f"{number / 2**30:.2f}"


def _host() -> int:
    """Free memory, within what a container may take."""
    fields = dict(
        line.split(":")
        for line in pathlib.Path("/proc/meminfo").read_text().splitlines()
    )
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:
        return free
    return free if most == "max" else min(free, int(most) - used)


def _held() -> int:
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line[:5] == "VmRSS")
