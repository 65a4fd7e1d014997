"""ImageNet (ILSVRC 2012) with the usual augmentation: random resized crop, flip.

Russakovsky et al., arXiv:1409.0575; crops as in Szegedy et al., arXiv:1409.4842,
section 6. Prepared by TFDS's builder, read without TensorFlow. Pillow decodes with
libjpeg-turbo, as quickly as libraries that do nothing else: cutting and resizing costs
more than what they save.
"""

import functools
import io
import math
from typing import Any

import grain
import numpy as np
import PIL.Image
import tensorflow_datasets as tfds
from jaxtyping import UInt8

from experiments.data import builders, files, images
from experiments.data.shard import WHOLE, Shard

NAME = "imagenet2012"
SIZE = 224
RESIZED = 256  # the short side before the middle is cut out, where that is SIZE
AREA = (0.08, 1.0)  # of the image
RATIO = (3 / 4, 4 / 3)  # width to height
TRIES = 10
STATISTICS = images.Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

ARCHIVES = {
    "ILSVRC2012_img_train.tar": files.Known(
        147_897_477_120, "1d675b47d978889d74fa0da5fadfb00e", "md5"
    ),
    "ILSVRC2012_img_val.tar": files.Known(
        6_744_924_160, "29b22e2961454d5413ddabcf34fc5622", "md5"
    ),
}

Box = tuple[float, float, float, float]  # left, upper, right, lower


def batches(
    split: str,
    *,
    rows: int,
    seed: int,
    loop: bool,
    data_dir: str | None = None,
    held_out: int = 0,
    normalised: bool = True,
    side: int = SIZE,
    shard: Shard = WHOLE,
    threads: int = 16,
    workers: int = 0,
) -> grain.IterDataset:
    """Batches of images [B, side, side, 3] with labels and weights, see `images`.

    With `loop`, a random part of each image is resized and mirrored half the time;
    without, the short side is resized to 256 / 224 of `side` and the middle cut out.

    Args:
      split: "train", "test" (the 50,000 images that are called validation images and on
        which papers report), or "validation": the last `held_out` training images, which
        "train" is then without; with 0, the same as "test".
      rows: B, the global batch size.
      seed: of order and augmentation, at least 0.
      loop: endless, shuffled and augmented, or one pass in order.
      data_dir: of TFDS; None: its default.
      held_out: how many training images are for validation.
      normalised: float32 by the usual statistics, or uint8.
      side: of the images, in pixels.
      shard: see `images.batches`.
      threads: see `images.batches`.
      workers: see `images.batches`: where one process is not enough.
    Raises:
      ValueError: not prepared, no such split, or a number out of range.
    """
    if side < 1:
        raise ValueError(f"side ({side}) must be at least 1")
    builder = _opened(data_dir)
    sizes = builders.sizes(builder, NAME)
    stored, span = images.part(split, sizes, held_out, reported="validation")
    skip = {"image": tfds.decode.SkipDecoding()}  # JPEG
    source = builders.source(
        builder, f"{stored}[{span.start}:{span.stop}]", NAME, decoders=skip
    )
    return images.batches(
        functools.partial(read, source, seed, normalised, side),
        len(span),
        rows=rows,
        seed=seed,
        loop=loop,
        shard=shard,
        threads=threads,
        workers=workers,
    )


