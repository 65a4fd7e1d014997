"""Checkpoints: whole, sealed, restored in parts, never silently replaced."""

import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import topkast_jax as tk
from experiments.checkpoint import Checkpoints
from experiments.state import State

ROOT = pathlib.Path(__file__).parents[2]
TX = tk.sparse(optax.adamw(1e-3), tk.top_kast(0.75, 0.5))


@functools.cache
def make_state(seed: int, size: int = 8) -> State:
    key = jax.random.key(seed)
    params = {
        "layer": {"kernel": jax.random.normal(key, (size, 6)), "bias": jnp.ones((6,))},
        "list": [jnp.arange(3.0)],
    }
    return State(params, TX.init(params), {"memory": jnp.full((4, 2), float(seed))})


def abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def assert_same(one: Any, two: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (10, 20):
            data = {"next_index": 3 * step}
            checkpoints.save(step, make_state(step), data, {"config": {"a": step}})
    return tmp_path


def restore(workdir: pathlib.Path) -> tuple[Any, list[str]]:
    said: list[str] = []
    with Checkpoints(workdir, warn=said.append) as checkpoints:
        found = checkpoints.restore(lambda meta: abstract(make_state(0)))
    return found, said


def test_round_trip(saved: pathlib.Path) -> None:
    found, said = restore(saved)
    assert_same(found.state, make_state(20))
    assert found.data == {"next_index": 60}
    assert found.meta["step"] == 20 and found.meta["config"] == {"a": 20}
    assert found.meta["arrays"]["masks"]["forward/layer/kernel"] == "bool[8,6]"
    assert said == []


def test_nothing_there(tmp_path: pathlib.Path) -> None:
    found, _ = restore(tmp_path)
    assert found is None
    assert list(tmp_path.iterdir()) == []


def test_an_empty_carry_and_a_dense_run(tmp_path: pathlib.Path) -> None:
    params = {"kernel": jnp.ones((3, 3))}
    state = State(params, optax.sgd(0.1).init(params), ())
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, {})
        assert_same(checkpoints.restore(lambda meta: abstract(state)).state, state)
        weights = checkpoints.weights(lambda meta: (abstract(params), []))
    assert jax.tree.leaves(weights.masks.forward) == []
    assert_same(weights.params, params)


def test_weights_without_the_optimizer(saved: pathlib.Path) -> None:
    """The optimizer's item may be gone altogether."""
    for step in (10, 20):
        folder = saved / "checkpoints" / str(step)
        shutil.rmtree(folder / "opt_state")
        (folder / "sha256.json").unlink()
    found = Checkpoints(saved).weights(
        lambda meta: (abstract(make_state(0).params), [])
    )
    state = make_state(20)
    assert found is not None
    assert_same(found.params, state.params)
    assert_same(found.masks.forward, tk.masks(state.opt_state).forward)


