"""Files that a user puts in place: found, whole, and the right ones, or an error."""

import contextlib
import errno
import hashlib
import pathlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import tqdm

BLOCK = 1 << 20  # bytes
SLOW = 1 << 30  # bytes from which on hashing takes seconds


class Known(NamedTuple):
    """What is published of a file: size in bytes (None: not) and digest of its content."""

    size: int | None
    digest: str
    algorithm: str = "sha256"


def check(path: pathlib.Path, known: Known) -> None:
    """Returns where the file is the published one.

    Args:
      path: a file that exists.
      known: what it must be.
    Raises:
      ValueError: it is cut off, too long, or has other content.
    """
    found = path.stat().st_size
    if known.size is not None and found != known.size:
        kind = "it is cut off" if found < known.size else "it is another file"
        raise ValueError(
            f"{path} has {found:,} bytes, expected {known.size:,}: {kind}; get it again"
        )
    require_digest(path, digest(path, known.algorithm), known)


def require_digest(path: pathlib.Path, found: str, known: Known) -> None:
    """Raises ValueError where a digest is not the one that is known."""
    if found != known.digest:
        raise ValueError(
            f"{path} is damaged or another file: its {known.algorithm} is {found}, "
            f"expected {known.digest}; get it again"
        )


def digest(path: pathlib.Path, algorithm: str) -> str:
    """Hexadecimal digest of a file; large ones show how far it is."""
    with path.open("rb") as file:
        return digest_of(file, algorithm, path.stat().st_size, path.name)


def digest_of(file: BinaryIO, algorithm: str, total: int, name: str = "") -> str:
    """Hexadecimal digest of the next `total` bytes of a file."""
    made = hashlib.new(algorithm)
    with tqdm.tqdm(
        total=total,
        desc=f"{algorithm} of {name}",
        unit="B",
        unit_scale=True,
        disable=total < SLOW,
    ) as bar:
        for block in blocks(file, total):
            made.update(block)
            bar.update(len(block))
    return made.hexdigest()


def blocks(file: BinaryIO, total: int, size: int = BLOCK) -> Iterator[bytes]:
    """The next `total` bytes of a file, or as many as there are, in blocks."""
    while total > 0 and (block := file.read(min(size, total))):
        yield block
        total -= len(block)


@contextlib.contextmanager
def unzipping(path: pathlib.Path) -> Iterator[None]:
    """Within it a zip archive is read, and nothing else is done.

    Raises:
      ValueError: it is cut off or damaged.
      OSError: the disk says so.
    """
    try:
        yield
    except Exception as error:  # one changed byte leads zipfile to eight kinds of them
        # A place before the file's begin, and what bz2 says, are no failure of the disk.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        why = error.args[0] if error.args else type(error).__name__
        raise ValueError(
            f"{path} is cut off or damaged ({why}); get it again"
        ) from error


@contextlib.contextmanager
def discarded_if_wrong(path: pathlib.Path) -> Iterator[None]:
    """Removes a downloaded file that a check within refuses: TFDS would keep it."""
    try:
        yield
    except ValueError as error:
        path.unlink()
        path.with_name(f"{path.name}.INFO").unlink(missing_ok=True)  # TFDS' notes
        raise ValueError(
            f"{error}: it is thrown away, and the same command downloads it anew"
        ) from error


def first_of(folder: str, names: tuple[str, ...], source: str) -> pathlib.Path:
    """The first of some files that a folder has.

    Args:
      folder: where the user put them.
      names: that the file may have.
      source: where to get it, the end of a sentence.
    Raises:
      ValueError: it has none of them.
    """
    root = pathlib.Path(folder).expanduser()
    if not root.is_dir():
        raise ValueError(
            f"the folder {root} does not exist; make it and put there {source}"
        )
    for name in names:
        if (root / name).is_file():
            return root / name
    raise ValueError(f"{root} has no {' and no '.join(names)}; put there {source}")
