"""Tiny Shakespeare: 40,000 lines of Shakespeare's plays, shipped with the project.

Prepared by TFDS as array_record, from the text beside this file: no download, no
TensorFlow. Collected by Andrej Karpathy for char-rnn; the text is in the public domain.
"""

import functools
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from experiments.data import builders

TEXT = pathlib.Path(__file__).parent / "texts" / "tiny_shakespeare.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SIZE = 1_115_394  # bytes, all of them ASCII
ENDS = {"train": 1_003_854, "validation": 1_059_624, "test": SIZE}  # 90, 5, 5 %


def read_text(path: pathlib.Path) -> bytes:
    """The whole text, or ValueError where a byte of it is missing or changed."""
    text = path.read_bytes()
    found = hashlib.sha256(text).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{path} is not the Tiny Shakespeare text: {len(text):,} bytes with sha256 "
            f"{found}, expected {SIZE:,} bytes with sha256 {SHA256}; restore the file "
            "from the repository (and keep line endings as they are)"
        )
    return text


def split_text(text: bytes) -> dict[str, bytes]:
    """Cuts the text in order into train, validation and test."""
    parts, start = {}, 0
    for name, end in ENDS.items():
        parts[name], start = text[start:end], end
    return parts


# Not "tiny_shakespeare": TFDS has a builder of that name, which downloads, and whose
# prepared files in the same data_dir would be taken for ours.
class TinyShakespeare(tfds.core.GeneratorBasedBuilder):
    """Tiny Shakespeare as bytes: one example per split, `{"text": bytes}`."""

    name = "tiny_shakespeare_bytes"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            homepage="https://github.com/karpathy/char-rnn",
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[str, dict[str, bytes]]]]:
        del dl_manager  # the text is here
        parts = split_text(read_text(TEXT))
        return {name: self._generate_examples(part) for name, part in parts.items()}

    def _generate_examples(self, text: bytes) -> Iterator[tuple[str, dict[str, bytes]]]:
        yield "text", {"text": text}


def prepare(data_dir: str | None = None) -> tfds.core.DatasetBuilder:
    """The builder with its data on disk, written now unless it was there.

    Args:
      data_dir: where TFDS keeps its data; None means `$TFDS_DATA_DIR`, or
        `~/tensorflow_datasets`.
    Raises:
      ValueError: the shipped text is not whole.
      OSError: the data cannot be written.
    """
    # Quiet: TFDS would announce a download and draw a bar for each of three examples.
    opened = functools.partial(TinyShakespeare, data_dir=data_dir)
    return builders.write(opened, quiet=True)


def load(split: str, data_dir: str | None = None) -> UInt8[np.ndarray, " N"]:
    """The bytes of "train", "validation" or "test", prepared first where needed.

    Args:
      split: one of the three.
      data_dir: as in `prepare`.
    Returns:
      [N] uint8, read-only.
    Raises:
      ValueError: no such split, or as in `prepare`.
    """
    if split not in ENDS:
        raise ValueError(f"no split {split!r}; tiny_shakespeare has {', '.join(ENDS)}")
    builder: Any = prepare(data_dir)  # decorators of TFDS hide the method's parameters
    (example,) = builder.as_data_source(split)
    return np.frombuffer(example["text"], np.uint8)
