"""Batches of images: order, shards, weights, resume, and the two augmentations.

The data sets are small ones of the same format, written without TensorFlow; what TFDS
makes of the archives is in test_prepare.py.
"""

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tarfile

import grain
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import real
import stored
from absl import flags

from experiments.data import builders, cifar, imagenet, images
from experiments.data.shard import Shard

# One of two processes: the images of its share of 37 batches of 2, and of one pass.
ONE_OF_TWO = """
import itertools, json, sys
from experiments.data import cifar
from experiments.data.shard import Shard

data_dir, number = sys.argv[1], int(sys.argv[2])
how = dict(rows=2, seed=5, data_dir=data_dir, normalised=False, shard=Shard(number, 2))
for loop in (True, False):
    batches = cifar.batches("train", loop=loop, **how)
    print(json.dumps([
        int(image[..., 0].max()) - 1
        for batch in itertools.islice(batches, 37)
        for image, weight in zip(batch["images"], batch["weights"])
        if weight
    ]))
assert not any(m.split(".")[0] == "tensorflow" for m in sys.modules)
"""
SIZE = 37  # images of the small CIFAR-10
SEED = 5


def numbered(number):
    """An image whose pixels say its number, row and column: [32, 32, 3]."""
    row, column = np.mgrid[1:33, 1:33]
    return np.stack([np.full((32, 32), number + 1), row, column], -1).astype(np.uint8)


@pytest.fixture(scope="module")
def cifar_dir(tmp_path_factory):
    """CIFAR-10 with `SIZE` training and 10 test images, by `numbered`."""
    data_dir = str(tmp_path_factory.mktemp("cifar"))
    splits = {
        split: [
            {
                "id": f"{split}_{number:05d}",
                "image": stored.png(numbered(number)),
                "label": number % 10,
            }
            for number in range(size)
        ]
        for split, size in (("train", SIZE), ("test", 10))
    }
    stored.store("cifar10", splits, data_dir)
    return data_dir


def collect(dataset, count=None):
    return list(itertools.islice(dataset, count))


def joined(batches, name):
    return np.concatenate([batch[name] for batch in batches])


def equal(batch, other):
    return batch.keys() == other.keys() and all(
        np.array_equal(batch[name], other[name]) for name in batch
    )


def train(data_dir, **changes):
    how = dict(rows=8, seed=SEED, loop=True, data_dir=data_dir, normalised=False)
    return cifar.batches("train", **how | changes)


def whose(batches):
    """Numbers of the images in batches of CIFAR: borders are 0, images are not."""
    return joined(batches, "images")[..., 0].max(axis=(1, 2)).astype(int) - 1


def test_every_image_comes_once_in_an_epoch_and_epochs_differ(cifar_dir):
    batches = collect(train(cifar_dir), 3 * SIZE // 8 + 1)
    numbers = whose(batches)[: 3 * SIZE].reshape(3, SIZE)
    for epoch in numbers:
        assert sorted(epoch) == list(range(SIZE))
    assert len({tuple(epoch) for epoch in numbers}) == 3
    assert joined(batches, "weights").min() == 1
    np.testing.assert_array_equal(joined(batches, "labels"), whose(batches) % 10)
    assert {batch["images"].shape for batch in batches} == {(8, 32, 32, 3)}
    assert {batch["labels"].dtype for batch in batches} == {np.dtype(np.int32)}
    other = whose(collect(train(cifar_dir, seed=SEED + 1), 10))
    # A neighbouring seed is not the same sequence an epoch later.
    assert not np.array_equal(other[:SIZE], numbers[1])


def test_one_pass_is_in_order_and_fills_up_the_last_batch(cifar_dir):
    batches = collect(
        cifar.batches("test", rows=4, seed=0, loop=False, data_dir=cifar_dir)
    )
    weights = joined(batches, "weights")
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, [1] * 10 + [0] * 2)
    assert joined(batches, "images").shape == (12, 32, 32, 3)
    decoded = cifar.load("test", cifar_dir)
    np.testing.assert_array_equal(joined(batches, "labels")[:10], decoded.labels)
    expected = images.normalise(
        decoded.images[:, 4:-4, 4:-4], cifar.STATISTICS["cifar10"]
    )
    np.testing.assert_array_equal(joined(batches, "images")[:10], expected)


