"""The builders of enwik8 and WikiText-103, on small texts of the same form, and streams
of what they store."""

import functools
import hashlib
import http.server
import io
import itertools
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import real

from experiments import prepare as commands
from experiments.data import enwik8, files, stream, vocabulary, wikitext103
from experiments.data.shard import Shard

# Prepares and reads a text in a process that would show an import of TensorFlow.
WITHOUT_TENSORFLOW = """
import sys
from experiments.data import wikitext103

name, data_dir, manual_dir = sys.argv[1:]
text = wikitext103.TEXTS[name]
text.tokens = {"validation": 7, "test": 4}
wikitext103.KNOWN = {}
wikitext103.prepare(name, data_dir, manual_dir, quiet=True)
assert wikitext103.load("test", data_dir, name).size == 4
assert not any(m.split(".")[0] == "tensorflow" for m in sys.modules)
"""


def known(content, algorithm="sha256"):
    digest = hashlib.new(algorithm, content).hexdigest()
    return files.Known(len(content), digest, algorithm)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files of a folder without a word."""

    def log_message(self, *arguments):
        del arguments


@pytest.fixture
def web(tmp_path):
    """A folder, and the address at which its files can be downloaded."""
    folder = tmp_path / "web"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


# enwik8


def shrink(monkeypatch, content, name="enwik8"):
    """Makes a small text the published one, 80 % of it training text."""
    text, size = enwik8.TEXTS[name], len(content)
    ends = {"train": size * 8 // 10, "validation": size * 9 // 10, "test": size}
    monkeypatch.setattr(text, "known", known(content))
    monkeypatch.setattr(text, "checked", size)
    monkeypatch.setattr(text, "ends", ends)
    return ends


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A text of 1,000 bytes, in the user's folder."""
    content = np.random.default_rng(0).bytes(1000)
    shrink(monkeypatch, content)
    monkeypatch.setattr("experiments.data.builders.CHUNK", 96)
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "enwik8").write_bytes(content)
    return content


def prepare(tmp_path, name="enwik8"):
    where = str(tmp_path / "data"), str(tmp_path / "manual")
    return enwik8.prepare(name, *where, quiet=True)


def test_published_sizes():
    full, prefix = enwik8.TEXTS["enwik8"], enwik8.TEXTS["enwik8_prefix4m"]
    assert list(full.ends.values()) == [90_000_000, 95_000_000, 100_000_000]
    assert full.known.size == full.checked == 100_000_000
    assert full.known.digest.startswith("2b49720e")
    assert list(prefix.ends.values()) == [3_754_064, 3_954_064, 4_154_064]
    assert (prefix.known.size, prefix.checked) == (4_154_064, 1_000_000)


def test_splits_are_the_text_in_order(small, tmp_path):
    prepare(tmp_path)
    splits = ("train", "validation", "test")
    parts = [enwik8.load(split, str(tmp_path / "data")) for split in splits]
    assert [part.size for part in parts] == [800, 100, 100]
    assert {part.dtype for part in parts} == {np.dtype(np.uint8)}
    assert np.concatenate(parts).tobytes() == small


def test_an_archive_serves_as_well(small, tmp_path):
    path = tmp_path / "manual" / "enwik8"
    with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as made:
        made.write(path, "enwik8")
    path.unlink()
    prepare(tmp_path)
    assert enwik8.load("test", str(tmp_path / "data")).tobytes() == small[900:]


def test_it_is_downloaded_without_a_folder(small, web, monkeypatch, tmp_path):
    folder, address = web
    with zipfile.ZipFile(folder / "enwik8.zip", "w") as made:
        made.writestr("enwik8", small)
    monkeypatch.setattr(enwik8, "URL", f"{address}/enwik8.zip")
    enwik8.prepare("enwik8", str(tmp_path / "data"), quiet=True)
    assert enwik8.load("test", str(tmp_path / "data")).tobytes() == small[900:]


