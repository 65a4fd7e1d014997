"""The reservoir: theta in host memory, or in files that the system maps into it."""

import dataclasses
import json
import math
import os
import pathlib
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.layouts import share

NAMES = "reservoir.json"
Folder = str | os.PathLike[str]
Own = dict[str, tuple[np.ndarray, int]]
"""By path: numbers of slices, ascending, and how many there are in all."""


@dataclasses.dataclass(frozen=True)
class Store:
    """theta of every sparse parameter, on the host; empty without a reservoir.

    `tk.refresh` writes into the arrays. Between two refreshes the entries of B are out
    of date: their values are on the device. Of several processes each has a store of
    its own, with the slices that its devices hold.

    Attributes:
      theta: by path, [slices, units, *unit].
      folder: where the arrays are mapped from; None where they are in memory.
      journal: a `tk.Journal` that is told of every refresh; None keeps none.
      own: by path, numbers of the slices, and how many the parameter has; only where
        other processes hold some of them.
    """

    theta: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    folder: pathlib.Path | None = None
    journal: Any = None
    own: Own = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        return sum(x.nbytes for x in self.theta.values())

    def save(self, folder: Folder) -> None:
        """Writes all arrays to a new folder, which appears whole or not at all.

        Raises:
          OSError: the folder is there and not empty.
        """
        folder = pathlib.Path(folder)
        temporary = folder.with_name(f"{folder.name}.tmp")
        created = create(temporary)
        for path, values in self.theta.items():
            add(created, path, values, self.own.get(path))
        created.seal()
        os.replace(temporary, folder)

    def seal(self) -> None:
        """Brings mapped files to disk, and notes their checksums for `load`."""
        if self.folder is None:
            return
        for values in self.theta.values():
            if isinstance(values, np.memmap):
                values.flush()
        _write_names(self, self.folder, sealed=True)

    def slices(self, path: str) -> tuple[np.ndarray, int]:
        """Numbers of the slices of a parameter that are here, and how many there are."""
        count = len(self.theta[path])
        return self.own.get(path, (np.arange(count), count))

    def array(
        self, path: str, shape: tuple[int, ...], own: tuple[np.ndarray, int]
    ) -> np.ndarray:
        """The array of a parameter.

        Args:
          path: of the parameter.
          shape: that it must have.
          own: numbers of its slices, and how many the parameter has.
        Raises:
          ValueError: there is none, or it has another shape: another model's; or it has
            other slices.
        """
        if path in self.theta:
            here, count = self.slices(path)
            if count == own[1] and not np.array_equal(here, own[0]):
                raise ValueError(
                    f"the reservoir has slices {share.runs(here)} of {count} of "
                    f"{path!r}, and the devices of this process hold "
                    f"{share.runs(own[0])}: it was written on another mesh or by "
                    "another process; tk.Journal.load(..., own=...) puts it together"
                )
        found = self.theta.get(path)
        if found is None or found.shape != shape:
            has = "nothing" if found is None else f"an array of {found.shape}"
            raise ValueError(
                f"the reservoir{f' in {self.folder}' if self.folder else ''} has {has} "
                f"for {path!r}, and the model needs {shape}: it is another model's"
            )
        return found


def of_process(folder: Folder) -> pathlib.Path:
    """The folder itself, or one of this process inside it where there are several."""
    folder, count = pathlib.Path(folder), jax.process_count()
    if count == 1:
        return folder
    return folder / f"process-{jax.process_index():04}-of-{count:04}"


def create(folder: Folder | None) -> Store:
    """An empty store, in memory or in a folder that is made, or emptied of one."""
    if folder is None:
        return Store()
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in (folder / NAMES, *folder.glob("*.bin")):
        file.unlink(missing_ok=True)
    store = Store({}, folder)
    _write_names(store, folder)
    return store