@pytest.mark.parametrize("loop", [True, False])
def test_iterators_resume_exactly(cifar_dir, loop):
    dataset = train(cifar_dir, loop=loop, normalised=True)
    count = 12 if loop else 5
    whole = collect(dataset, count)
    iterator = iter(dataset)
    for _ in range(3):
        next(iterator)
    resumed = iter(dataset)
    resumed.set_state(iterator.get_state())
    rest = collect(resumed, count - 3)
    assert len(rest) == count - 3
    assert all(map(equal, whole[3:], rest))


@pytest.mark.parametrize("loop", [True, False])
def test_shards_are_disjoint_and_add_up_to_the_batches(cifar_dir, loop):
    whole = collect(train(cifar_dir, loop=loop), 5)
    shares = [
        collect(train(cifar_dir, loop=loop, shard=Shard(index, 2)), 5)
        for index in range(2)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [len(part["labels"]) for part in parts] == [4, 4]
        together = {n: np.concatenate([p[n] for p in parts]) for n in batch}
        assert equal(batch, together)
    real = [share["weights"] == 1 for share in map(_joined, shares)]
    one, two = (set(whose(s)[r]) for s, r in zip(shares, real, strict=True))
    if not loop:
        assert not one & two
        assert one | two == set(range(SIZE))


def test_two_processes_see_disjoint_shares_of_an_epoch(cifar_dir):
    children = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, cifar_dir, str(number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    (train_0, pass_0), (train_1, pass_1) = (
        map(json.loads, text.splitlines()) for text in said
    )
    # Row 0 of each batch is the first one's, row 1 the second one's.
    drawn = [n for pair in zip(train_0, train_1, strict=True) for n in pair]
    everything = list(range(SIZE))
    assert sorted(drawn[:SIZE]) == sorted(drawn[SIZE:]) == everything
    assert not set(pass_0) & set(pass_1)
    assert sorted(pass_0 + pass_1) == everything


def _joined(batches):
    return {name: joined(batches, name) for name in batches[0]}


def test_each_row_is_moved_and_mirrored_as_in_plain_numpy(cifar_dir):
    (batch,) = collect(train(cifar_dir, rows=64), 1)
    decoded = cifar.load("train", cifar_dir)
    indices = [images.order(SIZE, SEED)[n] for n in range(64)]
    drawn = images.draws(SEED, np.arange(64))
    seen = set()
    for row, index in enumerate(indices):
        image = decoded.images[index][4:36, 4:36]
        bordered = np.zeros((40, 40, 3), np.uint8)
        bordered[4:36, 4:36] = image
        top, left = int(drawn[row, 0]) % 9, int(drawn[row, 1]) % 9
        expected = bordered[top : top + 32, left : left + 32]
        if int(drawn[row, 2]) % 2:
            expected = expected[:, ::-1]
        np.testing.assert_array_equal(batch["images"][row], expected)
        seen.add((top, left, int(drawn[row, 2]) % 2))
    assert len(seen) > 40  # of 162


def test_draws_depend_on_seed_and_row_alone():
    whole = images.draws(3, np.arange(20))
    np.testing.assert_array_equal(images.draws(3, np.arange(7, 12)), whole[7:12])
    assert len(np.unique(whole)) == whole.size
    assert not np.array_equal(images.draws(4, np.arange(20)), whole)
    far = images.draws(3, np.arange(2**40, 2**40 + 3))
    np.testing.assert_array_equal(images.draws(3, np.array([2**40 + 2])), far[2:])


def test_draws_are_uniform():
    drawn = images.draws(0, np.arange(20_000))
    counts = np.bincount(drawn[:, 0] % 9, minlength=9)
    # Within five deviations of a binomial count.
    assert np.abs(counts - 20_000 / 9).max() < 5 * np.sqrt(20_000 * 8 / 81)
    assert abs((drawn[:, 2] & 1).sum() - 10_000) < 5 * np.sqrt(5_000)


def test_normalise_is_the_textbook_formula_in_numpy_and_jax():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3)).astype(np.uint8)
    statistics = images.Statistics((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    expected = (pixels / 255 - np.array(statistics.mean)) / np.array(
        statistics.deviation
    )
    made = images.normalise(pixels, statistics)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, expected, atol=1e-5)
    on_device = images.normalise(jnp.asarray(pixels), statistics)
    assert on_device.dtype == jnp.float32
    np.testing.assert_allclose(on_device, expected, atol=1e-5)


def test_validation_is_the_test_images_or_held_out_training_images(cifar_dir):
    def numbers(split, held_out):
        how = dict(rows=5, seed=0, loop=False, data_dir=cifar_dir, normalised=False)
        batches = collect(cifar.batches(split, held_out=held_out, **how))
        return whose(batches)[joined(batches, "weights") == 1].tolist()

    assert numbers("validation", 0) == numbers("test", 0) == numbers("test", 6)
    assert len(numbers("train", 0)) == SIZE
    kept, held = numbers("train", 6), numbers("validation", 6)
    assert (len(kept), len(held)) == (SIZE - 6, 6)
    assert sorted(kept + held) == list(range(SIZE))


def test_what_cannot_be_is_refused(cifar_dir, tmp_path):
    with pytest.raises(ValueError, match="no split 'valid'.*train, validation, test"):
        cifar.batches("valid", rows=4, seed=0, loop=True, data_dir=cifar_dir)
    with pytest.raises(ValueError, match=r"held_out \(37\)"):
        train(cifar_dir, held_out=37)
    with pytest.raises(ValueError, match="9 rows do not divide into 2"):
        train(cifar_dir, rows=9, shard=Shard(0, 2))
    with pytest.raises(ValueError, match="shard 2 of 2"):
        train(cifar_dir, shard=Shard(2, 2))
    with pytest.raises(ValueError, match=r"seed \(-1\)"):
        train(cifar_dir, seed=-1)
    with pytest.raises(ValueError, match="no 'cifar11'.*cifar10, cifar100"):
        train(cifar_dir, dataset="cifar11")
    missing = str(tmp_path)
    with pytest.raises(
        ValueError,
        match=f"cifar10 is not prepared in .*--dataset=cifar10 --data_dir={missing}`",
    ):
        train(missing)


def test_another_format_is_refused(tmp_path, cifar_dir):
    path = tmp_path / "cifar10"
    (version,) = (
        entry for entry in os.scandir(f"{cifar_dir}/cifar10") if entry.is_dir()
    )
    place = path / version.name
    place.mkdir(parents=True)
    for entry in pathlib.Path(version.path).iterdir():
        content = entry.read_bytes()
        if entry.name == "dataset_info.json":
            content = content.replace(b'"array_record"', b'"tfrecord"')
        (place / entry.name.replace("array_record", "tfrecord")).write_bytes(content)
    with pytest.raises(ValueError, match="tfrecord"):
        train(str(tmp_path))


def real_cifar10():
    data_dir = os.environ.get("TFDS_DATA_DIR")
    try:
        return data_dir if cifar.load("test", data_dir).labels.size == 10_000 else None
    except ValueError:
        return None


def test_the_real_cifar10_begins_as_it_should():
    if not (data_dir := real_cifar10()):
        pytest.skip("CIFAR-10 is not prepared in $TFDS_DATA_DIR")
    assert cifar.ids("train", 3, data_dir) == [
        "train_16399",
        "train_01680",
        "train_47917",
    ]


def test_the_real_cifar10_is_shuffled_as_tfds_does(tmp_path):
    """Names and labels are the real ones; where an image goes is a matter of its number."""
    labels = np.load(real.path("cifar10/cifar10_train_labels.npz"))["label"]
    assert labels.size == 50_000 and (np.bincount(labels) == 5000).all()
    image, data_dir = stored.png(numbered(0)), str(tmp_path)
    examples = [
        {"id": f"train_{number:05d}", "image": image, "label": int(label)}
        for number, label in enumerate(labels)
    ]
    stored.store("cifar10", {"train": examples}, data_dir)
    first = cifar.ids("train", 3, data_dir)
    assert first == ["train_16399", "train_01680", "train_47917"]
    source = builders.source(cifar._opened("cifar10", data_dir), "train", "cifar10")
    found = [source[number]["label"] for number in range(3)]
    assert found == labels[[16399, 1680, 47917]].tolist()


def test_the_real_test_images_of_cifar10_are_the_published_ones(tmp_path):
    packed = real.unpacked("cifar10/cifar10_test_images.npy.xz")
    decode = runpy.run_path(str(real.path("medxz.py")))["decode"]
    shots = decode(np.load(io.BytesIO(packed)))  # [10000, 32, 32, 3]
    labels = np.load(real.path("cifar10/cifar10_test_labels.npz"))["label"]
    records = stored.cifar_records(shots, labels)
    assert hashlib.md5(records).hexdigest() == cifar.MEMBERS["test_batch.bin"]
    some = range(0, 10_000, 100)
    examples = [
        {"id": f"test_{n:05d}", "image": stored.png(shots[n]), "label": int(labels[n])}
        for n in some
    ]
    stored.store("cifar10", {"train": examples[:1], "test": examples}, str(tmp_path))
    decoded = cifar.load("test", str(tmp_path))
    ids = cifar.ids("test", len(some), str(tmp_path))
    rows = [int(name.removeprefix("test_")) for name in ids]
    assert sorted(rows) == list(some)
    np.testing.assert_array_equal(decoded.images[:, 4:36, 4:36], shots[rows])
    np.testing.assert_array_equal(decoded.labels, labels[rows])
    # Those of GSE are of the training images; of test images they are nearly the same.
    mean = shots.mean(axis=(0, 1, 2)) / 255
    deviation = shots.std(axis=(0, 1, 2)) / 255
    known = cifar.STATISTICS["cifar10"]
    np.testing.assert_allclose(mean, known.mean, atol=0.005)
    np.testing.assert_allclose(deviation, known.deviation, atol=0.005)


# ImageNet


def scene(generator, height, width):
    """A smooth image, as JPEG keeps them: [H, W, 3] uint8."""
    coarse = generator.integers(0, 256, (4, 5, 3)).astype(np.uint8)
    image = PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.BICUBIC)
    return np.asarray(image)


