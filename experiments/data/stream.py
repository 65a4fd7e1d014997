"""Streams of text for models with memory: row b of a batch goes on where it stopped.

A text of N tokens, bytes or ids of words, is cut into one long lane per row. Batch i
holds segment i of every lane, so that the memory left by batch i - 1 is the past of
batch i.
"""

import sys
from typing import SupportsIndex

import grain
import numpy as np
from jaxtyping import Bool, Int, Integer

from experiments.data.shard import WHOLE, Shard

# The text is in memory and a batch takes microseconds: threads would only cost.
_IN_MEMORY = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)

Batch = dict[str, np.ndarray]


def segments(
    text: Integer[np.ndarray, " N"],
    *,
    rows: int,
    segment: int,
    seed: int,
    loop: bool,
    shard: Shard = WHOLE,
) -> grain.IterDataset:
    """Batches of consecutive segments.

    A batch is a dict of
      inputs: [B, T] int32, tokens;
      targets: [B, T] int32, the token after each input;
      weights: [B, T] float32, 1 where a target counts, 0 where it does not;
      start: [B] bool, where the text does not go on from the batch before.

    With `loop`, it never ends. The text is read as a ring; epoch e begins at an offset
    that depends on (`seed`, e) only, so batch i is a function of i, and the iterator's
    state is i. An epoch has N // (B T) batches: the up to B T - 1 tokens left over are
    others in every epoch. The step over the ring's seam counts nothing.

    Without `loop`, it is one pass in order in which each of the N - 1 tokens that have a
    predecessor is a target with weight 1 exactly once; the ragged end is filled up with
    weight 0. `seed` is not used.

    Args:
      text: N tokens, at least B T + 1 with `loop`, at least 2 without; uint8 or int32.
      rows: B, the global batch size.
      segment: T.
      seed: at least 0.
      loop: endless or one pass.
      shard: the rows to make, where several processes make a batch together; the
        batches have these rows alone, B / shard.count.
    Returns:
      A dataset whose iterators have `get_state` and `set_state`.
    Raises:
      ValueError: the text is too short, or a number is out of range.
    """
    if rows < 1 or segment < 1 or seed < 0:
        raise ValueError(
            f"rows ({rows}) and segment ({segment}) must be at least 1, seed ({seed}) "
            "at least 0"
        )
    shortest = rows * segment + 1 if loop else 2
    if text.size < shortest:
        raise ValueError(
            f"a text of {text.size:,} tokens is too short for {rows} rows of segments "
            f"of {segment}: it takes {shortest:,}; use fewer rows or shorter segments"
        )
    lanes = np.asarray(shard.rows(rows))
    source: _Ring | _Pass
    if loop:
        source = _Ring(text, rows, lanes, segment, seed)
    else:
        source = _Pass(text, rows, lanes, segment)
    return grain.MapDataset.source(source).to_iter_dataset(_IN_MEMORY)


class _Ring:
    """Random access to the batches of an endless stream."""

    def __init__(
        self, text: np.ndarray, rows: int, lanes: np.ndarray, segment: int, seed: int
    ) -> None:
        self._text, self._seed = text, seed
        self._lanes, self._segment = lanes, segment
        self._steps = text.size // (rows * segment)  # of an epoch

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: SupportsIndex) -> Batch:
        epoch, step = divmod(int(index), self._steps)
        generator = np.random.default_rng((self._seed, epoch))
        offset = generator.integers(self._text.size)
        lane = self._lanes[:, None] * (self._steps * self._segment)  # [B, 1]
        in_lane = step * self._segment + np.arange(self._segment)  # [T]
        positions = (offset + lane + in_lane) % self._text.size  # [B, T]
        in_text = positions + 1 < self._text.size  # all but the step over the seam
        return _batch(self._text, positions, in_text, first=step == 0)


class _Pass:
    """Random access to the batches of one pass in order."""

    def __init__(
        self, text: np.ndarray, rows: int, lanes: np.ndarray, segment: int
    ) -> None:
        self._text = text
        self._lanes, self._segment = lanes, segment
        self._lane = -(-(text.size - 1) // rows)  # targets of a row, rounded up

    def __len__(self) -> int:
        return -(-self._lane // self._segment)

    def __getitem__(self, index: SupportsIndex) -> Batch:
        in_lane = int(index) * self._segment + np.arange(self._segment)  # [T]
        positions = self._lanes[:, None] * self._lane + in_lane  # [B, T]
        counts = (in_lane < self._lane) & (positions + 1 < self._text.size)
        return _batch(self._text, positions, counts, first=int(index) == 0)


def _batch(
    text: np.ndarray,
    positions: Int[np.ndarray, "B T"],
    counts: Bool[np.ndarray, "B T"],
    *,
    first: bool,
) -> Batch:
    rows = positions.shape[0]
    return {
        "inputs": text.take(positions, mode="wrap").astype(np.int32),  # [B, T]
        "targets": text.take(positions + 1, mode="wrap").astype(np.int32),  # [B, T]
        "weights": counts.astype(np.float32),  # [B, T]
        "start": np.full(rows, first),  # [B]
    }
