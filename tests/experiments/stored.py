"""Small data sets as TFDS stores them, and small archives as their builders want them."""

import io
import pathlib
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from experiments.data import enwik8, wikitext103

Example = Mapping[str, Any]


def store(dataset: str, splits: Mapping[str, Sequence[Example]], data_dir: str) -> None:
    """Writes examples as the builder of TFDS would; images are encoded, so without
    TensorFlow.
    """
    theirs = tfds.builder_cls(dataset)

    class Stored(theirs, skip_registration=True):
        name = dataset
        pkg_dir_path = theirs.pkg_dir_path  # where TFDS describes it

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, Example]]:
            yield from enumerate(splits[split])

    Stored(data_dir=data_dir, file_format="array_record").download_and_prepare()


def in_place_of_texts(patch: pytest.MonkeyPatch) -> None:
    """Random ids in place of the prepared texts, whose builders have tests of their own."""

    def load(split: str, data_dir: Any, dataset: str) -> np.ndarray:
        draw = np.random.default_rng(len(split))
        ids = 256 if dataset.startswith("enwik8") else wikitext103.HELD_OUT_WORDS
        return draw.integers(ids, size=2000).astype(np.int32)

    patch.setattr(enwik8, "load", load)
    patch.setattr(wikitext103, "load", load)


def png(image: np.ndarray) -> bytes:
    """An image, [H, W, 3] uint8, as PNG: no pixel changes."""
    return encoded(image, format="PNG")


def jpeg(image: np.ndarray) -> bytes:
    """An image, [H, W, 3] uint8, as JPEG of high quality."""
    return encoded(image, format="JPEG", quality=95, subsampling=0)


def encoded(image: np.ndarray, **how: Any) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, **how)
    return buffer.getvalue()


def tar(path: pathlib.Path, files: Mapping[str, bytes], mode: str = "w") -> bytes:
    """Writes a tar archive and returns its bytes."""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def cifar_records(images: np.ndarray, *labels: np.ndarray) -> bytes:
    """The binary format of CIFAR: labels, then the image channel by channel.

    Args:
      images: [N, 32, 32, 3] uint8.
      *labels: [N] each: one for CIFAR-10, coarse and fine for CIFAR-100.
    """
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    heads = [label.astype(np.uint8)[:, None] for label in labels]
    return np.concatenate([*heads, planes], axis=1).tobytes()