@pytest.fixture(scope="module")
def imagenet_dir(tmp_path_factory):
    """ImageNet with 12 training and 5 validation images of several sizes."""
    data_dir = str(tmp_path_factory.mktemp("imagenet"))
    generator = np.random.default_rng(0)
    sizes = [(60, 80), (300, 400), (500, 375), (240, 900)]
    splits = {
        split: [
            {
                "file_name": f"{split}_{number}.JPEG",
                "image": stored.jpeg(scene(generator, *sizes[number % 4])),
                "label": 100 + number,
            }
            for number in range(size)
        ]
        for split, size in (("train", 12), ("validation", 5))
    }
    stored.store("imagenet2012", splits, data_dir)
    return data_dir


def imagenet_batches(data_dir, split="train", **changes):
    how = dict(rows=4, seed=SEED, loop=True, data_dir=data_dir, normalised=False)
    return imagenet.batches(split, **how | {"threads": 2} | changes)


def test_imagenet_epochs_shards_and_resume(imagenet_dir):
    dataset = imagenet_batches(imagenet_dir)
    whole = collect(dataset, 6)
    labels = joined(whole, "labels").reshape(2, 12)
    assert all(sorted(epoch) == list(range(100, 112)) for epoch in labels)
    assert whole[0]["images"].shape == (4, 224, 224, 3)
    assert whole[0]["images"].dtype == np.uint8
    iterator = iter(dataset)
    next(iterator), next(iterator)
    resumed = iter(dataset)
    resumed.set_state(iterator.get_state())
    assert all(map(equal, whole[2:], collect(resumed, 4)))
    shares = [
        collect(imagenet_batches(imagenet_dir, shard=Shard(index, 2)), 3)
        for index in range(2)
    ]
    for batch, *parts in zip(whole, *shares, strict=False):
        assert equal(batch, {n: np.concatenate([p[n] for p in parts]) for n in batch})


