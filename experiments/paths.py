"""Folders that may lie in a bucket: gs://bucket/run works as runs/run does.

`etils.epath` reads and writes both. What object stores cannot do is known here: they have
no appending, and no files that are mapped into memory.
"""

import os
import pathlib
from typing import Any

from etils import epath


def folder(path: str | os.PathLike[str]) -> epath.Path:
    """A path, with its scheme if it has one; `pathlib` would read gs:// as a folder."""
    return epath.Path(path)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path names an object in a store, as in gs://bucket/run."""
    return "://" in os.fspath(path)


def local(path: str | os.PathLike[str], name: str, why: str) -> pathlib.Path:
    """A path on this machine.

    Args:
      path: as the user gave it.
      name: of the flag that it was given as.
      why: it cannot lie in a bucket, and what to do; the end of a sentence.
    Raises:
      ValueError: it names an object in a store.
    """
    if is_remote(path):
        raise ValueError(f"{name}={os.fspath(path)}: {why}")
    return pathlib.Path(path)


def whole(path: epath.Path) -> epath.Path:
    """The same path from the root; that of a bucket is whole."""
    return path if is_remote(path) else epath.Path(os.path.abspath(path))


class Lines:
    """A text file that grows by lines, all of which are there after each.

    Args:
      path: where.
      text: what is in it now; it is written, in one piece.
    """

    def __init__(self, path: epath.Path, text: str) -> None:
        self._path, self._text = path, text
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(text)
        temporary.replace(path)
        self._file: Any = None if is_remote(path) else path.open("a")

    def add(self, line: str) -> None:
        """Writes a line; a bucket gets the whole file, which runs keep small."""
        if self._file is not None:
            self._file.write(f"{line}\n")
            self._file.flush()
            return
        self._text += f"{line}\n"
        self._path.write_text(self._text)

    def close(self) -> None:
        """Nothing more is to come."""
        if self._file is not None:
            self._file.close()