def add(
    store: Store,
    path: str,
    values: np.ndarray,
    own: tuple[np.ndarray, int] | None = None,
) -> np.ndarray:
    """Copies an array into a store, and returns the store's own."""
    if own is not None and len(own[0]) < own[1]:
        store.own[path] = own
    if store.folder is None:
        store.theta[path] = np.array(values)
        return store.theta[path]
    file = store.folder / f"{len(store.theta)}.bin"
    mapped = np.memmap(file, np.uint8, "w+", shape=(values.nbytes,))
    array = mapped.view(values.dtype).reshape(values.shape)
    array[...] = values
    mapped.flush()
    store.theta[path] = array
    _write_names(store, store.folder)
    return array


def _write_names(store: Store, folder: pathlib.Path, sealed: bool = False) -> None:
    names: dict[str, list[Any]] = {
        name: [f"{i}.bin", str(x.dtype), list(x.shape)]
        for i, (name, x) in enumerate(store.theta.items())
    }
    for name, (slices, count) in store.own.items():
        names[name].append({"slices": share.runs(slices), "of": count})
    for name, x in store.theta.items() if sealed else ():
        names[name].append(_checksum(x))
    (folder / NAMES).write_text(json.dumps(names))


def load(folder: Folder, mapped: bool = False) -> Store:
    """Reads what `Store.save` or `tk.start(..., reservoir=folder)` wrote.

    Args:
      folder: of the reservoir.
      mapped: whether the files stay the place where theta lives; else they are read.
    Raises:
      ValueError: not a reservoir, or a file that is missing or cut short, by name.
    """
    folder = pathlib.Path(folder)
    store = Store({}, folder if mapped else None)
    for path, entry in read_names(folder).items():
        file, size = folder / entry.file, math.prod(entry.shape) * entry.dtype.itemsize
        there = file.stat().st_size if file.exists() else 0
        if there != size:
            raise ValueError(
                f"{file}, the reservoir of {path!r}, has {there} bytes instead of {size}: "
                "it is missing or cut short"
            )
        raw = np.memmap(file, np.uint8, "r+") if mapped else np.fromfile(file, np.uint8)
        if entry.checksum is not None and _checksum(raw) != entry.checksum:
            raise ValueError(f"{file}, the reservoir of {path!r}, has changed on disk")
        store.theta[path] = raw.view(entry.dtype).reshape(entry.shape)
        if len(entry.own[0]) < entry.own[1]:
            store.own[path] = entry.own
    if mapped:
        _write_names(store, folder)  # from now on the files change
    return store


class Entry(NamedTuple):
    """What the folder of a store says of one parameter.

    Attributes:
      file: name of its file.
      dtype, shape: of its array.
      own: numbers of the slices, and how many the parameter has.
      checksum: of the file, where it is sealed.
    """

    file: str
    dtype: Any
    shape: tuple[int, ...]
    own: tuple[np.ndarray, int]
    checksum: int | None


def read_names(folder: pathlib.Path) -> dict[str, Entry]:
    """What lies in the folder of a store, by path; no array is read.

    Raises:
      ValueError: it is not one.
    """
    try:
        names = json.loads((folder / NAMES).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no reservoir: {error}") from error
    found = {}
    for path, (file, kind, shape, *rest) in names.items():
        own = np.arange(shape[0]), shape[0]
        if rest and isinstance(rest[0], dict):
            own = _own(folder, path, rest.pop(0), shape[0])
        checksum = rest[0] if rest else None
        found[path] = Entry(file, jnp.dtype(kind), tuple(shape), own, checksum)
    return found


def _own(
    folder: pathlib.Path, path: str, said: dict[str, Any], rows: int
) -> tuple[np.ndarray, int]:
    ranges = [np.arange(begin, end) for begin, end in said["slices"]]
    slices = np.concatenate([np.zeros(0, np.int64), *ranges])
    if (
        len(slices) != rows
        or not (np.diff(slices) > 0).all()
        or slices[-1] >= said["of"]
    ):
        raise ValueError(
            f"{folder / NAMES} says that {path!r} has slices {said['slices']} of "
            f"{said['of']}, and its array has {rows}"
        )
    return slices, said["of"]


def _checksum(values: np.ndarray) -> int:
    return zlib.crc32(values.reshape(-1).view(np.uint8).data)