def largest(folder: pathlib.Path) -> pathlib.Path:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda folder: flip(largest(folder / "params")),
    "a short file": lambda folder: os.truncate(largest(folder / "opt_state"), 9),
    "a lost file": lambda folder: largest(folder / "carry").unlink(),
    "a lost part": lambda folder: shutil.rmtree(folder / "data"),
    "broken meta": lambda folder: (folder / "meta" / "metadata").write_text("{"),
    "a broken seal": lambda folder: (folder / "sha256.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_falls_back_loudly(saved: pathlib.Path, damage: str) -> None:
    DAMAGE[damage](saved / "checkpoints" / "20")
    found, said = restore(saved)
    assert found.meta["step"] == 10
    assert_same(found.state, make_state(10))
    text = "\n".join(said)
    assert "checkpoint 20 cannot be read" in text
    assert "falling back from checkpoint 20 to 10" in text
    assert (saved / "damaged" / "20").is_dir()  # nothing is lost
    assert Checkpoints(saved).steps() == [10]


def test_reading_weights_moves_nothing(saved: pathlib.Path) -> None:
    flip(largest(saved / "checkpoints" / "20" / "params"))
    said: list[str] = []
    reader = Checkpoints(saved, warn=said.append)
    found = reader.weights(lambda meta: (abstract(make_state(0).params), []))
    assert found is not None and found.meta["step"] == 10
    assert any("falling back from checkpoint 20 to 10" in line for line in said)
    assert reader.steps() == [10, 20]


def test_none_readable_is_an_error_and_keeps_them(saved: pathlib.Path) -> None:
    for step in (10, 20):
        flip(largest(saved / "checkpoints" / str(step) / "params"))
    with pytest.raises(ValueError, match="no checkpoint in .* can be read"):
        restore(saved)
    assert Checkpoints(saved).steps() == [10, 20]


def test_an_intact_checkpoint_of_another_program(saved: pathlib.Path) -> None:
    """Whole, but of other shapes: an error, not damage."""
    checkpoints = Checkpoints(saved)
    with pytest.raises(ValueError, match="'layer/kernel' is float32.8,6. in the"):
        checkpoints.restore(lambda meta: abstract(make_state(0, size=9)))
    assert checkpoints.steps() == [10, 20]


def test_a_refused_config_is_not_damage(saved: pathlib.Path) -> None:
    def refuse(meta: Any) -> Any:
        raise ValueError(f"not {meta['config']}")

    with pytest.raises(ValueError, match="not {'a': 20}"):
        Checkpoints(saved).restore(refuse)


def test_saving_a_step_twice_keeps_the_first(saved: pathlib.Path) -> None:
    with Checkpoints(saved, keep=3) as checkpoints:
        checkpoints.save(20, make_state(5), {}, {})
    assert_same(restore(saved)[0].state, make_state(20))


def test_old_ones_go(tmp_path: pathlib.Path) -> None:
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {}, {})
    assert Checkpoints(tmp_path).steps() == [2, 3]


def test_keep_one_is_too_few(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="keep=1"):
        Checkpoints(tmp_path, keep=1)


def test_half_a_save_is_no_checkpoint(saved: pathlib.Path) -> None:
    """What a kill within a save leaves: Orbax's temporary folder, and no seal."""
    folder = saved / "checkpoints"
    shutil.copytree(folder / "20", folder / "30.orbax-checkpoint-tmp")
    (folder / "20" / "sha256.json").unlink()
    found, said = restore(saved)
    assert found.meta["step"] == 20 and said == []
    with Checkpoints(saved, keep=3) as checkpoints:
        checkpoints.save(30, make_state(30), {}, {})
    assert_same(restore(saved)[0].state, make_state(30))


@pytest.mark.slow
def test_kill_nine_during_saves(tmp_path: pathlib.Path) -> None:
    """Killed at any moment, the newest complete checkpoint is whole."""
    program = textwrap.dedent("""
        import sys
        import jax.numpy as jnp
        from experiments.checkpoint import Checkpoints
        from experiments.state import State
        checkpoints = Checkpoints(sys.argv[1], keep=2)
        for step in range(1, 10_000):
            params = {"w": jnp.full((1 << 20,), float(step))}
            checkpoints.save(step, State(params, (), ()), {"step": step}, {})
            print(step, flush=True)
    """)
    target = {"w": jax.ShapeDtypeStruct((1 << 20,), jnp.float32)}
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: x.update(sharding=where), target)
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        with subprocess.Popen(
            [sys.executable, "-c", program, str(folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout is not None
            for _ in range(4 + attempt):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        said: list[str] = []
        checkpoints = Checkpoints(folder, warn=said.append)
        found = checkpoints.restore(lambda meta: State(target, (), ()))
        assert found is not None and said == []
        step = found.meta["step"]
        assert step == checkpoints.steps()[-1] and found.data == {"step": step}
        np.testing.assert_array_equal(found.state.params["w"], float(step))