def zipped(content):
    """The bytes of an archive as the one of enwik8 is."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", content)
    return made.getvalue()


def flipped(content):
    """One bit of the byte in the middle is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]


DAMAGES = {"flipped": flipped, "cut": lambda b: b[:-100], "empty": lambda b: b""}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda t: zipped(t[:-1]), "holds 999 bytes of text, expected 1,000"),
        (lambda t: zipped(flipped(t)), "sha256 is .*, expected"),
        *((lambda t, d=d: d(zipped(t)), "cut off or dam") for d in DAMAGES.values()),
    ],
    ids=["short", "other", *DAMAGES],
)
def test_a_wrong_download_is_refused_and_thrown_away(
    small, web, monkeypatch, tmp_path, wrong, said
):
    folder, address = web
    (folder / "enwik8.zip").write_bytes(wrong(small))
    monkeypatch.setattr(enwik8, "URL", f"{address}/enwik8.zip")
    with pytest.raises(ValueError, match=rf"\.zip .*{said}.* downloads it anew"):
        enwik8.prepare("enwik8", str(tmp_path / "data"), quiet=True)
    # The next try downloads anew.
    (folder / "enwik8.zip").write_bytes(zipped(small))
    enwik8.prepare("enwik8", str(tmp_path / "data"), quiet=True)
    assert enwik8.load("test", str(tmp_path / "data")).tobytes() == small[900:]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t[:-1], "has 999 bytes, expected 1,000: it is cut off"),
        (lambda t: t + b"!", "has 1,001 bytes, expected 1,000: it is another file"),
        (lambda t: bytes([t[0] ^ 1]) + t[1:], "sha256 is .*, expected "),
    ],
)
def test_a_cut_or_wrong_file_is_refused_and_leaves_nothing(
    small, tmp_path, damage, said
):
    path = tmp_path / "manual" / "enwik8"
    path.write_bytes(damage(small))
    with pytest.raises(ValueError, match=f"{path} .*{said}"):
        prepare(tmp_path)
    assert not list((tmp_path / "data").glob("enwik8_bytes/enwik8/*"))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_archive_of_the_user_is_refused_and_stays(small, tmp_path, damage):
    (tmp_path / "manual" / "enwik8").unlink()
    path = tmp_path / "manual" / "enwik8.zip"
    path.write_bytes(damage(zipped(small)))
    with pytest.raises(ValueError, match=f"^{path} is cut off or damaged .*; get it"):
        prepare(tmp_path)
    assert path.read_bytes() == damage(zipped(small))
    assert not list((tmp_path / "data").glob("enwik8_bytes/enwik8/*"))


def test_wherever_an_archive_is_damaged_the_text_is_whole_or_refused(
    monkeypatch, tmp_path
):
    """Each byte changed, and each length: zipfile has eight kinds of errors for them."""
    content = b"".join(b"<page>%d</page>\n" % (n * n) for n in range(60))
    shrink(monkeypatch, content)
    path, whole, text = tmp_path / "enwik8.zip", zipped(content), enwik8.TEXTS["enwik8"]
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        packed = archive.getinfo("enwik8").compress_size
    damaged = [(None, whole[:at]) for at in range(len(whole))]
    for at, byte in enumerate(whole):
        for bit in (1, 4, 255):
            damaged.append((at, whole[:at] + bytes([byte ^ bit]) + whole[at + 1 :]))
    harmless = set()
    for at, each in damaged:
        path.write_bytes(each)
        try:
            enwik8.check(path, text)
        except ValueError as error:
            said = str(error)
            assert said.startswith(f"{path} ") and said.endswith("; get it again")
        else:
            harmless.add(at)
            with enwik8._opened(path) as file:
                assert file.read() == content
    # Headers say times and versions too, and the packed text's first and last byte
    # where it ends.
    start = len("enwik8") + zipfile.sizeFileHeader
    assert harmless and None not in harmless
    assert not harmless & set(range(start + 1, start + packed - 1))