def test_imagenet_evaluation_drops_nothing(imagenet_dir):
    batches = collect(imagenet_batches(imagenet_dir, "validation", loop=False))
    np.testing.assert_array_equal(joined(batches, "weights"), [1] * 5 + [0] * 3)
    assert sorted(joined(batches, "labels")[:5]) == list(range(100, 105))
    floats = collect(
        imagenet_batches(imagenet_dir, "test", loop=False, normalised=True)
    )
    expected = images.normalise(joined(batches, "images"), imagenet.STATISTICS)
    np.testing.assert_array_equal(joined(floats, "images"), expected)


@pytest.fixture
def parsed_flags(monkeypatch):
    """Grain asks flags of absl about its workers, which a program has parsed."""
    monkeypatch.setitem(flags.FLAGS.__dict__, "__flags_parsed", True)


def children():
    """Ids of the worker processes of this one, all of whom Grain starts by spawning."""
    return {child.pid for child in multiprocessing.active_children()}


def test_worker_processes_go_on_where_none_were(imagenet_dir, parsed_flags):
    """And the other way: what is saved does not say who made the batches."""
    before = children()
    how = dict(side=32, threads=0)
    alone = iter(imagenet_batches(imagenet_dir, **how))
    batches = [next(alone), next(alone)]
    together = iter(imagenet_batches(imagenet_dir, workers=2, **how))
    assert together.get_state() == {"next_index": 0}
    together.set_state(json.loads(json.dumps(alone.get_state())))
    batches += [next(together) for _ in range(3)]
    assert len(children() - before) == 2
    alone.set_state(together.get_state())
    batches.append(next(alone))
    together.close()
    assert children() == before
    assert all(map(equal, collect(imagenet_batches(imagenet_dir, **how), 6), batches))
    with pytest.raises(ValueError, match="closed"):
        next(together)


