"""CIFAR-10 and CIFAR-100 with the augmentation of GSE: pad by 4, crop, flip.

Krizhevsky, "Learning multiple layers of features from tiny images", 2009. Prepared by
the builders of TFDS, read without TensorFlow. Heddes et al., arXiv:2401.06898 (GSE),
supplement, for augmentation and statistics.

Images are decoded once and stay in memory, 240 MB; batches are cut out of them.
"""

import contextlib
import functools
import hashlib
import io
import pathlib
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from jaxtyping import Int, UInt8, UInt64

from experiments.data import builders, files, images
from experiments.data.shard import WHOLE, Shard

SIZE, PAD = 32, 4
STATISTICS = {
    "cifar10": images.Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": images.Statistics((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
# MD5 of what the archive of CIFAR-10 holds: it may have been packed anew. Of CIFAR-100
# only the archive's own SHA-256 is published, by TFDS.
MEMBERS = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}


class Decoded(NamedTuple):
    """A stored split in memory.

    Attributes:
      images: [N, 40, 40, 3] uint8, with a border of zeros.
      labels: [N] int32.
    """

    images: UInt8[np.ndarray, "N 40 40 3"]
    labels: Int[np.ndarray, " N"]


def batches(
    split: str,
    *,
    rows: int,
    seed: int,
    loop: bool,
    data_dir: str | None = None,
    dataset: str = "cifar10",
    held_out: int = 0,
    normalised: bool = True,
    shard: Shard = WHOLE,
    threads: int = 0,
    workers: int = 0,
) -> grain.IterDataset:
    """Batches of images [B, 32, 32, 3] with labels and weights, see `images`.

    With `loop`, each image is moved by up to 4 pixels in each direction, where what comes
    in is black, and mirrored half the time; without, it is as stored.

    Args:
      split: "train", "test" (10,000 images), or "validation": the last `held_out`
        training images, which "train" is then without; with 0, the test images, on
        which the papers report.
      rows: B, the global batch size.
      seed: of order and augmentation, at least 0.
      loop: endless, shuffled and augmented, or one pass in order.
      data_dir: of TFDS; None: its default.
      dataset: "cifar10" or "cifar100" (fine labels).
      held_out: how many training images are for validation.
      normalised: float32 by the statistics of GSE, or uint8 as decoded.
      shard: see `images.batches`.
      threads: as there; cutting batches out of memory is quick without.
      workers: as there; each gets all images.
    Raises:
      ValueError: not prepared, no such split, or a number out of range.
    """
    sizes = builders.sizes(_opened(dataset, data_dir), dataset)
    stored, span = images.part(split, sizes, held_out, reported="test")
    decoded = load(stored, data_dir, dataset)
    decoded = Decoded(*(field[span.start : span.stop] for field in decoded))

    def read(
        indices: np.ndarray, positions: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        drawn = None if positions is None else images.draws(seed, positions)
        cut = crop(decoded.images, indices, drawn)
        if normalised:
            cut = images.normalise(cut, STATISTICS[dataset])
        return cut, decoded.labels[indices]

    return images.batches(
        read,
        len(span),
        rows=rows,
        seed=seed,
        loop=loop,
        shard=shard,
        threads=threads,
        workers=workers,
    )


def crop(
    padded: UInt8[np.ndarray, "N 40 40 3"],
    indices: Int[np.ndarray, " B"],
    drawn: UInt64[np.ndarray, "B 4"] | None,
) -> UInt8[np.ndarray, "B 32 32 3"]:
    """Windows of some images: where the draws say and mirrored, or the middle ones.

    Args:
      padded: all images.
      indices: those to cut.
      drawn: random integers; the first two say where, the third whether mirrored.
    """
    if drawn is None:
        return padded[indices, PAD : PAD + SIZE, PAD : PAD + SIZE]
    side, steps = SIZE + 2 * PAD, np.arange(SIZE)
    top, left = (drawn[:, :2] % (2 * PAD + 1)).astype(np.int64).T
    mirrored = (drawn[:, 2] & 1).astype(bool)
    columns = left[:, None] + np.where(mirrored[:, None], steps[::-1], steps)  # [B, 32]
    lines = (indices * side + top)[:, None] + steps  # [B, 32]
    pixels = lines[:, :, None] * side + columns[:, None]  # [B, 32, 32]
    # One take of whole pixels is four times faster than indices by axis.
    cut = padded.reshape(-1).view("V3").take(pixels)
    return cut.view(np.uint8).reshape(-1, SIZE, SIZE, 3)


@functools.lru_cache(maxsize=4)
def load(split: str, data_dir: str | None = None, dataset: str = "cifar10") -> Decoded:
    """A stored split, "train" or "test", decoded once in a process.

    Raises:
      ValueError: not prepared, or no such split.
    """
    skip = {"image": tfds.decode.SkipDecoding()}  # by us: TFDS takes twice as long
    source = builders.source(_opened(dataset, data_dir), split, dataset, decoders=skip)
    side = SIZE + 2 * PAD
    padded = np.zeros((len(source), side, side, 3), np.uint8)
    labels = np.zeros(len(source), np.int32)
    for number, example in enumerate(builders.examples(source)):
        with PIL.Image.open(io.BytesIO(example["image"])) as image:
            padded[number, PAD : PAD + SIZE, PAD : PAD + SIZE] = image
        labels[number] = example["label"]
    padded.flags.writeable = labels.flags.writeable = False
    return Decoded(padded, labels)


def ids(
    split: str, count: int, data_dir: str | None = None, dataset: str = "cifar10"
) -> list[str]:
    """Names of the first stored images, as TFDS numbers those of the archive."""
    source = builders.source(_opened(dataset, data_dir), split, dataset)
    return [source[number]["id"].decode() for number in range(count)]


def prepare(
    dataset: str, data_dir: str | None = None, manual_dir: str | None = None
) -> tfds.core.DatasetBuilder:
    """The builder with its data on disk, written now unless it was there.

    Args:
      dataset: "cifar10" or "cifar100".
      data_dir: where TFDS keeps its data; None means `$TFDS_DATA_DIR`, or
        `~/tensorflow_datasets`.
      manual_dir: folder with `cifar-10-binary.tar.gz` or `cifar-100-binary.tar.gz`;
        None: downloaded.
    Raises:
      ValueError: TensorFlow is not installed, or the archive is missing, cut off, or
        another one.
      OSError: it cannot be downloaded, or the data cannot be written.
    """
    opened = functools.partial(_opened, dataset, data_dir)
    builder = opened()
    if builders.is_prepared(builder, dataset):
        return builder
    if manual_dir is None:
        builders.require_tensorflow(dataset)
        return builders.write(opened)
    ((url, known),) = builder.url_infos.items()
    path = files.first_of(manual_dir, (known.filename,), f"{known.filename} from {url}")
    builders.require_tensorflow(dataset)
    check(path, dataset, files.Known(int(known.size), known.checksum))
    root = builder.data_path.parents[1]
    root.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="extracted.", dir=root) as scratch,
        _accepted(type(builder), url, path),
    ):
        how = tfds.download.DownloadConfig(manual_dir=path.parent)
        return builders.write(opened, download_config=how, download_dir=scratch)


