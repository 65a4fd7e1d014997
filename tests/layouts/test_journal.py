"""The reservoir's base and records: nothing is lost, and what is broken is named."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from journal_writer import after, first, left

import topkast_jax as tk

PARAMS = {"one": {"kernel": jax.random.normal(jax.random.key(0), (3, 12, 20))}}


def written(folder: Path, records: int) -> tk.Journal:
    journal = tk.Journal(folder)
    journal.begin(tk.Store({"kernel": first()}))
    for number in range(1, records + 1):
        journal.append({"kernel": left(number)})
    return journal


def theta(journal: tk.Journal, records: int) -> np.ndarray:
    return journal.load(records).theta["kernel"]


@pytest.mark.parametrize("structure", [tk.unstructured, tk.blocks(4, 5)])
def test_records_tell_what_refreshes_did(tmp_path, structure):
    method = tk.top_kast(0.8, 0.6, refresh=tk.every(1), structure=structure)
    axes = tk.axes({"*": "s i o"})
    tx = tk.sparse(optax.adam(0.3), method, layout="packed", axes=axes)
    params, state, store = tk.start(tx, PARAMS)
    journal = tk.Journal(tmp_path / "reservoir")
    journal.begin(store)
    store = tk.Store(store.theta, journal=journal)
    moments = []
    for t in range(5):
        grads = jax.tree.map(lambda x, t=t: jnp.cos(9 * x + t), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        params, state, store = tk.refresh(tx, params, state, store)
        inside = np.asarray(tk.dense_masks(state).backward["one"]["kernel"])
        grid = tk.masks(state).forward["one"]["kernel"].grid
        moments.append((grid.to_units(inside), store.theta["one/kernel"].copy()))
    assert journal.records == 5
    for records, (inside, whole) in enumerate(moments, 1):
        found = journal.load(records).theta["one/kernel"]
        # What is in B lies on the device, and in the checkpoint.
        np.testing.assert_array_equal(found[~inside], whole[~inside])
    sizes = [f.stat().st_size for f in (tmp_path / "reservoir").glob("*.bin")]
    assert max(sizes) < store.nbytes / 2


def test_a_record_grows_with_b_and_not_with_theta(tmp_path):
    journal = written(tmp_path / "r", 1)
    (record,) = (tmp_path / "r").glob("record-*")
    places, values = left(1)
    assert record.stat().st_size < places.nbytes + values.nbytes + 200
    np.testing.assert_array_equal(theta(journal, 1), after(1))


def test_compaction_changes_nothing_and_drops_what_no_checkpoint_needs(tmp_path):
    journal = written(tmp_path / "r", 6)
    journal.tidy(oldest=4, share=0.0)
    journal.wait()
    # A base after record 6; record 4 still needs the first one.
    for records in (4, 5, 6):
        np.testing.assert_array_equal(theta(journal, records), after(records))
    journal.append({"kernel": left(7)})
    journal.tidy(oldest=6, share=9.0)
    journal.wait()
    names = sorted(f.name for f in (tmp_path / "r").iterdir())
    assert names == ["base-00000006", "record-00000007.bin"]
    again = tk.Journal(tmp_path / "r")
    assert again.records == 7
    np.testing.assert_array_equal(theta(again, 7), after(7))
    with pytest.raises(ValueError, match="has no base for record 5"):
        again.load(5)


def test_rewinding(tmp_path):
    journal = written(tmp_path / "r", 5)
    journal.compact(4)
    journal.rewind(3)
    assert journal.records == 3
    journal.append({"kernel": left(4)})
    np.testing.assert_array_equal(theta(tk.Journal(tmp_path / "r"), 4), after(4))


def test_in_files(tmp_path):
    journal = written(tmp_path / "r", 2)
    store = journal.load(2, mapped=tmp_path / "theta")
    np.testing.assert_array_equal(store.theta["kernel"], after(2))
    store.theta["kernel"][0, 0] = -1.0  # the base does not change with it
    np.testing.assert_array_equal(theta(journal, 2), after(2))
    assert tk.load_store(tmp_path / "theta").theta["kernel"][0, 0] == -1.0


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-9] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("record-00000002.bin", cut, "record-00000002.bin.* is cut short"),
        ("record-00000002.bin", flip, "record-00000002.bin.* has changed"),
        ("record-00000001.bin", os.remove, "record-00000001.bin.*No such file"),
        ("base-00000000/0.bin", cut, "0.bin, the reservoir of 'kernel'.* cut short"),
        ("base-00000000/0.bin", flip, "0.bin, the reservoir of 'kernel', has changed"),
    ],
)
def test_what_is_broken_is_named(tmp_path, name, harm, message):
    journal = written(tmp_path / "r", 3)
    harm(tmp_path / "r" / name)
    with pytest.raises(ValueError, match=message):
        journal.load(3)


def test_another_models_record_is_refused(tmp_path):
    journal = written(tmp_path / "r", 1)
    journal.append({"other": left(2)})
    with pytest.raises(ValueError, match="of another model: it tells of 'other'"):
        journal.load(2)


@pytest.mark.parametrize(
    "seconds", [0.05, 0.3, pytest.param(1.0, marks=pytest.mark.slow)]
)
def test_killed_at_any_moment(tmp_path, seconds):
    """kill -9 while records are written and bases compacted: what was said is there."""
    writer = Path(__file__).parent / "journal_writer.py"
    child = subprocess.Popen(
        [sys.executable, str(writer), str(tmp_path / "r")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    said = int(child.stdout.readline())
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    rest, _ = child.communicate()
    said = int([said, *rest.split()][-1])
    journal = tk.Journal(tmp_path / "r")
    assert said <= journal.records <= said + 1
    for records in range(max(0, said - 2), said + 1):
        np.testing.assert_array_equal(theta(journal, records), after(records))
    journal.rewind(said)
    assert not list((tmp_path / "r").glob("*.tmp"))
    journal.append({"kernel": left(said + 1)})
    journal.tidy(oldest=said, share=0.0)
    journal.wait()
    np.testing.assert_array_equal(theta(journal, said + 1), after(said + 1))