def test_missing_files_are_named(small, tmp_path):
    (tmp_path / "manual" / "enwik8").unlink()
    with pytest.raises(
        ValueError, match=r"manual has no enwik8 and no enwik8.zip; .*mattmahoney"
    ):
        prepare(tmp_path)
    with pytest.raises(ValueError, match="has no enwik8_prefix4m; .*first 4,154,064"):
        prepare(tmp_path, "enwik8_prefix4m")
    (tmp_path / "manual").rmdir()
    with pytest.raises(ValueError, match="manual does not exist"):
        prepare(tmp_path)
    with pytest.raises(ValueError, match="cannot be downloaded: give --manual_dir"):
        enwik8.prepare("enwik8_prefix4m", str(tmp_path))
    with pytest.raises(ValueError, match="no text 'enwik9'.*enwik8, enwik8_prefix4m"):
        enwik8.load("train", str(tmp_path), "enwik9")


def test_a_prefix_is_checked_as_far_as_it_is_known(monkeypatch, tmp_path):
    content = np.random.default_rng(1).bytes(500)
    shrink(monkeypatch, content, "enwik8_prefix4m")
    text = enwik8.TEXTS["enwik8_prefix4m"]
    digest = hashlib.sha256(content[:200]).hexdigest()
    monkeypatch.setattr(text, "known", files.Known(500, digest))
    monkeypatch.setattr(text, "checked", 200)
    path = tmp_path / "enwik8_prefix4m"
    path.write_bytes(content)
    enwik8.check(path, text)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="holds 499 bytes of text, expected 500"):
        enwik8.check(path, text)
    path.write_bytes(content[:199] + bytes([content[199] ^ 1]) + content[200:])
    with pytest.raises(ValueError, match=f"expected {digest}"):
        enwik8.check(path, text)


def test_what_was_not_prepared_names_the_command(tmp_path):
    with pytest.raises(ValueError, match=f"--dataset=enwik8 --data_dir={tmp_path}`"):
        enwik8.load("train", str(tmp_path))


def test_what_is_prepared_is_not_prepared_again(small, tmp_path):
    first = prepare(tmp_path)
    (tmp_path / "manual" / "enwik8").unlink()
    assert prepare(tmp_path).data_path == first.data_path


def test_the_real_prefix_of_enwik8(tmp_path):
    content = real.unpacked("enwik8/enwik8_first_4154064_bytes.xz")
    assert len(content) == 4_154_064
    path = tmp_path / "enwik8_prefix4m"
    path.write_bytes(content)
    data_dir = str(tmp_path / "data")
    said = commands.prepare("enwik8_prefix4m", data_dir, str(tmp_path))
    assert said.startswith(
        "enwik8_prefix4m: 3,754,064 bytes of train, 200,000 bytes of validation, "
        "200,000 bytes of test in "
    )
    parts = [
        enwik8.load(split, data_dir, "enwik8_prefix4m")
        for split in ("train", "validation", "test")
    ]
    assert [part.size for part in parts] == [3_754_064, 200_000, 200_000]
    assert np.concatenate(parts).tobytes() == content
    assert content.startswith(b"<mediawiki ")
    changed = content[:999_999] + bytes([content[999_999] ^ 1]) + content[1_000_000:]
    path.write_bytes(changed)
    with pytest.raises(ValueError, match="enwik8_prefix4m is damaged .* 369b6889"):
        enwik8.check(path, enwik8.TEXTS["enwik8_prefix4m"])


@pytest.mark.slow
def test_a_text_of_full_size(monkeypatch, tmp_path):
    """100 MB by the real ends and chunks."""
    block = np.random.default_rng(0).integers(0, 256, 999_983).astype(np.uint8)
    content = np.resize(block, 100_000_000)  # of a period that no chunk divides
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "enwik8").write_bytes(content)
    text = enwik8.TEXTS["enwik8"]
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(text, "known", files.Known(100_000_000, digest))
    prepare(tmp_path)
    start = 0
    for split, size in (
        ("train", 90_000_000),
        ("validation", 5_000_000),
        ("test", 5_000_000),
    ):
        part = enwik8.load(split, str(tmp_path / "data"))
        assert part.size == size
        np.testing.assert_array_equal(part, content[start : start + size])
        start += size