@pytest.mark.slow
def test_worker_processes_give_the_same_batches_and_end(imagenet_dir, parsed_flags):
    before = children()
    alone = collect(imagenet_batches(imagenet_dir), 5)
    iterator = iter(imagenet_batches(imagenet_dir, workers=2))
    assert all(map(equal, alone, collect(iterator, 5)))
    iterator.set_state({"next_index": 1})
    assert equal(next(iterator), alone[1])
    del iterator  # as an evaluation leaves it
    assert children() == before


@pytest.mark.slow
def test_worker_processes_of_images_in_memory(cifar_dir, parsed_flags):
    alone = collect(train(cifar_dir), 6)
    assert all(map(equal, alone, collect(train(cifar_dir, workers=2), 6)))
    one_pass = collect(train(cifar_dir, loop=False, workers=2))  # 5 batches of 8
    assert all(map(equal, collect(train(cifar_dir, loop=False)), one_pass))
    assert len(one_pass) == 5


def test_threads_give_the_same_batches(cifar_dir):
    alone = collect(train(cifar_dir), 6)
    assert all(map(equal, alone, collect(train(cifar_dir, threads=3), 6)))


def test_random_parts_have_the_areas_and_ratios_asked_for():
    generator = np.random.default_rng(0)
    boxes = [imagenet.random_box(500, 375, generator) for _ in range(2000)]
    left, upper, right, lower = np.array(boxes).T
    assert left.min() >= 0 and upper.min() >= 0
    assert right.max() <= 500 and lower.max() <= 375
    share = (right - left) * (lower - upper) / (500 * 375)
    ratio = (right - left) / (lower - upper)
    # Sides are whole pixels.
    assert 0.079 < share.min() < 0.1 and share.max() > 0.9
    assert 0.73 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.36
    # The middle of the ratios is 1: as many wide as tall ones, where all fit.
    small = share < 0.5
    assert abs((ratio[small] > 1).mean() - 0.5) < 5 * 0.5 / np.sqrt(small.sum())


