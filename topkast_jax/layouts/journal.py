"""The reservoir on disk: a base, and a record of every refresh since.

What is off B changes at a refresh alone, and there only where units leave B. So a record
holds those units with their last values, and a checkpoint needs no more of the reservoir
than the number of records at its time.
"""

import copy
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from topkast_jax.layouts import gather
from topkast_jax.layouts import store as stores
from topkast_jax.layouts.store import Folder, Own, Store

Left = dict[str, tuple[np.ndarray, np.ndarray]]
"""By path: units that left B (own slice * units + number), and their values."""
_BASE, _RECORD, _DIGITS = "base-", "record-", 8


class Journal:
    """A folder of bases (`base-<records>/`) and records (`record-<number>.bin`).

    Everything appears whole or not at all: a process that is killed loses what it was
    writing, and nothing else. Of several processes each writes what it owns, to a folder
    of its own inside.

    Args:
      folder: where they lie.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = pathlib.Path(folder)
        self._here = stores.of_process(folder)
        self.records = max([0, *self._numbers(_RECORD), *self._numbers(_BASE)])
        self._compaction: Future[None] | None = None

    def begin(self, store: Store) -> None:
        """Writes the first base, and empties the folder of all else.

        The other processes begin theirs at the same time, and nobody touches those.
        """
        self.wait()
        if jax.process_index() == 0 and self.folder.exists():
            kept = f"process-*-of-{jax.process_count():04}"
            for file in self.folder.iterdir():
                if file == self._here or not file.match(kept):
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
        shutil.rmtree(self._here, ignore_errors=True)
        self._here.mkdir(parents=True)
        self.records = 0
        store.save(self._base(0))

    def append(self, left: Left) -> None:
        """Writes the record of a refresh; returns when it is on disk."""
        names, parts = {}, []
        for path, (places, values) in left.items():
            names[path] = [len(places), str(values.dtype), list(values.shape[1:])]
            parts += [np.ascontiguousarray(places, np.int64), values]
        body = b"".join(part.tobytes() for part in parts)
        head = {"bytes": len(body), "crc32": zlib.crc32(body), "left": names}
        file = self._record(self.records + 1)
        temporary = file.with_suffix(".tmp")
        with temporary.open("wb") as stream:
            stream.write(json.dumps(head).encode() + b"\n" + body)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
        self.records += 1

    def load(
        self, records: int, mapped: Folder | None = None, own: Own | None = None
    ) -> Store:
        """The reservoir after a number of records.

        Args:
          records: of the checkpoint.
          mapped: folder of files in which theta is to live; None: in memory.
          own: `tk.own_slices` of the run that goes on; None: all that this process
            wrote, or else all that any did.
        Returns:
          A store. Its journal is this one where the same processes go on with the same
          slices; else it has none, and a new journal must be begun.
        Raises:
          ValueError: a base or a record that is missing, cut short or changed, by name.
        """
        if mapped is not None:
            mapped = stores.of_process(mapped)
        if self._here.is_dir() and self._numbers(_BASE):
            names = stores.read_names(self._base(self._base_for(records)))
            here = {k: e.own for k, e in names.items() if len(e.own[0]) < e.own[1]}
            if own is None or _same(here, own):
                return self._read(records, mapped)
        parts: list[gather.Part] = []
        for folder in gather.folders(self.folder) or [self.folder]:
            other = copy.copy(self)
            other._here = folder
            names = stores.read_names(other._base(other._base_for(records)))
            parts.append((names, functools.partial(other._read, records, None)))
        return gather.gather(parts, own or {}, mapped)

    def _read(self, records: int, mapped: Folder | None) -> Store:
        base = self._base_for(records)
        if mapped is None:
            store = stores.load(self._base(base))
        else:
            shutil.rmtree(mapped, ignore_errors=True)
            shutil.copytree(self._base(base), mapped)
            store = stores.load(mapped, mapped=True)
        for number in range(base + 1, records + 1):
            self._apply(number, store.theta)
        return dataclasses.replace(store, journal=self)

    def rewind(self, records: int) -> None:
        """Forgets what came after a number of records: a run goes on from there."""
        self.wait()
        for number in self._numbers(_RECORD):
            if number > records:
                self._record(number).unlink()
        for number in self._numbers(_BASE):
            if number > records:
                shutil.rmtree(self._base(number))
        for left in self._here.glob("*.tmp"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        self.records = records

    def tidy(self, oldest: int, share: float = 0.5) -> None:
        """Compacts in the background where it is worth it, and drops what is not needed.

        Args:
          oldest: records of the oldest checkpoint that is kept.
          share: records since the newest base that are worth a new one, in its bytes.
        """
        if self._compaction is not None and not self._compaction.done():
            return
        try:
            self.wait()
        except (OSError, ValueError) as error:  # the files it would replace are there
            warnings.warn(f"{self._here} was not compacted: {error}", stacklevel=2)
        records = self.records
        newest = self._base_for(records)
        since = sum(
            self._record(n).stat().st_size for n in range(newest + 1, records + 1)
        )
        size = sum(f.stat().st_size for f in self._base(newest).iterdir())

        def work() -> None:
            if since > share * size:
                self.compact(records)
            if min(self._numbers(_BASE)) <= oldest:
                self._drop_before(self._base_for(oldest))

        pool = ThreadPoolExecutor(1, thread_name_prefix="topkast-journal")
        self._compaction = pool.submit(work)
        pool.shutdown(wait=False)

    def compact(self, records: int) -> None:
        """Writes the base after a number of records, from the files alone."""
        base = self._base_for(records)
        if base == records:
            return
        target = self._base(records)
        temporary = target.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(self._base(base), temporary)
        store = stores.load(temporary, mapped=True)
        for number in range(base + 1, records + 1):
            self._apply(number, store.theta)
        store.seal()
        os.replace(temporary, target)

    def wait(self) -> None:
        """Returns when nothing runs in the background; raises what went wrong there."""
        if self._compaction is not None:
            self._compaction.result()
            self._compaction = None

    def _numbers(self, kind: str) -> list[int]:
        suffix = ".bin" if kind == _RECORD else ""
        found = [f for f in self._here.glob(f"{kind}*") if f.suffix == suffix]
        return sorted(int(f.stem.removeprefix(kind)) for f in found)

    def _base(self, records: int) -> pathlib.Path:
        return self._here / f"{_BASE}{records:0{_DIGITS}}"

    def _record(self, number: int) -> pathlib.Path:
        return self._here / f"{_RECORD}{number:0{_DIGITS}}.bin"

    def _base_for(self, records: int) -> int:
        fitting = [number for number in self._numbers(_BASE) if number <= records]
        if not fitting:
            raise ValueError(f"{self._here} has no base for record {records}")
        return max(fitting)

    def _drop_before(self, base: int) -> None:
        for number in self._numbers(_RECORD):
            if number <= base:
                self._record(number).unlink()
        for number in self._numbers(_BASE):
            if number < base:
                shutil.rmtree(self._base(number))

    def _apply(self, number: int, theta: dict[str, np.ndarray]) -> None:
        file = self._record(number)
        head, body = _read(file)
        start = 0
        for path, (count, kind, unit) in head["left"].items():
            dtype: Any = jnp.dtype(kind)
            places = np.frombuffer(body, np.int64, count, start)
            start += places.nbytes
            entries = count * int(np.prod(unit, dtype=int))
            values = np.frombuffer(body, np.uint8, entries * dtype.itemsize, start)
            start += values.nbytes
            whole = theta.get(path)
            if whole is None or whole.shape[2:] != tuple(unit):
                raise ValueError(f"{file} is of another model: it tells of {path!r}")
            flat = whole.reshape(-1, *unit)
            flat[places] = values.view(dtype).reshape(count, *unit)


def _same(one: Own, two: Own) -> bool:
    return one.keys() == two.keys() and all(
        one[path][1] == two[path][1] and np.array_equal(one[path][0], two[path][0])
        for path in one
    )


def _read(file: pathlib.Path) -> tuple[dict[str, Any], bytes]:
    """Head and body of a record.

    Raises:
      ValueError: it is missing, cut short or changed.
    """
    try:
        line, _, body = file.read_bytes().partition(b"\n")
        head = json.loads(line)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}, a record of the reservoir: {error}") from error
    if len(body) != head["bytes"]:
        raise ValueError(
            f"{file}, a record of the reservoir, has {len(body)} bytes instead of "
            f"{head['bytes']}: it is cut short"
        )
    if zlib.crc32(body) != head["crc32"]:
        raise ValueError(f"{file}, a record of the reservoir, has changed")
    return head, body
