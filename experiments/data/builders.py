"""What all TFDS builders here share: writing once, reading without TensorFlow."""

import contextlib
import importlib.util
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

FORMAT = "array_record"
BLOCK = 1000  # examples that are read at once
CHUNK = 1 << 23  # bytes of an example where a split is one long array


def write(
    open_builder: Callable[[], tfds.core.DatasetBuilder],
    *,
    quiet: bool = False,
    **how: Any,
) -> tfds.core.DatasetBuilder:
    """The builder with its data on disk, written now unless it was there.

    Args:
      open_builder: makes the builder; called before and after.
      quiet: without the messages and bars of TFDS.
      **how: of `download_and_prepare`.
    Raises:
      OSError: the data cannot be written.
    """
    builder = open_builder()
    with _silence() if quiet else contextlib.nullcontext():
        try:
            # Written beside its place under a random name, then renamed.
            builder.download_and_prepare(file_format=FORMAT, **how)
        except OSError:
            # Another process may have renamed its copy first; both hold the same bytes.
            if not builder.data_path.exists():
                raise
    return open_builder()  # reads what is on disk now, whoever wrote it


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def source(
    builder: tfds.core.DatasetBuilder, split: str, dataset: str, **how: Any
) -> Any:
    """Random access to the examples of a split, which must have been prepared.

    Args:
      builder: of the data set, opened where it should be.
      split: as TFDS names it; slices such as "train[:100]" too.
      dataset: its name on the command line of experiments.prepare.
      **how: of `as_data_source`.
    Raises:
      ValueError: it was not prepared, in another format, or has no such split.
    """
    require_prepared(builder, dataset)
    name = split.partition("[")[0]
    if name not in builder.info.splits:
        raise ValueError(
            f"no split {split!r}; {dataset} has {', '.join(builder.info.splits)}"
        )
    reader: Any = builder  # decorators of TFDS hide the method's parameters
    return reader.as_data_source(split, **how)


def sizes(builder: tfds.core.DatasetBuilder, dataset: str) -> dict[str, int]:
    """Number of examples of each split; ValueError where it was not prepared."""
    require_prepared(builder, dataset)
    return {name: info.num_examples for name, info in builder.info.splits.items()}


def examples(source: Any) -> Iterator[Any]:
    """All examples in order, read in blocks: ten times as quick as one by one."""
    for start in range(0, len(source), BLOCK):
        stop = min(start + BLOCK, len(source))
        yield from source.__getitems__(range(start, stop))


def require_prepared(builder: tfds.core.DatasetBuilder, dataset: str) -> None:
    """Raises ValueError, which says the command, where the data is not on disk."""
    if not is_prepared(builder, dataset):
        depth = 3 if builder.builder_config else 2  # name, config if any, version
        raise ValueError(
            f"{dataset} is not prepared in {builder.data_path}; run "
            f"`{_command(dataset)} --data_dir={builder.data_path.parents[depth - 1]}`"
        )


def is_prepared(builder: tfds.core.DatasetBuilder, dataset: str) -> bool:
    """Whether the data is on disk, whole: a folder gets its name when it is.

    Raises:
      ValueError: it is there in another format.
    """
    if not (builder.data_path / "dataset_info.json").exists():
        return False
    found = builder.info.file_format
    if found is None or found.value != FORMAT:
        raise ValueError(
            f"{builder.data_path} is in the format {found and found.value}, which "
            f"TensorFlow alone reads; prepare it as {FORMAT} in another folder: "
            f"`{_command(dataset)} --data_dir=...`"
        )
    return True


def require_tensorflow(dataset: str) -> None:
    """Raises ValueError where TFDS could not encode images."""
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError(
            f"TFDS needs TensorFlow to prepare {dataset}, and nothing else needs it: "
            "pip install -e '.[experiments,prepare]', in an environment of its own if "
            "you like"
        )


def _command(dataset: str) -> str:
    return f"python -m experiments.prepare --dataset={dataset}"


def chunked(dtype: Any) -> tfds.features.FeatureConnector:
    """The feature of one chunk of a long array, stored as its bytes."""
    return tfds.features.Tensor(shape=(None,), dtype=dtype, encoding="bytes")


def joined(source: Any, feature: str) -> np.ndarray:
    """The long array that was stored in chunks, all of one size but the last.

    Holds the whole once, and one chunk besides.

    Args:
      source: examples in order, each a chunk.
      feature: its name.
    Returns:
      [N], read-only.
    """
    first, last = source[0][feature], source[len(source) - 1][feature]
    whole = np.empty((len(source) - 1) * first.size + last.size, first.dtype)
    start = 0
    for example in source:
        part = example[feature]
        whole[start : start + part.size] = part
        start += part.size
    if start != whole.size:
        raise ValueError(f"chunks add up to {start:,} items, expected {whole.size:,}")
    whole.flags.writeable = False
    return whole