def test_a_part_of_an_extreme_image_is_the_largest_in_the_middle():
    # No draw fits a strip: the part would be higher than it.
    assert imagenet.random_box(1000, 10, np.random.default_rng(0)) == (493, 0, 506, 10)
    assert imagenet.random_box(10, 1000, np.random.default_rng(0)) == (0, 493, 10, 506)


def resized(image, box, size):
    """Bilinear interpolation with antialiasing, in plain NumPy: [size, size, 3]."""

    def weights(low, high, count):
        scale = (high - low) / size
        reach = max(scale, 1.0)
        centre = low + (np.arange(size) + 0.5) * scale
        distance = np.abs(np.arange(count) + 0.5 - centre[:, None]) / reach
        tent = np.maximum(0, 1 - distance)
        return tent / tent.sum(axis=1, keepdims=True)  # [size, count]

    left, upper, right, lower = box
    down = weights(upper, lower, image.shape[0])
    across = weights(left, right, image.shape[1])
    lines = np.tensordot(down, image.astype(float), (1, 0))  # [size, W, 3]
    return np.tensordot(lines, across, (1, 1)).transpose(0, 2, 1)


@pytest.mark.parametrize("size", [(300, 400), (120, 90), (1400, 1000)])
def test_a_random_part_is_resized_with_antialiasing(size):
    jpeg = stored.jpeg(scene(np.random.default_rng(1), *size))
    with PIL.Image.open(io.BytesIO(jpeg)) as image:
        pixels = np.asarray(image)
    mirrored = set()
    for seed in range(6):
        made = imagenet.augmented(jpeg, np.random.default_rng(seed))
        generator = np.random.default_rng(seed)
        box = imagenet.random_box(size[1], size[0], generator)
        expected = resized(pixels, box, 224)
        mirror = generator.random() < 0.5
        mirrored.add(mirror)
        difference = np.abs(made - (expected[:, ::-1] if mirror else expected))
        # Rounding twice; a JPEG decoded at half size is averaged in another way.
        assert difference.max() < 6, seed
        assert difference.mean() < 1, seed
    assert mirrored == {True, False}


@pytest.mark.parametrize("size", [(300, 400), (375, 500), (500, 333), (90, 60)])
def test_evaluation_resizes_and_cuts_the_middle(size):
    jpeg = stored.jpeg(scene(np.random.default_rng(2), *size))
    with PIL.Image.open(io.BytesIO(jpeg)) as image:
        pixels = np.asarray(image)
    short = min(size)
    # The middle 224 of 256, in pixels of the original.
    half = 112 * short / 256
    down, across = size[0] / 2, size[1] / 2
    box = (across - half, down - half, across + half, down + half)
    expected = resized(pixels, box, 224)
    difference = np.abs(imagenet.middle(jpeg) - expected)
    # The resized image has whole sides, so pixels lie up to half of one apart.
    assert difference.mean() < 1.5