# WikiText-103

TRAIN = " \n = A title = \n \n b a b <unk> a b \n c <unk> \n"
VALIDATION = " a b \n \n <unk> c \n"
TEST = " b b \n c\n"
TOKENS = {"train": 17, "validation": 7, "test": 5}
WORDS = ["<eos>", "b", "=", "a", "<unk>", "A", "title", "c"]


@pytest.fixture
def wiki(monkeypatch, tmp_path):
    """Three small texts in the user's folder, as if they were the published ones."""
    texts = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
    (tmp_path / "manual").mkdir()
    for split, text in texts.items():
        path = tmp_path / "manual" / wikitext103.NAMES[split]
        path.write_text(text, encoding="utf-8")
    held_out = {s: known(texts[s].encode()) for s in ("validation", "test")}
    monkeypatch.setattr(wikitext103, "KNOWN", held_out)
    full = wikitext103.TEXTS["wikitext103"]
    monkeypatch.setattr(full, "tokens", TOKENS)
    monkeypatch.setattr(full, "words", len(WORDS))
    part = wikitext103.TEXTS["wikitext103_heldout_vocabulary"]
    monkeypatch.setattr(part, "tokens", {s: TOKENS[s] for s in held_out})
    monkeypatch.setattr("experiments.data.builders.CHUNK", 4 * 5)  # of 5 words
    return texts


def prepare_wiki(tmp_path, name="wikitext103"):
    where = str(tmp_path / "data"), str(tmp_path / "manual")
    return wikitext103.prepare(name, *where, quiet=True)


def read_wiki(tmp_path, split, name="wikitext103"):
    """The words of a split, by ids and vocabulary."""
    words = wikitext103.vocabulary(str(tmp_path / "data"), name)
    tokens = wikitext103.load(split, str(tmp_path / "data"), name)
    assert tokens.dtype == np.int32
    return [words[token] for token in tokens]


def test_published_counts():
    full = wikitext103.TEXTS["wikitext103"]
    assert full.tokens == {
        "train": 103_227_021,
        "validation": 217_646,
        "test": 245_569,
    }
    assert full.words == 267_735
    part = wikitext103.TEXTS["wikitext103_heldout_vocabulary"]
    assert "train" not in part.tokens and part.words is None


def test_words_lines_and_vocabulary(wiki, tmp_path):
    prepare_wiki(tmp_path)
    # By frequency; of equals, the first in the text.
    assert list(wikitext103.vocabulary(str(tmp_path / "data"))) == WORDS
    for split, text in wiki.items():
        lines = text.splitlines()
        expected = [word for line in lines for word in (*line.split(), "<eos>")]
        assert read_wiki(tmp_path, split) == expected
        assert len(expected) == TOKENS[split]


def test_an_archive_of_the_words_serves_as_well(wiki, monkeypatch, tmp_path):
    path = tmp_path / "manual" / wikitext103.ARCHIVE
    with zipfile.ZipFile(path, "w") as archive:
        for split, name in wikitext103.NAMES.items():
            (tmp_path / "manual" / name).unlink()
            archive.writestr(f"wikitext-103/{name}", wiki[split])
    monkeypatch.setattr(wikitext103, "ZIPPED", known(path.read_bytes()))
    prepare_wiki(tmp_path)
    assert read_wiki(tmp_path, "test") == ["b", "b", "<eos>", "c", "<eos>"]
    monkeypatch.setattr(wikitext103, "ZIPPED", known(b"another"))
    other = tmp_path / "other"
    with pytest.raises(ValueError, match=r"wikitext-103-v1\.zip.*it is another file"):
        wikitext103.prepare("wikitext103", str(other), str(tmp_path / "manual"))


