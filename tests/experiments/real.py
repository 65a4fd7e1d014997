"""Real files that lie beside the checkout, in ../shared/data, where there are any."""

import lzma
import pathlib

import pytest
from runs import ROOT

FOLDER = ROOT.parent / "shared" / "data"


def path(name: str) -> pathlib.Path:
    """A file of `FOLDER`; without it the test that asks for it is skipped."""
    if not (FOLDER / name).exists():
        pytest.skip(f"the real bytes are not here: no ../shared/data/{name}")
    return FOLDER / name


def unpacked(name: str) -> bytes:
    """What a file of `FOLDER` holds, packed as .xz."""
    return lzma.decompress(path(name).read_bytes())
