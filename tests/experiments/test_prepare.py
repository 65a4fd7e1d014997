"""The command that prepares data sets: what it takes, what it refuses, what it says.

Archives are small ones of the same format. Preparing images needs TensorFlow, so those
tests are skipped where it is not installed, as in CI.
"""

import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import PIL.Image
import pytest
import requests
import stored
import tensorflow_datasets as tfds

from experiments import prepare
from experiments.data import builders, cifar, files, imagenet

needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None,
    reason="TFDS prepares images with TensorFlow, which is not installed",
)
FOLDER = "cifar-10-batches-bin/"


def pictures(count, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)


@pytest.fixture
def cifar10(monkeypatch, tmp_path):
    """The path of an archive with 3 images in each file, as if it were published."""
    contents, members = {}, {}
    for number, name in enumerate(cifar.MEMBERS):
        labels = (np.arange(3) + number) % 10
        contents[FOLDER + name] = stored.cifar_records(pictures(3, number), labels)
        members[name] = hashlib.md5(contents[FOLDER + name]).hexdigest()
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    contents[FOLDER + "batches.meta.txt"] = "\n".join([*names, ""]).encode()
    monkeypatch.setattr(cifar, "MEMBERS", members)
    path = tmp_path / "manual" / "cifar-10-binary.tar.gz"
    path.parent.mkdir()
    stored.tar(path, contents, "w:gz")
    return path


def check(path, dataset="cifar10"):
    ((_, known),) = tfds.builder_cls(dataset).url_infos.items()
    cifar.check(path, dataset, files.Known(int(known.size), known.checksum))


def repack(path, change):
    """Writes an archive anew, with (name, content) of each file changed; None: left out."""
    contents = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.removeprefix(FOLDER)
            content = change(name, archive.extractfile(member).read())
            if content is not None:
                contents[member.name] = content
    stored.tar(path, contents, "w:gz")


def test_the_published_files_of_cifar10_are_accepted_however_packed(cifar10):
    check(cifar10)
    repack(cifar10, lambda name, content: content)
    check(cifar10)


@pytest.mark.parametrize("kept", [0, 100, -100])
def test_a_cut_archive_is_refused(cifar10, kept):
    cifar10.write_bytes(cifar10.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{cifar10} is cut off or damaged"):
        check(cifar10)


def test_an_archive_with_other_files_is_refused(cifar10):
    def flip(name, content):
        first = content[0] ^ (name == "data_batch_3.bin")
        return bytes([first]) + content[1:]

    whole = cifar10.read_bytes()
    repack(cifar10, flip)
    with pytest.raises(ValueError, match=r"data_batch_3\.bin is damaged .*md5 is"):
        check(cifar10)
    cifar10.write_bytes(whole)
    repack(cifar10, lambda n, c: None if n == "test_batch.bin" else c)
    with pytest.raises(ValueError, match=r"lacks test_batch\.bin"):
        check(cifar10)


def test_cifar100_is_the_published_archive(cifar10):
    other = cifar10.rename(cifar10.with_name("cifar-100-binary.tar.gz"))
    with pytest.raises(ValueError, match=r"bytes, expected 168,513,733: it is cut off"):
        check(other, "cifar100")


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ("cifar10", r"has no cifar-10-binary.tar.gz; put there .*cs\.toronto\.edu"),
        ("cifar100", r"has no cifar-100-binary.tar.gz; put there .*cs\.toronto\.edu"),
        ("imagenet2012", r"has no ILSVRC2012_img_train.tar; put there .*image-net.org"),
        ("enwik8", r"has no enwik8 and no enwik8.zip; put there .*mattmahoney"),
        ("wikitext103", r"has no wikitext-103-v1.zip; put there .*smerity"),
        ("tiny_shakespeare", "is shipped with the project: leave out --manual_dir"),
    ],
)
def test_a_missing_archive_is_named(tmp_path, dataset, said):
    with pytest.raises(ValueError, match=said):
        prepare.prepare(dataset, str(tmp_path / "data"), str(tmp_path))


def test_imagenet_needs_both_archives_and_a_registration(tmp_path):
    with pytest.raises(ValueError, match="registration: get .*_train.tar and .*_val"):
        prepare.prepare("imagenet2012", str(tmp_path))
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has no ILSVRC2012_img_val\.tar"):
        prepare.prepare("imagenet2012", str(tmp_path / "data"), str(tmp_path))


def test_a_cut_imagenet_archive_is_refused(tmp_path, monkeypatch):
    for name in imagenet.ARCHIVES:
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(builders, "require_tensorflow", lambda dataset: None)
    with pytest.raises(
        ValueError,
        match=r"_train\.tar has 1 bytes, expected 147,897,477,120: it is cut",
    ):
        prepare.prepare("imagenet2012", str(tmp_path / "data"), str(tmp_path))


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_without_tensorflow_images_say_what_to_install(tmp_path, monkeypatch, dataset):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "tensorflow" else find(n)
    )
    with pytest.raises(ValueError, match=r"needs TensorFlow .*pip install .*prepare"):
        prepare.prepare(dataset, str(tmp_path))


def test_unknown_data_sets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mnist: possible are cifar10, .*, tiny_sh"):
        prepare.prepare("mnist", str(tmp_path))


def test_a_failed_download_points_to_manual_dir(tmp_path, monkeypatch):
    def fail(*where):
        raise requests.ConnectionError("Max retries exceeded")

    broken = prepare.DATASETS["enwik8"]._replace(prepare=fail)
    monkeypatch.setitem(prepare.DATASETS, "enwik8", broken)
    with pytest.raises(OSError, match="Max retries .*by hand and give --manual_dir"):
        prepare.prepare("enwik8", str(tmp_path))


