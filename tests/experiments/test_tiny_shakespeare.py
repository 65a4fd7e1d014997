"""The shipped text, its TFDS builder, and the streams cut from it."""

import hashlib
import itertools
import subprocess
import sys

import numpy as np
import pytest

from experiments.data import stream, tiny_shakespeare

# One split, read as the train loop does, in a process that would show an import of
# TensorFlow or a word on the terminal.
READ_WITHOUT_TENSORFLOW = """
import socket, sys

def refuse(*args, **kwargs):
    raise OSError("the network is not needed")

socket.socket.connect = refuse
from experiments.data import tiny_shakespeare

text = tiny_shakespeare.load("test", sys.argv[1])
assert text.size == 55_770, text.size
assert not any(m.split(".")[0] == "tensorflow" for m in sys.modules)
"""


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


def collect(dataset, count=None):
    return list(itertools.islice(dataset, count))


def equal(batch, other):
    return batch.keys() == other.keys() and all(
        np.array_equal(batch[name], other[name]) for name in batch
    )


def test_shipped_text_is_whole():
    text = tiny_shakespeare.read_text(tiny_shakespeare.TEXT)
    assert len(text) == 1_115_394
    assert hashlib.sha256(text).hexdigest().startswith("86c4e6aa")
    assert text.startswith(b"First Citizen:\nBefore we proceed any further")


@pytest.mark.parametrize(
    "damage", [lambda t: t[:-1], lambda t: t.replace(b"\n", b"\r")]
)
def test_damaged_text_is_refused_by_its_hash(tmp_path, damage):
    path = tmp_path / "text.txt"
    path.write_bytes(damage(tiny_shakespeare.TEXT.read_bytes()))
    with pytest.raises(ValueError, match="text.txt.*sha256.*expected.*86c4e6aa"):
        tiny_shakespeare.read_text(path)


def test_splits_are_the_text_in_order(data_dir):
    parts = [
        tiny_shakespeare.load(s, data_dir) for s in ("train", "validation", "test")
    ]
    assert [part.size for part in parts] == [1_003_854, 55_770, 55_770]
    assert np.concatenate(parts).tobytes() == tiny_shakespeare.read_text(
        tiny_shakespeare.TEXT
    )


def test_unknown_split_names_the_splits(data_dir):
    with pytest.raises(ValueError, match="'valid'.*train, validation, test"):
        tiny_shakespeare.load("valid", data_dir)


def test_preparing_takes_no_tensorflow_no_network_and_prints_nothing(tmp_path):
    command = [sys.executable, "-c", READ_WITHOUT_TENSORFLOW, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    (version,) = tmp_path.glob("tiny_shakespeare_bytes/*")
    assert len(list(version.glob("*.array_record-*"))) == 3


def test_another_process_may_finish_first(tmp_path, monkeypatch):
    generate = tiny_shakespeare.TinyShakespeare._split_generators

    def overtaken(self, dl_manager):
        monkeypatch.undo()
        tiny_shakespeare.prepare(str(tmp_path))
        return generate(self, dl_manager)

    monkeypatch.setattr(
        tiny_shakespeare.TinyShakespeare, "_split_generators", overtaken
    )
    assert tiny_shakespeare.load("test", str(tmp_path)).size == 55_770
    # Nothing half done is left beside it.
    assert len(list(tmp_path.glob("tiny_shakespeare_bytes/*"))) == 1


def test_text_that_is_damaged_leaves_nothing_behind(tmp_path, monkeypatch):
    short = tmp_path / "short.txt"
    short.write_bytes(b"First Citizen:")
    monkeypatch.setattr(tiny_shakespeare, "TEXT", short)
    with pytest.raises(ValueError, match="14 bytes with sha256"):
        tiny_shakespeare.prepare(str(tmp_path / "data"))
    assert not list(tmp_path.glob("data/tiny_shakespeare_bytes/*"))


def test_rows_go_on_where_they_stopped():
    text = np.arange(101, dtype=np.uint8)
    ring = stream.segments(text, rows=3, segment=4, seed=0, loop=True)
    batches = collect(ring, 8)  # an epoch: 101 // (3 * 4)
    inputs = np.concatenate([b["inputs"] for b in batches], axis=1)  # [3, 32]
    targets = np.concatenate([b["targets"] for b in batches], axis=1)
    weights = np.concatenate([b["weights"] for b in batches], axis=1)
    assert inputs.shape == targets.shape == (3, 32)
    np.testing.assert_array_equal(targets, (inputs + 1) % 101)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    assert len(set(inputs.ravel())) == 96  # no byte twice in an epoch
    np.testing.assert_array_equal(weights, inputs != 100)  # nothing follows the last


def test_each_epoch_has_an_offset_of_its_own_and_a_start():
    text = np.arange(100, dtype=np.uint8)
    ring = stream.segments(text, rows=2, segment=5, seed=7, loop=True)
    batches = collect(ring, 50)
    starts = [b["start"].tolist() for b in batches]
    assert [i for i, s in enumerate(starts) if s == [True, True]] == [0, 10, 20, 30, 40]
    assert sum(map(sum, starts)) == 10
    assert len({batches[i]["inputs"][0, 0] for i in range(0, 50, 10)}) > 2
    other = stream.segments(text, rows=2, segment=5, seed=8, loop=True)
    assert not equal(batches[0], next(iter(other)))


@pytest.mark.parametrize("loop", [True, False])
def test_iterator_resumes_exactly(loop):
    text = np.random.default_rng(0).integers(256, size=997).astype(np.uint8)
    dataset = stream.segments(text, rows=4, segment=16, seed=3, loop=loop)
    whole = collect(dataset, 40)
    iterator = iter(dataset)
    for _ in range(11):
        next(iterator)
    resumed = iter(dataset)
    resumed.set_state(iterator.get_state())
    rest = collect(resumed, 29)
    assert len(whole) == (40 if loop else 16)
    assert len(rest) == len(whole) - 11
    assert all(map(equal, whole[11:], rest))


@pytest.mark.parametrize("size", [2, 3, 17, 64, 65, 66, 1000, 1001])
@pytest.mark.parametrize(("rows", "segment"), [(1, 1), (1, 16), (4, 16), (7, 5)])
def test_one_pass_counts_every_byte_once(size, rows, segment):
    text = np.random.default_rng(size).integers(256, size=size).astype(np.uint8)
    batches = collect(
        stream.segments(text, rows=rows, segment=segment, seed=0, loop=False)
    )
    weights = np.concatenate([b["weights"] for b in batches], axis=1)  # [B, steps T]
    inputs = np.concatenate([b["inputs"] for b in batches], axis=1)
    targets = np.concatenate([b["targets"] for b in batches], axis=1)
    # Row after row, what counts is the text in order.
    np.testing.assert_array_equal(targets[weights == 1], text[1:])
    np.testing.assert_array_equal(inputs[weights == 1], text[:-1])
    assert weights.sum() == size - 1
    assert all(b["inputs"].shape == (rows, segment) for b in batches)
    assert [b["start"].all() for b in batches] == [True] + [False] * (len(batches) - 1)


def test_streams_refuse_what_cannot_be():
    text = np.zeros(64, np.uint8)
    with pytest.raises(ValueError, match="64 tokens.*4 rows.*segments of 16.*takes 65"):
        stream.segments(text, rows=4, segment=16, seed=0, loop=True)
    with pytest.raises(ValueError, match=r"segment \(0\)"):
        stream.segments(text, rows=4, segment=0, seed=0, loop=True)
    with pytest.raises(ValueError, match=r"seed \(-1\)"):
        stream.segments(text, rows=1, segment=1, seed=-1, loop=True)
