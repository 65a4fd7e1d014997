"""enwik8: the first 10^8 bytes of a dump of the English Wikipedia, as bytes.

Marcus Hutter's prize text, split 90M / 5M / 5M as in Transformer-XL (arXiv:1901.02860)
and before. Prepared by TFDS as array_record, without TensorFlow.

`enwik8_prefix4m` is its first 4,154,064 bytes with splits of its own, a data set apart:
its figures do not compare with any published for enwik8.
"""

import contextlib
import dataclasses
import functools
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from experiments.data import builders, files

URL = "http://mattmahoney.net/dc/enwik8.zip"
NOTHING = files.Known(0, "")


@dataclasses.dataclass
class Text(tfds.core.BuilderConfig):
    """One of the two texts.

    Attributes:
      known: size in bytes, and sha256 of the first `checked` bytes.
      checked: as many bytes are known to be those of enwik8.
      ends: where each split ends.
    """

    known: files.Known = NOTHING
    checked: int = 0
    ends: dict[str, int] = dataclasses.field(default_factory=dict)


TEXTS = {
    text.name: text
    for text in (
        Text(
            "enwik8",
            known=files.Known(
                100_000_000,
                "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
            ),
            checked=100_000_000,
            ends={"train": 90_000_000, "validation": 95_000_000, "test": 100_000_000},
        ),
        Text(
            "enwik8_prefix4m",
            known=files.Known(
                4_154_064,
                "369b688978f649681136198fb96db14c1616756260c55fb4b65e9bc049552cad",
            ),
            checked=1_000_000,
            ends={"train": 3_754_064, "validation": 3_954_064, "test": 4_154_064},
        ),
    )
}


class Enwik8Bytes(tfds.core.GeneratorBasedBuilder):
    """The bytes of each split in order, in chunks `{"bytes": [n] uint8}`."""

    name = "enwik8_bytes"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.0.0": "First release."}
    BUILDER_CONFIGS: ClassVar[list[Text]] = list(TEXTS.values())

    def __init__(self, *, manual_dir: str | None = None, **options: Any) -> None:
        self._manual_dir = manual_dir
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"bytes": builders.chunked(np.uint8)}),
            homepage="http://mattmahoney.net/dc/textdata.html",
            disable_shuffling=True,
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, np.ndarray]]]]:
        text = self.builder_config
        if self._manual_dir is None:
            # Not extracted by TFDS, which would take TensorFlow.
            path = pathlib.Path(dl_manager.download(URL))
            with files.discarded_if_wrong(path):
                check(path, text)
        else:
            path = find(text.name, self._manual_dir)
            check(path, text)
        starts = dict(zip(text.ends, (0, *text.ends.values()), strict=False))
        return {
            split: self._generate_examples(path, starts[split], end)
            for split, end in text.ends.items()
        }

    def _generate_examples(
        self, path: pathlib.Path, start: int, end: int
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        with _opened(path) as file:
            file.seek(start)
            parts = files.blocks(file, end - start, builders.CHUNK)
            for number, part in enumerate(parts):
                yield number, {"bytes": np.frombuffer(part, np.uint8)}


def find(dataset: str, manual_dir: str) -> pathlib.Path:
    """The file of a text in the user's folder; ValueError where it is not there."""
    if dataset == "enwik8":
        names, source = (
            ("enwik8", "enwik8.zip"),
            f"enwik8.zip from {URL}, or its enwik8",
        )
    else:
        size = TEXTS[dataset].known.size
        names, source = (dataset,), f"the first {size:,} bytes of enwik8 as {dataset}"
    return files.first_of(manual_dir, names, source)


def check(path: pathlib.Path, text: Text) -> None:
    """Returns where a file, or the one in a zip archive, is the text.

    Raises:
      ValueError: it is cut off, or has other content.
    """
    known = text.known
    if path.suffix != ".zip" and text.checked == known.size:
        files.check(path, known)
        return
    zipped = path.suffix == ".zip"
    guard = files.unzipping(path) if zipped else contextlib.nullcontext()
    with guard, _opened(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        found = files.digest_of(file, known.algorithm, text.checked)
    if size != known.size:
        raise ValueError(
            f"{path} holds {size:,} bytes of text, expected {known.size:,}: it is cut "
            "off or another file; get it again"
        )
    files.require_digest(path, found, known)


def _opened(path: pathlib.Path) -> BinaryIO:
    if path.suffix != ".zip":
        return path.open("rb")
    return zipfile.ZipFile(path).open("enwik8")  # type: ignore[return-value]


def prepare(
    dataset: str,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    *,
    quiet: bool = False,
) -> tfds.core.DatasetBuilder:
    """The builder with its data on disk, written now unless it was there.

    Args:
      dataset: "enwik8" or "enwik8_prefix4m".
      data_dir: where TFDS keeps its data; None means `$TFDS_DATA_DIR`, or
        `~/tensorflow_datasets`.
      manual_dir: folder with `enwik8` or `enwik8.zip` (`enwik8_prefix4m` for the prefix);
        None: downloaded.
      quiet: without messages and bars.
    Raises:
      ValueError: the file is missing, cut off, or another one.
      OSError: it cannot be downloaded, or the data cannot be written.
    """
    opened = _open(dataset, data_dir)
    if not builders.is_prepared(opened, dataset):
        if manual_dir is not None:
            find(dataset, manual_dir)
        elif dataset != "enwik8":
            raise ValueError(
                f"{dataset} cannot be downloaded: give --manual_dir, a folder with the "
                f"first {TEXTS[dataset].known.size:,} bytes of enwik8 as {dataset}"
            )
    how = functools.partial(_open, dataset, data_dir, manual_dir)
    return builders.write(how, quiet=quiet)


def load(
    split: str, data_dir: str | None = None, dataset: str = "enwik8"
) -> UInt8[np.ndarray, " N"]:
    """The bytes of "train", "validation" or "test", prepared before.

    Args:
      split: one of the three.
      data_dir: as in `prepare`.
      dataset: "enwik8" or "enwik8_prefix4m".
    Returns:
      [N] uint8, read-only.
    Raises:
      ValueError: no such split, or it was not prepared.
    """
    found = builders.source(_open(dataset, data_dir), split, dataset)
    return builders.joined(found, "bytes")


def _open(
    dataset: str, data_dir: str | None, manual_dir: str | None = None
) -> tfds.core.DatasetBuilder:
    if dataset not in TEXTS:
        raise ValueError(f"no text {dataset!r}; possible are {', '.join(TEXTS)}")
    return Enwik8Bytes(
        config=dataset,
        data_dir=data_dir,
        manual_dir=manual_dir,
    )
