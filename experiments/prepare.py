"""Prepares a data set once, so that training reads it without TensorFlow.

    python -m experiments.prepare --dataset=enwik8
    python -m experiments.prepare --dataset=cifar10 --manual_dir=~/archives

Downloads, or takes the files in --manual_dir; checks them; writes array_record files under
--data_dir. What is there already stays. Images need the extra `prepare`, texts do not.
docs/data.md says for each data set which files it takes.

Exit code 2 with one line on stderr where a file is missing, cut off, or another one.
"""

import functools
import os
from collections.abc import Callable, Mapping
from typing import NamedTuple

import requests
import tensorflow_datasets as tfds
from absl import flags
from tensorflow_datasets.core.download import download_manager, extractor

from experiments import command
from experiments.data import cifar, enwik8, imagenet, tiny_shakespeare, wikitext103

# What TFDS says of a download that is not what it should be; no ValueError, no OSError.
REFUSED = (
    tfds.download.DownloadError,
    download_manager.NonMatchingChecksumError,
    extractor.ExtractError,
)
Prepare = Callable[[str | None, str | None], tfds.core.DatasetBuilder]


class Dataset(NamedTuple):
    """A data set by its name on the command line.

    Attributes:
      prepare: (data_dir, manual_dir) -> the builder with its data on disk.
      counts: what each split has, where TFDS does not count it; None: examples.
      unit: what is counted.
    """

    prepare: Prepare
    counts: dict[str, int] | None = None
    unit: str = "images"


def shipped(data_dir: str | None, manual_dir: str | None) -> tfds.core.DatasetBuilder:
    """Prepares Tiny Shakespeare, whose text is part of the project."""
    if manual_dir is not None:
        raise ValueError(
            "tiny_shakespeare is shipped with the project: leave out --manual_dir"
        )
    return tiny_shakespeare.prepare(data_dir)


def lengths(ends: Mapping[str, int]) -> dict[str, int]:
    """How long each split is, by where it ends."""
    starts = (0, *ends.values())
    return {
        name: end - start
        for (name, end), start in zip(ends.items(), starts, strict=False)
    }


DATASETS: dict[str, Dataset] = {
    "cifar10": Dataset(functools.partial(cifar.prepare, "cifar10")),
    "cifar100": Dataset(functools.partial(cifar.prepare, "cifar100")),
    "imagenet2012": Dataset(imagenet.prepare),
    **{
        name: Dataset(
            functools.partial(enwik8.prepare, name), lengths(text.ends), "bytes"
        )
        for name, text in enwik8.TEXTS.items()
    },
    **{
        name: Dataset(
            functools.partial(wikitext103.prepare, name), dict(text.tokens), "words"
        )
        for name, text in wikitext103.TEXTS.items()
    },
    "tiny_shakespeare": Dataset(shipped, lengths(tiny_shakespeare.ENDS), "bytes"),
}


def prepare(
    dataset: str, data_dir: str | None = None, manual_dir: str | None = None
) -> str:
    """Prepares a data set, and says what there is and where.

    Args:
      dataset: one of `DATASETS`.
      data_dir: where TFDS keeps its data; None means `$TFDS_DATA_DIR`, or
        `~/tensorflow_datasets`.
      manual_dir: folder with the files, see docs/data.md; None: downloaded.
    Raises:
      ValueError: no such data set, or a file is missing, cut off, or another one.
      OSError: a download failed, or the data cannot be written.
    """
    if dataset not in DATASETS:
        raise ValueError(f"--dataset={dataset}: possible are {', '.join(DATASETS)}")
    made, counts, unit = DATASETS[dataset]
    try:
        builder = made(data_dir, manual_dir)
    except requests.RequestException as error:
        raise OSError(
            f"{dataset} could not be downloaded ({error}); try again, or get the files "
            "by hand and give --manual_dir, see docs/data.md"
        ) from error
    except REFUSED as error:
        raise ValueError(str(error)) from error
    if counts is None:
        counts = {name: info.num_examples for name, info in builder.info.splits.items()}
    said = ", ".join(f"{count:,} {unit} of {split}" for split, count in counts.items())
    return f"{dataset}: {said} in {builder.data_path}"


def main(argv: list[str]) -> int:
    """Prepares, and prints what there is."""
    del argv
    values = flags.FLAGS
    if values.dataset is None:
        raise command.BadInput(
            f"--dataset is missing; possible are {', '.join(DATASETS)}"
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow talks
    with command.checking():
        print(prepare(values.dataset, values.data_dir, values.manual_dir))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("dataset", None, "Which data set.")
    flags.DEFINE_string("data_dir", None, "Where to write; default as TFDS has it.")
    flags.DEFINE_string("manual_dir", None, "Folder with the files; default: download.")
    command.run(main)
