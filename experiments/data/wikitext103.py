"""WikiText-103: articles of the English Wikipedia, as words.

Merity et al., "Pointer Sentinel Mixture Models", arXiv:1609.07843. Word level as in
Transformer-XL (arXiv:1901.02860): every line ends with `<eos>`, and the vocabulary has
all 267,735 words of the training text, the most frequent first, so that cutoffs of an
adaptive softmax are ranges of ids. Prepared by TFDS as array_record, without TensorFlow.

`wikitext103_heldout_vocabulary` is the validation and test text alone, with a vocabulary
counted on these two: for trying things out where the training text is not at hand. Its
ids and its figures are not those of WikiText-103.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import pathlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TextIO

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from jaxtyping import Int32

from experiments.data import builders, files
from experiments.data import vocabulary as vocabularies

URL = "https://wikitext.smerity.com/wikitext-103-v1.zip"
ARCHIVE = "wikitext-103-v1.zip"
ZIPPED = files.Known(
    None, "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"
)
NAMES = {  # in the archive, and in a folder of the user
    "train": "wiki.train.tokens",
    "validation": "wiki.valid.tokens",
    "test": "wiki.test.tokens",
}
# Of the training text only counts are published, and they are checked.
KNOWN = {
    "validation": files.Known(
        1_142_309, "9aee9f52d6e77de6c7751fc5e7c44287db3ec0eaf15477098acc6b93c1c4250b"
    ),
    "test": files.Known(
        1_281_077, "56db52eb157b1ab5c89646eef70510c1eca6e12a3bfdb99f0d6b05b4eacb75b9"
    ),
}


@dataclasses.dataclass
class Text(tfds.core.BuilderConfig):
    """One of the two texts.

    Attributes:
      tokens: how many each split has, `<eos>` included.
      counted: the splits whose words are the vocabulary.
      words: size of the vocabulary, `<eos>` included; None where none is published.
    """

    tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    counted: Sequence[str] = ()
    words: int | None = None


HELD_OUT = {"validation": 217_646, "test": 245_569}
HELD_OUT_WORDS = 28_441  # of both together, counted here: nobody publishes it
TEXTS = {
    text.name: text
    for text in (
        Text(
            "wikitext103",
            tokens={"train": 103_227_021, **HELD_OUT},
            counted=("train",),
            words=267_735,
        ),
        Text(
            "wikitext103_heldout_vocabulary",
            tokens=HELD_OUT,
            counted=("validation", "test"),
        ),
    )
}


class Wikitext103Words(tfds.core.GeneratorBasedBuilder):
    """Ids of the words of each split in order, in chunks `{"tokens": [n] int32}`.

    The words, by id, are the metadata `words`.
    """

    name = "wikitext103_words"
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
            features=tfds.features.FeaturesDict({"tokens": builders.chunked(np.int32)}),
            homepage="https://wikitext.smerity.com",
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, np.ndarray]]]]:
        text = self.builder_config
        if self._manual_dir is None:
            path = pathlib.Path(dl_manager.download(URL))
            with files.discarded_if_wrong(path):
                check(path, text)
        else:
            path = find(text.name, self._manual_dir)
            check(path, text)
        counters = {split: count(path, split) for split in text.tokens}
        words = vocabularies.by_frequency([counters[split] for split in text.counted])
        _require_counts(path, text, counters, len(words))
        self.info.metadata["words"] = words
        ids = {word: number for number, word in enumerate(words)}
        return {
            split: self._generate_examples(path, split, ids) for split in text.tokens
        }

    def _generate_examples(
        self, path: pathlib.Path, split: str, ids: Mapping[str, int]
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        with _lines(path, split) as lines:
            numbers = (
                ids[word] for line in lines for word in vocabularies.words_of(line)
            )
            for key in itertools.count():
                part = itertools.islice(numbers, builders.CHUNK // 4)
                tokens = np.fromiter(part, np.int32)
                if not tokens.size:
                    return
                yield key, {"tokens": tokens}


def count(path: pathlib.Path, split: str) -> collections.Counter[str]:
    """How often each word comes in a split."""
    with _lines(path, split) as lines:
        shown = f"counting words of {split}"
        return vocabularies.count(
            tqdm.tqdm(lines, desc=shown, unit=" lines", leave=False)
        )


def find(dataset: str, manual_dir: str) -> pathlib.Path:
    """The archive, or the folder with the files of a text; ValueError without."""
    root = pathlib.Path(manual_dir).expanduser()
    needed = [NAMES[split] for split in TEXTS[dataset].tokens]
    for folder in (root, root / "wikitext-103"):
        if all((folder / name).is_file() for name in needed):
            return folder
    source = f"{ARCHIVE} from {URL}, or its {', '.join(needed)}"
    return files.first_of(manual_dir, (ARCHIVE,), source)


def check(path: pathlib.Path, text: Text) -> None:
    """Returns where an archive, or the files of a folder, are the published ones.

    Raises:
      ValueError: one is cut off, or has other content.
    """
    if path.is_file():
        files.check(path, ZIPPED)
        return
    for split in text.tokens:
        if split in KNOWN:
            files.check(path / NAMES[split], KNOWN[split])


def _require_counts(
    path: pathlib.Path,
    text: Text,
    counters: Mapping[str, collections.Counter[str]],
    words: int,
) -> None:
    known = set().union(*(counters[split] for split in text.counted))
    for split, expected in text.tokens.items():
        found = counters[split].total()
        if found != expected:
            raise ValueError(
                f"{path}: {NAMES[split]} has {found:,} words with the ends of lines, "
                f"expected {expected:,}; it is cut off or another file; get it again"
            )
        if strangers := [word for word in counters[split] if word not in known]:
            raise ValueError(
                f"{path}: {NAMES[split]} has {len(strangers):,} words that are not in "
                f"the vocabulary, as {strangers[0]!r}; it is another file; get it again"
            )
    if text.words is not None and words != text.words:
        raise ValueError(
            f"{path}: {NAMES['train']} has {words:,} different words with the "
            f"ends of lines, expected {text.words:,}; it is another file; get it again"
        )


@contextlib.contextmanager
def _lines(path: pathlib.Path, split: str) -> Iterator[TextIO]:
    """The lines of a split, in an archive or in a folder."""
    name = NAMES[split]
    if path.is_dir():
        with (path / name).open(encoding="utf-8") as lines:
            yield lines
        return
    with (
        zipfile.ZipFile(path) as archive,
        archive.open(f"wikitext-103/{name}") as file,
        io.TextIOWrapper(file, encoding="utf-8") as lines,
    ):
        yield lines


def prepare(
    dataset: str = "wikitext103",
    data_dir: str | None = None,
    manual_dir: str | None = None,
    *,
    quiet: bool = False,
) -> tfds.core.DatasetBuilder:
    """The builder with its data on disk, written now unless it was there.

    Args:
      dataset: "wikitext103" or "wikitext103_heldout_vocabulary".
      data_dir: where TFDS keeps its data; None means `$TFDS_DATA_DIR`, or
        `~/tensorflow_datasets`.
      manual_dir: folder with `wikitext-103-v1.zip`, or with the files of the splits;
        None: downloaded.
      quiet: without messages and bars.
    Raises:
      ValueError: a file is missing, cut off, or another one.
      OSError: it cannot be downloaded, or the data cannot be written.
    """
    if manual_dir is not None and not builders.is_prepared(
        _open(dataset, data_dir), dataset
    ):
        find(dataset, manual_dir)
    how = functools.partial(_open, dataset, data_dir, manual_dir)
    return builders.write(how, quiet=quiet)


def load(
    split: str, data_dir: str | None = None, dataset: str = "wikitext103"
) -> Int32[np.ndarray, " N"]:
    """The ids of the words of "train", "validation" or "test", prepared before.

    Args:
      split: one of the three; the held-out text has no "train".
      data_dir: as in `prepare`.
      dataset: as in `prepare`.
    Returns:
      [N] int32, read-only; 413 MB for "train".
    Raises:
      ValueError: no such split, or it was not prepared.
    """
    found = builders.source(_open(dataset, data_dir), split, dataset)
    return builders.joined(found, "tokens")


def vocabulary(
    data_dir: str | None = None, dataset: str = "wikitext103"
) -> Sequence[str]:
    """The words by id, as `load` numbers them; ValueError where it was not prepared."""
    builder = _open(dataset, data_dir)
    builders.require_prepared(builder, dataset)
    return builder.info.metadata["words"]


def _open(
    dataset: str, data_dir: str | None, manual_dir: str | None = None
) -> tfds.core.DatasetBuilder:
    if dataset not in TEXTS:
        raise ValueError(f"no text {dataset!r}; possible are {', '.join(TEXTS)}")
    return Wikitext103Words(
        config=dataset,
        data_dir=data_dir,
        manual_dir=manual_dir,
    )
