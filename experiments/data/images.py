"""Batches of labelled images, whatever the images are and however they are made.

Every batch is a dict of
  images: [B, H, W, 3], float32 with mean 0 and deviation 1 over the data set, or uint8
    as decoded: a quarter of the bytes on the way to a device, and `normalise` is then
    the first operation of the compiled step;
  labels: [B] int32;
  weights: [B] float32, 1 where a row counts, 0 where it only fills the batch.

The n-th row that is ever drawn is a function of (seed, n): which image, by Grain's
shuffle of its epoch, and how it is augmented. So batch i is a function of i, whatever the
number of threads and processes that make it, and the state of an iterator is i: a run
that goes on may have another number of them.
"""

import sys
from typing import Any, NamedTuple, Protocol, SupportsIndex

import grain
import numpy as np
from jaxtyping import Int, UInt64

from experiments.data.shard import WHOLE, Shard
from experiments.data.workers import InProcesses

Batch = dict[str, np.ndarray]


class Read(Protocol):
    """Images and labels of some rows of a batch."""

    def __call__(
        self, indices: Int[np.ndarray, " B"], positions: Int[np.ndarray, " B"] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
          indices: of the images, in their data set.
          positions: the numbers n of the rows, neighbours, from which augmentation is
            drawn; None: without augmentation.
        Returns:
          Images [B, H, W, 3] and labels [B].
        """


class Statistics(NamedTuple):
    """Mean and deviation of each channel over a data set, of intensities in [0, 1]."""

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


def normalise(images: Any, statistics: Statistics) -> Any:
    """Images with mean 0 and deviation 1, [..., W, 3] uint8 to float32; NumPy or JAX."""
    *outer, width, _ = images.shape
    mean, deviation = np.asarray(statistics, np.float32)
    # Over rows of W times 3 numbers: NumPy is ten times slower over rows of 3.
    scale, shift = (
        np.tile(1 / (255 * deviation), width),
        np.tile(mean / deviation, width),
    )
    flat = images.reshape(*outer, -1) * scale
    flat -= shift  # in place where it is NumPy's
    return flat.reshape(images.shape)


def batches(
    read: Read,
    size: int,
    *,
    rows: int,
    seed: int,
    loop: bool,
    shard: Shard = WHOLE,
    threads: int = 0,
    workers: int = 0,
) -> grain.IterDataset:
    """Batches of a data set; see the top of this file.

    With `loop`, it never ends. Every epoch is shuffled anew and the next begins in the
    batch in which one ends: among any N rows from n = e N on, every image is once.

    Without `loop`, it is one pass in order without augmentation. The last batch is filled
    up with rows of weight 0. `seed` is not used.

    Args:
      read: images and labels.
      size: N, the number of images.
      rows: B, the global batch size.
      seed: at least 0.
      loop: endless or one pass.
      shard: the rows to make, where several processes make a batch together; the
        batches have these rows alone, B / shard.count.
      threads: that make a batch each, ahead of time, in this process or in each of the
        workers; 0: a batch is made when it is asked for.
      workers: processes that make batches in turns, 0 for none; `read` travels to them.
    Returns:
      A dataset whose iterators have `get_state` and `set_state`.
    Raises:
      ValueError: there are no images, or a number is out of range.
    """
    if size < 1:
        raise ValueError("there are no images")
    if min(seed, threads, workers) < 0:
        raise ValueError(
            f"seed ({seed}), threads ({threads}) and workers ({workers}) must be at "
            "least 0"
        )
    source = _Batches(read, size, rows, shard, order(size, seed) if loop else None)
    batches = grain.MapDataset.source(source)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    if not workers:
        return batches.to_iter_dataset(options)
    return InProcesses(batches, options, workers)


def order(size: int, seed: int) -> grain.MapDataset:
    """Index of the image of each row n, epoch after epoch, each shuffled by itself."""
    # Grain takes seed + e for epoch e: mixed, or two seeds would share their epochs.
    mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.range(size).shuffle(seed=mixed).repeat()


def draws(seed: int, positions: Int[np.ndarray, " B"]) -> UInt64[np.ndarray, "B 4"]:
    """Four uniform integers below 2^64 for each row, by (seed, n) alone.

    Args:
      seed: at least 0.
      positions: numbers n of the rows, neighbours.
    """
    key = np.random.SeedSequence(seed).generate_state(2, np.uint64)
    # A block of this generator is four integers, and its number is a counter.
    generator = np.random.Philox(key=key).advance(int(positions[0]))
    return generator.random_raw(4 * positions.size).reshape(-1, 4)


def part(
    split: str, available: dict[str, int], held_out: int, *, reported: str
) -> tuple[str, range]:
    """Which images of which stored split a split of a run is.

    Args:
      split: "train", "validation" or "test".
      available: images by stored split.
      held_out: how many of the last stored training images (their order is shuffled
        when they are stored) are "validation" and not in "train". With 0, "validation"
        is the reported split as well, as in the papers, which have no other.
      reported: the stored split on which the papers report.
    Raises:
      ValueError: no such split, or nothing is left to train on.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"no split {split!r}; possible are train, validation, test")
    train = available["train"]
    if not 0 <= held_out < train:
        raise ValueError(
            f"held_out ({held_out}) must be at least 0 and leave some of the {train:,} "
            "training images"
        )
    if split == "train":
        return "train", range(train - held_out)
    if split == "validation" and held_out:
        return "train", range(train - held_out, train)
    return reported, range(available[reported])


class _Batches:
    """Random access to batches."""

    def __init__(
        self,
        read: Read,
        size: int,
        rows: int,
        shard: Shard,
        shuffled: grain.MapDataset | None,
    ) -> None:
        self._read, self._size, self._rows = read, size, rows
        self._mine = np.asarray(shard.rows(rows))
        self._order = shuffled

    def __len__(self) -> int:
        return -(-self._size // self._rows) if self._order is None else sys.maxsize

    def __getitem__(self, index: SupportsIndex) -> Batch:
        positions = int(index) * self._rows + self._mine
        if self._order is None:
            counts = positions < self._size
            indices = np.minimum(positions, self._size - 1)
            images, labels = self._read(indices, None)
        else:
            counts = np.ones(positions.size, bool)
            indices = np.asarray([self._order[int(n)] for n in positions])
            images, labels = self._read(indices, positions)
        return {
            "images": images,
            "labels": labels.astype(np.int32),
            "weights": counts.astype(np.float32),
        }