def read(
    source: Any,
    seed: int,
    normalised: bool,
    side: int,
    indices: np.ndarray,
    positions: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The images of some rows, see `images.Read`; the first four are bound."""
    examples = source.__getitems__([int(index) for index in indices])
    labels = np.asarray([example["label"] for example in examples])
    made = np.empty((len(examples), side, side, 3), np.uint8)
    for row, example in enumerate(examples):
        if positions is None:
            made[row] = middle(example["image"], side)
        else:
            generator = np.random.default_rng((seed, int(positions[row])))
            made[row] = augmented(example["image"], generator, side)
    return images.normalise(made, STATISTICS) if normalised else made, labels


def augmented(
    jpeg: bytes, generator: np.random.Generator, side: int = SIZE
) -> UInt8[np.ndarray, "side side 3"]:
    """A random part of an image, resized with antialiasing, mirrored half the time.

    Where the part is large, the JPEG is decoded at 1/2, 1/4 or 1/8 of its size, never
    below the size that the part ends up with.
    """
    with PIL.Image.open(io.BytesIO(jpeg)) as image:
        width, height = image.size
        left, upper, right, lower = random_box(width, height, generator)
        shrink = int(min(right - left, lower - upper) // side)
        if shrink > 1:
            image.draft("RGB", (width // shrink, height // shrink))
            across, down = image.size[0] / width, image.size[1] / height
            left, right = left * across, right * across
            upper, lower = upper * down, lower * down
        part = image.convert("RGB").resize(
            (side, side), PIL.Image.Resampling.BILINEAR, (left, upper, right, lower)
        )
    pixels = np.asarray(part)
    return pixels[:, ::-1] if generator.random() < 0.5 else pixels


def random_box(width: int, height: int, generator: np.random.Generator) -> Box:
    """A part with a random share of the area and a random ratio of its sides.

    The share is uniform, the ratio uniform in its logarithm, the place uniform. What
    does not fit is drawn again, ten times at most; then it is the largest part in the
    middle that has a possible ratio.
    """
    for _ in range(TRIES):
        area = width * height * generator.uniform(*AREA)
        ratio = math.exp(generator.uniform(*map(math.log, RATIO)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left = int(generator.integers(width - across + 1))
            upper = int(generator.integers(height - down + 1))
            return left, upper, left + across, upper + down
    across = min(width, round(height * RATIO[1]))
    down = min(height, round(width / RATIO[0]))
    left, upper = (width - across) // 2, (height - down) // 2
    return left, upper, left + across, upper + down


def middle(jpeg: bytes, side: int = SIZE) -> UInt8[np.ndarray, "side side 3"]:
    """The middle of an image whose short side was resized, with antialiasing."""
    resized_side = side * RESIZED // SIZE
    with PIL.Image.open(io.BytesIO(jpeg)) as image:
        width, height = image.size
        short = min(width, height)
        width, height = resized_side * width // short, resized_side * height // short
        resized = image.convert("RGB").resize(
            (width, height), PIL.Image.Resampling.BILINEAR
        )
    left, upper = round((width - side) / 2), round((height - side) / 2)
    return np.asarray(resized.crop((left, upper, left + side, upper + side)))


def prepare(
    data_dir: str | None = None, manual_dir: str | None = None
) -> tfds.core.DatasetBuilder:
    """The builder with its data on disk, written now unless it was there.

    Args:
      data_dir: where TFDS keeps its data; None means `$TFDS_DATA_DIR`, or
        `~/tensorflow_datasets`.
      manual_dir: folder with the archives of training and validation images, which one
        gets after a registration.
    Raises:
      ValueError: TensorFlow is not installed, or an archive is missing, cut off, or
        another one.
      OSError: the data cannot be written.
    """
    builder = _opened(data_dir)
    if builders.is_prepared(builder, NAME):
        return builder
    if manual_dir is None:
        raise ValueError(
            f"{NAME} cannot be downloaded without a registration: get "
            f"{' and '.join(ARCHIVES)} from https://image-net.org/download-images and "
            "give their folder as --manual_dir"
        )
    found = {
        name: files.first_of(
            manual_dir, (name,), f"{name} from https://image-net.org/download-images"
        )
        for name in ARCHIVES
    }
    builders.require_tensorflow(NAME)
    for name, path in found.items():
        files.check(path, ARCHIVES[name])
    how = tfds.download.DownloadConfig(manual_dir=path.parent)
    return builders.write(functools.partial(_opened, data_dir), download_config=how)


def _opened(data_dir: str | None) -> tfds.core.DatasetBuilder:
    return tfds.builder(NAME, data_dir=data_dir)