def check(path: pathlib.Path, dataset: str, known: files.Known) -> None:
    """Returns where an archive is the published one, or holds the same files.

    Raises:
      ValueError: it is cut off, or another one.
    """
    if dataset != "cifar10":
        files.check(path, known)
        return
    whole = path.stat().st_size == known.size
    if whole and files.digest(path, known.algorithm) == known.digest:
        return
    left = dict(MEMBERS)
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = pathlib.PurePath(member.name).name
                if name in left and (file := archive.extractfile(member)):
                    made = hashlib.md5(file.read()).hexdigest()
                    known_file = files.Known(None, left.pop(name), "md5")
                    files.require_digest(path / name, made, known_file)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{path} is cut off or damaged ({error}); get it again"
        ) from error
    if left:
        raise ValueError(f"{path} lacks {', '.join(left)}; get it again")


@contextlib.contextmanager
def _accepted(cls: Any, url: str, path: pathlib.Path) -> Iterator[None]:
    """Within it, TFDS takes an archive whose content was checked for the one of `url`."""
    before = vars(cls).get("url_infos")
    cls.url_infos = {url: tfds.download.checksums.compute_url_info(path)}
    try:
        yield
    finally:
        if before is None:
            del cls.url_infos  # that of the class above shows again
        else:
            cls.url_infos = before


def _opened(dataset: str, data_dir: str | None) -> Any:
    if dataset not in STATISTICS:
        raise ValueError(f"no {dataset!r}; possible are {', '.join(STATISTICS)}")
    return tfds.builder(dataset, data_dir=data_dir)