def test_it_says_what_there_is(tmp_path):
    said = prepare.prepare("tiny_shakespeare", str(tmp_path))
    assert said.startswith(
        "tiny_shakespeare: 1,003,854 bytes of train, 55,770 bytes of validation"
    )
    assert said.endswith(f"in {tmp_path}/tiny_shakespeare_bytes/1.0.0")


def run_command(tmp_path):
    arguments = [
        "--dataset=enwik8",
        f"--data_dir={tmp_path}",
        f"--manual_dir={tmp_path}",
    ]
    command = [sys.executable, "-m", "experiments.prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_ends_with_one_line_and_code_2(tmp_path):
    done = run_command(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path} has no enwik8 and no enwik8.zip; put")


def test_the_command_names_a_damaged_archive(tmp_path):
    path = tmp_path / "enwik8.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", b"abc " * 1000)
    whole = path.read_bytes()
    path.write_bytes(whole[:45] + bytes([whole[45] ^ 255]) + whole[46:])
    done = run_command(tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {path} is cut off or damaged (")
    assert line.endswith("; get it again")


@needs_tensorflow
def test_cifar10_from_an_archive(cifar10, tmp_path):
    data_dir = str(tmp_path / "data")
    said = prepare.prepare("cifar10", data_dir, str(cifar10.parent))
    assert said.startswith("cifar10: 15 images of train, 3 images of test")
    decoded, ids = cifar.load("train", data_dir), cifar.ids("train", 15, data_dir)
    for row, name in enumerate(ids):
        file, number = divmod(int(name.removeprefix("train_")), 3)
        expected = pictures(3, file)[number]
        np.testing.assert_array_equal(decoded.images[row, 4:36, 4:36], expected)
        assert decoded.labels[row] == (number + file) % 10
    assert sorted(ids) == [f"train_{number:05d}" for number in range(15)]
    # Nothing is left of what was extracted, and TFDS knows its own checksum again.
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["cifar10"]
    ((_, known),) = tfds.builder_cls("cifar10").url_infos.items()
    assert known.checksum.startswith("c4a38c50")


@needs_tensorflow
def test_cifar100_has_fine_labels(tmp_path, monkeypatch):
    path = tmp_path / "cifar-100-binary.tar.gz"
    fine = np.array([99, 3, 42])
    folder = "cifar-100-binary/"
    records = stored.cifar_records(pictures(3), fine // 5, fine)
    contents = {folder + name: records for name in ("train.bin", "test.bin")}
    for kind, count in (("coarse", 20), ("fine", 100)):
        names = "".join(f"{kind}{number}\n" for number in range(count))
        contents[f"{folder}{kind}_label_names.txt"] = names.encode()
    stored.tar(path, contents, "w:gz")
    cls = tfds.builder_cls("cifar100")
    ((url, _),) = cls.url_infos.items()
    made = {url: tfds.download.checksums.compute_url_info(path)}
    monkeypatch.setattr(cls, "url_infos", made)
    data_dir = str(tmp_path / "data")
    prepare.prepare("cifar100", data_dir, str(tmp_path))
    decoded = cifar.load("train", data_dir, "cifar100")
    assert sorted(decoded.labels) == [3, 42, 99]
    (batch,) = cifar.batches(
        "test", rows=3, seed=0, loop=False, data_dir=data_dir, dataset="cifar100"
    )
    assert sorted(batch["labels"]) == [3, 42, 99]


@needs_tensorflow
def test_imagenet_from_archives(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    classes = ("n01440764", "n15075141")  # the first and the last
    shots = {
        f"{name}_{number}.JPEG": stored.jpeg(pictures(1, number)[0])
        for name in classes
        for number in range(2)
    }
    inner = {
        f"{name}.tar": stored.tar(
            tmp_path / "inner.tar",
            {file: shot for file, shot in shots.items() if file.startswith(name)},
        )
        for name in classes
    }
    validation = {
        f"ILSVRC2012_val_0000000{number}.JPEG": stored.jpeg(
            generator.integers(0, 256, (40, 50, 3)).astype(np.uint8)
        )
        for number in (1, 2, 3)
    }
    known = {}
    for name, contents in zip(imagenet.ARCHIVES, (inner, validation), strict=True):
        whole = stored.tar(tmp_path / name, contents)
        digest = hashlib.md5(whole).hexdigest()
        known[name] = files.Known(len(whole), digest, "md5")
    monkeypatch.setattr(imagenet, "ARCHIVES", known)
    data_dir = str(tmp_path / "data")
    said = prepare.prepare("imagenet2012", data_dir, str(tmp_path))
    assert said.startswith("imagenet2012: 4 images of train, 3 images of validation")
    # The labels of the first validation images are published: 65, 970, 230 by WordNet.
    how = dict(rows=4, seed=0, loop=False, data_dir=data_dir, normalised=False)
    (train,) = imagenet.batches("train", **how)
    assert sorted(train["labels"]) == [0, 0, 999, 999]
    (batch,) = imagenet.batches("test", **how)
    np.testing.assert_array_equal(batch["weights"], [1, 1, 1, 0])
    assert sorted(batch["labels"][:3]) == [65, 230, 970]
    stored_bytes = {
        example["file_name"].decode(): example["image"]
        for example in tfds.data_source(
            "imagenet2012",
            split="train",
            data_dir=data_dir,
            download=False,
            decoders={"image": tfds.decode.SkipDecoding()},
        )
    }
    assert stored_bytes == shots  # JPEGs are stored as they are
    with PIL.Image.open(io.BytesIO(shots["n01440764_0.JPEG"])) as image:
        assert image.size == (32, 32)
