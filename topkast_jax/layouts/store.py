"""The reservoir: theta in host memory, or in files that the system maps into it."""

import dataclasses
import json
import math
import os
import pathlib
import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np

NAMES = "reservoir.json"
Folder = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Store:
    """theta of every sparse parameter, on the host; empty without a reservoir.

    `tk.refresh` writes into the arrays. Between two refreshes the entries of B are out
    of date: their values are on the device.

    Attributes:
      theta: by path, [slices, units, *unit].
      folder: where the arrays are mapped from; None where they are in memory.
      journal: a `tk.Journal` that is told of every refresh; None keeps none.
    """

    theta: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    folder: pathlib.Path | None = None
    journal: Any = None

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
            add(created, path, values)
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

    def array(self, path: str, shape: tuple[int, ...]) -> np.ndarray:
        """The array of a parameter.

        Raises:
          ValueError: there is none, or it has another shape: another model's.
        """
        found = self.theta.get(path)
        if found is None or found.shape != shape:
            has = "nothing" if found is None else f"an array of {found.shape}"
            raise ValueError(
                f"the reservoir{f' in {self.folder}' if self.folder else ''} has {has} "
                f"for {path!r}, and the model needs {shape}: it is another model's"
            )
        return found


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


def add(store: Store, path: str, values: np.ndarray) -> np.ndarray:
    """Copies an array into a store, and returns the store's own."""
    if store.folder is None:
        store.theta[path] = np.array(values)
        return store.theta[path]
    file = store.folder / f"{len(store.theta)}.bin"
    mapped = np.memmap(file, np.uint8, "w+", shape=(values.nbytes,))
    own = mapped.view(values.dtype).reshape(values.shape)
    own[...] = values
    mapped.flush()
    store.theta[path] = own
    _write_names(store, store.folder)
    return own


def _write_names(store: Store, folder: pathlib.Path, sealed: bool = False) -> None:
    names: dict[str, list[Any]] = {
        name: [f"{i}.bin", str(x.dtype), list(x.shape)]
        for i, (name, x) in enumerate(store.theta.items())
    }
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
    try:
        names = json.loads((folder / NAMES).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no reservoir: {error}") from error
    theta: dict[str, np.ndarray] = {}
    for path, (name, kind, shape, *sums) in names.items():
        dtype: Any = jnp.dtype(kind)
        file, size = folder / name, math.prod(shape) * dtype.itemsize
        there = file.stat().st_size if file.exists() else 0
        if there != size:
            raise ValueError(
                f"{file}, the reservoir of {path!r}, has {there} bytes instead of {size}: "
                "it is missing or cut short"
            )
        raw = np.memmap(file, np.uint8, "r+") if mapped else np.fromfile(file, np.uint8)
        if sums and _checksum(raw) != sums[0]:
            raise ValueError(f"{file}, the reservoir of {path!r}, has changed on disk")
        theta[path] = raw.view(dtype).reshape(shape)
    store = Store(theta, folder if mapped else None)
    if mapped:
        _write_names(store, folder)  # from now on the files change
    return store


def _checksum(values: np.ndarray) -> int:
    return zlib.crc32(values.reshape(-1).view(np.uint8).data)
