"""The reservoir that several processes wrote, put together for other ones."""

import pathlib
import re
from collections.abc import Callable, Mapping

import numpy as np

from topkast_jax.layouts import share
from topkast_jax.layouts import store as stores
from topkast_jax.layouts.store import Entry, Folder, Own, Store

Part = tuple[Mapping[str, Entry], Callable[[], Store]]
"""What a process wrote: what there is of each parameter, and how to read it."""
_FOLDER = re.compile(r"process-(\d+)-of-(\d+)")


def folders(parent: pathlib.Path) -> list[pathlib.Path]:
    """Folders of the processes that wrote here; none where one process wrote alone.

    Raises:
      ValueError: one is missing, or there are those of several runs.
    """
    found = {
        f: match
        for f in sorted(parent.glob("process-*"))
        if (match := _FOLDER.fullmatch(f.name))
    }
    counts = {int(match[2]) for match in found.values()}
    if len(counts) > 1:
        raise ValueError(
            f"{parent} was written by {sorted(counts)} processes: by which?"
        )
    there = {int(match[1]) for match in found.values()}
    missing = set(range(max(counts, default=0))) - there
    if missing:
        raise ValueError(
            f"{parent} was written by {max(counts)} processes, and that of process "
            f"{min(missing)} is not there: all must write to one file system, or go on "
            "as they were"
        )
    return list(found)


def gather(parts: list[Part], own: Own, folder: Folder | None = None) -> Store:
    """A store of some slices, out of what several processes wrote, one after another.

    Args:
      parts: of the processes.
      own: the slices that are wanted; a parameter that is left out is wanted whole.
      folder: of files in which they are to live; None: in memory.
    Raises:
      ValueError: nobody wrote a slice that is wanted, by name.
    """
    store = stores.create(folder)
    missing: dict[str, np.ndarray] = {}
    for names, _ in parts:
        for path, entry in names.items():
            if path in store.theta:
                continue
            count = entry.own[1]
            wanted = own.get(path, (np.arange(count), count))
            if wanted[1] != count:
                raise ValueError(
                    f"the reservoir of {path!r} has {count} slices, and {wanted[1]} are "
                    "expected: it is another model's"
                )
            missing[path] = np.ones(len(wanted[0]), bool)
            stores.add(
                store,
                path,
                np.empty((len(wanted[0]), *entry.shape[1:]), entry.dtype),
                wanted,
            )
    for names, read in parts:
        places = {
            path: np.intersect1d(
                store.slices(path)[0][missing[path]], entry.own[0], assume_unique=True
            )
            for path, entry in names.items()
        }
        if not any(map(len, places.values())):
            continue
        found = read()
        for path, slices in places.items():
            at = np.searchsorted(store.slices(path)[0], slices)
            there = np.searchsorted(names[path].own[0], slices)
            store.theta[path][at] = found.theta[path][there]
            missing[path][at] = False
    for path, without in missing.items():
        if without.any():
            slices, count = store.slices(path)
            raise ValueError(
                f"nobody wrote slices {share.runs(slices[without])} of {count} of the "
                f"reservoir of {path!r}"
            )
    return store
