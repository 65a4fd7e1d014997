"""Seals: the checksums of every file in a folder, to find out what changed later."""

import hashlib
import json
import os
import pathlib

SEAL = "sha256.json"


def close(folder: pathlib.Path) -> None:
    """Writes the seal of a folder whose files are complete."""
    temporary = folder / f"{SEAL}.tmp"
    temporary.write_text(json.dumps(_checksums(folder), indent=1))
    os.replace(temporary, folder / SEAL)


def verify(folder: pathlib.Path, part: str = "") -> None:
    """Raises ValueError naming the first file that is not as it was when sealed.

    A folder without a seal passes: its writer may have been killed just before.

    Args:
      folder: sealed by `close`.
      part: a folder in it, to look at no other; "" for all of it.
    """
    if not (folder / SEAL).exists():
        return
    sealed, found = json.loads((folder / SEAL).read_text()), _checksums(folder, part)
    for name, digest in sealed.items():
        if part and not name.startswith(f"{part}/"):
            continue
        if name not in found:
            raise ValueError(f"{name} is missing")
        if found[name] != digest:
            raise ValueError(f"{name} has changed since it was written")


def _checksums(folder: pathlib.Path, part: str = "") -> dict[str, str]:
    sums = {}
    for file in sorted((folder / part).rglob("*")):
        if file.is_file() and file.name != SEAL:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            sums[file.relative_to(folder).as_posix()] = digest
    return sums
