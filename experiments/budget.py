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
      disk: what a run writes down of theta: a base of its journal, and a second one
        while that is compacted.
    """

    parameters: int
    positions: int
    moments: int
    step: int
    refresh: int
    theta: int
    work: int
    disk: int = 0

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
      disk: free space for the journal; None where nothing is written down.
    """

    device: int | None
    host: int
    files: int | None
    held: int = 0
    disk: int | None = None


def budget(
    dense: PyTree, theta: PyTree, opt_state: PyTree, step: int, reservoir: bool = True
) -> Budget:
    """From shapes alone; of one device and one process, if these are what they hold.

    Args:
      dense: shapes of the dense parameters.
      theta, opt_state: from `tk.shapes`.
      step: bytes of the compiled step; 0: not known.
      reservoir: whether theta is kept.
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
    largest = max(whole.size for whole, _ in sparse) if reservoir else 0
    slot = 4 * max(kept.size for _, kept in sparse)
    whole = size_of([whole for whole, _ in sparse]) if reservoir else 0
    return Budget(
        parameters,
        positions,
        moments,
        step,
        2 * (parameters + positions) + 3 * moments + 4 * slot,
        whole,
        3 * parameters + 36 * sum(x.size for x in places) + 5 * 4 * largest,
    )


def size_of(tree: PyTree) -> int:
    """Bytes of all arrays, or of their shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def room(files: str | None, journal: str | None = None) -> Room:
    """What this machine has.

    Args:
      files: folder of a mapped theta; what lies there will be replaced.
      journal: folder in which theta is written down.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    device = None if jax.default_backend() == "cpu" else stats.get("bytes_limit")
    return Room(device, _host(), _disk(files), _held(), _disk(journal))


def _disk(folder: str | None) -> int | None:
    """Free space where a folder is or will be, with what its files hold."""
    if folder is None:
        return None
    path = pathlib.Path(folder).absolute()
    held = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free + held


ADVICE = (
    "make the model smaller or the network sparser, or choose a method without theta"
)


def require(need: Budget, there: Room, advice: str = ADVICE) -> None:
    """Checks a budget.

    Args:
      need: from `budget`.
      there: from `room`.
      advice: what to do where something does not fit.
    Raises:
      ValueError: something does not fit; it is named, with what is there.
    """
    host = need.work + (need.theta if there.files is None else 0)
    checks = [("host memory", host, there.host), ("files", need.theta, there.files)]
    if there.device is None:  # one memory for both
        checks[0] = ("memory, device and host in one", host + need.device, there.host)
    else:
        checks.append(("device memory", need.device, there.device))
    mapped = need.theta if there.files is not None else 0
    checks.append(("disk", need.disk + mapped, there.disk))
    for name, needed, found in checks:
        if found is not None and needed > found:
            raise ValueError(
                f"{name}: {size(needed)} are needed, and {size(found)} are there; "
                f"{advice}"
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
        ("host: in a refresh, beside it", need.work, there.host),
        ("host: held by the process already", there.held, None),
        ("disk: journal, at most", need.disk, there.disk),
    ]
    told = [
        f"  {name:<34}{size(needed):>13}"
        + ("" if found is None else f"   of {size(found)}")
        for name, needed, found in lines
        if needed  # what is not known, or not there, has no line
    ]
    if same:
        told.append("  the device is the host: one memory for both")
    return "\n".join(told)


def size(number: float) -> str:
    """Bytes as they are printed."""
    unit, of = ("GiB", 2**30) if number >= 2**30 else ("MiB", 2**20)
    return f"{number / of:,.2f} {unit}"


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