@pytest.fixture
def archive(wiki, monkeypatch):
    """The bytes of the archive of the words, as if it were the published one."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, name in wikitext103.NAMES.items():
            archive.writestr(f"wikitext-103/{name}", wiki[split])
    monkeypatch.setattr(wikitext103, "ZIPPED", known(made.getvalue()))
    return made.getvalue()


def test_the_archive_of_the_words_is_downloaded(archive, web, monkeypatch, tmp_path):
    folder, address = web
    (folder / wikitext103.ARCHIVE).write_bytes(archive)
    monkeypatch.setattr(wikitext103, "URL", f"{address}/{wikitext103.ARCHIVE}")
    wikitext103.prepare("wikitext103", str(tmp_path / "data"), quiet=True)
    assert read_wiki(tmp_path, "test") == ["b", "b", "<eos>", "c", "<eos>"]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_archive_of_the_words_is_refused(
    archive, web, monkeypatch, tmp_path, damage
):
    folder, address = web
    monkeypatch.setattr(wikitext103, "URL", f"{address}/{wikitext103.ARCHIVE}")
    monkeypatch.setattr(wikitext103, "ZIPPED", wikitext103.ZIPPED._replace(size=None))
    path = tmp_path / "manual" / wikitext103.ARCHIVE
    for split in wikitext103.NAMES:
        (tmp_path / "manual" / wikitext103.NAMES[split]).unlink()
    for where in (path, folder / wikitext103.ARCHIVE):
        where.write_bytes(damage(archive))
    with pytest.raises(ValueError, match=f"^{path} is damaged .*; get it again$"):
        prepare_wiki(tmp_path)
    assert path.exists()
    data_dir = str(tmp_path / "data")
    with pytest.raises(ValueError, match="is damaged .* downloads it anew"):
        wikitext103.prepare("wikitext103", data_dir, quiet=True)
    (folder / wikitext103.ARCHIVE).write_bytes(archive)
    wikitext103.prepare("wikitext103", data_dir, quiet=True)
    assert read_wiki(tmp_path, "test") == ["b", "b", "<eos>", "c", "<eos>"]


def test_held_out_text_alone_has_a_name_and_a_vocabulary_of_its_own(wiki, tmp_path):
    name = "wikitext103_heldout_vocabulary"
    (tmp_path / "manual" / wikitext103.NAMES["train"]).unlink()
    with pytest.raises(ValueError, match=r"has no wikitext-103-v1.zip; .*wiki.train"):
        prepare_wiki(tmp_path)
    prepare_wiki(tmp_path, name)
    words = wikitext103.vocabulary(str(tmp_path / "data"), name)
    assert list(words) == ["<eos>", "b", "c", "a", "<unk>"]
    assert read_wiki(tmp_path, "validation", name)[:3] == ["a", "b", "<eos>"]
    with pytest.raises(ValueError, match="no split 'train'.*validation, test"):
        wikitext103.load("train", str(tmp_path / "data"), name)
    with pytest.raises(ValueError, match="wikitext103 is not prepared"):
        wikitext103.load("test", str(tmp_path / "data"))


def rewrite(tmp_path, split, text):
    (tmp_path / "manual" / wikitext103.NAMES[split]).write_text(text)


def test_a_cut_or_wrong_text_is_refused(wiki, tmp_path, monkeypatch):
    rewrite(tmp_path, "validation", VALIDATION.replace("a", "c"))
    with pytest.raises(ValueError, match=r"wiki.valid.tokens is damaged .*sha256"):
        prepare_wiki(tmp_path)
    rewrite(tmp_path, "validation", VALIDATION)
    rewrite(tmp_path, "train", TRAIN[:-10])
    with pytest.raises(ValueError, match=r"wiki.train.tokens has \d+ words.* 17"):
        prepare_wiki(tmp_path)
    rewrite(tmp_path, "train", TRAIN.replace("title", "A"))
    with pytest.raises(ValueError, match="has 7 different words .*expected 8"):
        prepare_wiki(tmp_path)
    rewrite(tmp_path, "train", TRAIN.replace("c", "d"))
    with pytest.raises(ValueError, match=r"1 words .* not in the vocabulary, as 'c'"):
        prepare_wiki(tmp_path)
    assert not list((tmp_path / "data").glob("wikitext103_words/wikitext103/*"))


def test_the_real_held_out_texts_of_wikitext103(tmp_path):
    texts = {}
    for split, name in (("validation", "valid"), ("test", "test")):
        content = real.unpacked(f"wikitext/wikitext-103.{name}.tokens.xz")
        (tmp_path / wikitext103.NAMES[split]).write_bytes(content)
        texts[split] = content.decode()
    name, data_dir = "wikitext103_heldout_vocabulary", str(tmp_path / "data")
    said = commands.prepare(name, data_dir, str(tmp_path))
    assert said.startswith(
        f"{name}: 217,646 words of validation, 245,569 words of test in "
    )
    words = np.array(wikitext103.vocabulary(data_dir, name), object)
    assert len(words) == wikitext103.HELD_OUT_WORDS == 28_441
    counts = np.zeros(len(words), int)
    for split, text in texts.items():
        ids = wikitext103.load(split, data_dir, name)
        expected = text.replace("\n", " <eos> ").split()
        assert words[ids].tolist() == expected
        counts += np.bincount(ids, minlength=len(words))
    # The most frequent first, but for the end of a line.
    assert list(words[:4]) == ["<eos>", "the", ",", "."]
    assert counts.min() > 0 and (np.diff(counts[1:]) <= 0).all()


def test_preparing_words_takes_no_tensorflow(tmp_path):
    (tmp_path / "wiki.valid.tokens").write_text("a b \n \n c d \n")
    (tmp_path / "wiki.test.tokens").write_text("a b c\n")
    name, data_dir = "wikitext103_heldout_vocabulary", str(tmp_path / "data")
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, name, data_dir, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ties_keep_the_order_of_appearance_over_texts():
    one, two = vocabulary.count(["x y", "z"]), vocabulary.count(["y q", "q x z"])
    assert vocabulary.by_frequency([one]) == ["<eos>", "x", "y", "z"]
    assert vocabulary.by_frequency([one, two]) == ["<eos>", "x", "y", "z", "q"]


# Streams


def collect(dataset, count=None):
    return list(itertools.islice(dataset, count))


def test_ids_of_words_stream_like_bytes():
    tokens = np.arange(1000, 1101, dtype=np.int32)
    (batch,) = collect(
        stream.segments(tokens, rows=2, segment=50, seed=0, loop=False), 1
    )
    assert batch["inputs"].dtype == batch["targets"].dtype == np.int32
    np.testing.assert_array_equal(batch["inputs"].ravel(), tokens[:-1])
    np.testing.assert_array_equal(batch["targets"].ravel(), tokens[1:])


@pytest.mark.parametrize("loop", [True, False])
def test_shards_of_a_stream_add_up_to_it(loop):
    tokens = np.random.default_rng(0).integers(0, 9999, 1003).astype(np.int32)
    how = dict(rows=6, segment=7, seed=2, loop=loop)
    whole = collect(stream.segments(tokens, **how), 30)
    shares = [
        collect(stream.segments(tokens, shard=Shard(index, 3), **how), 30)
        for index in range(3)
    ]
    for batch, *parts in zip(whole, *shares, strict=True):
        for name, array in batch.items():
            np.testing.assert_array_equal(
                np.concatenate([part[name] for part in parts]), array
            )
            assert all(part[name].shape[0] == 2 for part in parts)


def test_a_share_must_be_possible():
    tokens = np.zeros(100, np.int32)
    how = dict(segment=2, seed=0, loop=True)
    with pytest.raises(ValueError, match="6 rows do not divide into 4 equal"):
        stream.segments(tokens, rows=6, shard=Shard(0, 4), **how)
    with pytest.raises(ValueError, match="shard -1 of 2"):
        stream.segments(tokens, rows=6, shard=Shard(-1, 2), **how)