@pytest.fixture(scope="module")
def photographs():
    """JPEGs of ImageNet by their names, every 40th class one."""
    file = "imagenet_samples/imagenet_sample_images_every40th_25.tar"
    with tarfile.open(real.path(file)) as archive:
        return {m.name: archive.extractfile(m).read() for m in archive.getmembers()}


def test_real_photographs_are_cut_as_in_plain_numpy(photographs):
    assert len(photographs) == 25
    halved = 0
    for number, jpeg in enumerate(photographs.values()):
        with PIL.Image.open(io.BytesIO(jpeg)) as image:
            pixels = np.asarray(image.convert("RGB"))
        size = np.array(pixels.shape[1::-1])  # width, height
        # The short side becomes 256, and 224 of both are cut out at whole pixels.
        whole = 256 * size // size.min()
        corner = np.round((whole - 224) / 2)
        box = np.concatenate([corner, corner + 224]) * np.tile(size / whole, 2)
        # Two roundings, one of each direction that is resized.
        assert np.abs(imagenet.middle(jpeg) - resized(pixels, box, 224)).max() < 1.5
        generator = np.random.default_rng(number % 2)
        part = imagenet.random_box(*size.tolist(), generator)
        expected = resized(pixels, part, 224)
        if generator.random() < 0.5:
            expected = expected[:, ::-1]
        made = imagenet.augmented(jpeg, np.random.default_rng(number % 2))
        reduced = min(part[2] - part[0], part[3] - part[1]) // 224 > 1
        halved += reduced
        # A JPEG that is decoded at half its size is averaged in another way.
        difference = np.abs(made - expected)
        assert difference.mean() < (3 if reduced else 0.5)
        assert difference.max() < (64 if reduced else 1.5)
    assert 0 < halved < 5


def test_real_photographs_are_stored_as_they_are_and_have_the_numbers_of_their_classes(
    photographs, tmp_path
):
    examples = [
        {"file_name": name, "image": jpeg, "label": name.partition("_")[0]}
        for name, jpeg in photographs.items()
    ]
    splits = {"train": examples, "validation": examples}
    stored.store("imagenet2012", splits, str(tmp_path))
    by_class = dict(zip(range(0, 1000, 40), photographs.values(), strict=True))
    batches = collect(imagenet_batches(str(tmp_path), "test", loop=False, rows=8))
    labels, weights = joined(batches, "labels"), joined(batches, "weights")
    assert sorted(labels[weights == 1]) == list(by_class)  # as their names are sorted
    for image, label in zip(joined(batches, "images"), labels, strict=True):
        np.testing.assert_array_equal(image, imagenet.middle(by_class[label]))
    (batch, *_) = collect(imagenet_batches(str(tmp_path), rows=8), 1)
    for row, label in enumerate(batch["labels"]):
        generator = np.random.default_rng((SEED, row))
        made = imagenet.augmented(by_class[label], generator)
        np.testing.assert_array_equal(batch["images"][row], made)


def test_grey_jpegs_become_three_channels():
    grey = PIL.Image.fromarray(np.full((300, 300), 77, np.uint8))
    buffer = io.BytesIO()
    grey.save(buffer, format="JPEG")
    for made in (
        imagenet.middle(buffer.getvalue()),
        imagenet.augmented(buffer.getvalue(), np.random.default_rng(0)),
    ):
        assert made.shape == (224, 224, 3)
        assert np.abs(made.astype(int) - 77).max() <= 1


@pytest.mark.parametrize("name", ["threads", "workers"])
def test_threads_and_workers_must_be_possible(imagenet_dir, cifar_dir, name):
    for batches, data_dir in ((imagenet_batches, imagenet_dir), (train, cifar_dir)):
        with pytest.raises(ValueError, match=rf"{name} \(-1\).* at least 0"):
            batches(data_dir, **{name: -1})
        assert isinstance(batches(data_dir, **{name: 0}), grain.IterDataset)
