"""Seals: the checksums of every file in a folder, to find out what changed later."""

import hashlib
import json
import pathlib

from etils import epath

from experiments.paths import is_remote

SEAL = "sha256.json"


def close(folder: epath.Path) -> None:
    """Writes the seal of a folder whose files are complete.

    In a bucket it would have to read all of them back, and the store has checksums of
    its own.
    """
    if is_remote(folder):
        return
    temporary = folder / f"{SEAL}.tmp"
    temporary.write_text(json.dumps(_checksums(folder), indent=1))
    temporary.replace(folder / SEAL)


def verify(folder: epath.Path, part: str = "") -> None:
    """Raises ValueError naming the first file that is not as it was when sealed.

    A folder without a seal passes: its writer may have been killed just before.

    Args:
      folder: sealed by `close`.
      part: a folder in it, to look at no other; "" for all of it.
    """
    if is_remote(folder) or not (folder / SEAL).exists():
        return
    sealed, found = json.loads((folder / SEAL).read_text()), _checksums(folder, part)
    for name, digest in sealed.items():
        if part and not name.startswith(f"{part}/"):
            continue
        if name not in found:
            raise ValueError(f"{name} is missing")
        if found[name] != digest:
            raise ValueError(f"{name} has changed since it was written")


def _checksums(path: epath.Path, part: str = "") -> dict[str, str]:
    sums, folder = {}, pathlib.Path(path)  # which walks, as epath would not in a bucket
    for file in sorted((folder / part).rglob("*")):
        if file.is_file() and file.name != SEAL:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            sums[file.relative_to(folder).as_posix()] = digest
    return sums
