"""The papers' configs: arguments, anchors, and that their smallest forms train."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import stored
from absl import flags
from runs import ROOT, assert_same_run, raw, rows

import topkast_jax as tk
from configs import cifar as cifar_config
from configs import common, enwik8_transformer_xl, imagenet_resnet50
from configs import wikitext103_transformer_xl as wikitext_config
from experiments import evaluate, jobs, optimizer, tasks
from experiments import mesh as meshes
from experiments.assembly import assemble
from experiments.config import Watched, require_all_read
from experiments.train import train

CONFIGS = {
    "imagenet": imagenet_resnet50,
    "cifar": cifar_config,
    "enwik8": enwik8_transformer_xl,
    "wikitext103": wikitext_config,
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """CIFAR-10 and ImageNet of a few noisy images, as TFDS stores them."""
    data_dir = str(tmp_path_factory.mktemp("pictures"))
    draw = np.random.default_rng(0)

    def examples(split: str, size: int, side: int, name: str, kind: Any) -> list[Any]:
        return [
            {
                name: f"{split}_{number:05d}",
                "image": kind(draw.integers(256, size=(side, side, 3), dtype=np.uint8)),
                "label": number % 10,
            }
            for number in range(size)
        ]

    sizes = {"train": 40, "test": 10}
    stored.store(
        "cifar10",
        {s: examples(s, n, 32, "id", stored.png) for s, n in sizes.items()},
        data_dir,
    )
    sizes = {"train": 12, "validation": 5}
    stored.store(
        "imagenet2012",
        {s: examples(s, n, 48, "file_name", stored.jpeg) for s, n in sizes.items()},
        data_dir,
    )
    return data_dir


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "cifar" else [pytest.mark.slow])
        for name in CONFIGS
    ],
)
def test_the_smallest_form_trains_is_killed_goes_on_and_is_evaluated(
    name: str,
    pictures: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored.in_place_of_texts(monkeypatch)
    config = CONFIGS[name].get_config("smoke")
    if config.task == "classification":
        config.data.data_dir = pictures
    cache = config.compilation_cache = str(tmp_path / "compiled")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    outcome = train(config, whole)
    assert outcome.step == config.steps
    task = tasks.make(config)  # says what its batches are, without data
    batch = next(iter(task.batches("train", seed=0, loop=True)))
    assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {
        k: (x.shape, x.dtype) for k, x in (task.batch or {}).items()
    }

    killed(name, pictures, cache, str(parts))
    train(config, parts)
    assert_same_run(whole, parts)
    step, found = evaluate.from_workdir(str(parts), "test")
    assert step == config.steps and np.isfinite(found["loss"])
    if name != "enwik8":  # there, and in "wikitext103", the split differs
        assert found.keys() == outcome.metrics.keys()
    assert any("churn" in row for row in rows(whole, "train"))  # a refresh was within


def killed(name: str, *arguments: str) -> None:
    """A run in a process of its own, which gets kill -9 in its last step."""
    program = pathlib.Path(__file__).with_name("killed_worker.py")
    module = CONFIGS[name].__name__.removeprefix("configs.")
    done = subprocess.run(
        [sys.executable, str(program), module, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )  # returns when all are gone that hold its stderr
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


@pytest.mark.slow
def test_workers_end_with_a_run_that_is_killed_and_it_goes_on_as_without_them(
    pictures: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(flags.FLAGS.__dict__, "__flags_parsed", True)
    config = cifar_config.get_config("smoke")
    config.data.data_dir = pictures
    cache = config.compilation_cache = str(tmp_path / "compiled")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config, whole)
    killed("cifar", pictures, cache, str(parts), "2")
    config.data.workers = 2
    train(config, parts)
    assert_same_run(whole, parts)
    assert not multiprocessing.active_children()


def test_batch_statistics_are_of_all_devices(
    pictures: str, tmp_path: pathlib.Path
) -> None:
    """A run on four devices, two rows each, has the running statistics of one device."""
    config = cifar_config.get_config("smoke")
    config.data.data_dir = pictures
    train(config, tmp_path / "one")
    flags = os.environ.get("XLA_FLAGS", "")
    several = f"{flags} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train",
         "--config=configs/cifar.py:smoke", "--config.mesh=data:4",
         f"--config.data.data_dir={pictures}", f"--workdir={tmp_path / 'four'}"],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": several},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, four = (raw(tmp_path / name)["carry"] for name in ("one", "four"))
    assert len(jax.tree.leaves(one)) > 10
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 1e-5), one, four)


@pytest.mark.parametrize(
    "layout", [pytest.param("masked", marks=pytest.mark.slow), "packed"]
)
def test_a_whole_run_in_bfloat16(
    layout: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations alone: parameters and moments stay, and the loss is near float32's."""
    stored.in_place_of_texts(monkeypatch)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config = enwik8_transformer_xl.get_config(f"smoke,layout={layout}")
        config.model.dtype = dtype
        state = train(config, tmp_path / dtype).state
        held = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x, jnp.floating)]
        assert {x.dtype for x in held} <= {jnp.dtype("float32"), jnp.dtype(dtype)}
        weights = jax.tree.leaves((state.params, state.opt_state))
        assert not any(x.dtype == jnp.bfloat16 for x in weights)
        losses[dtype] = [row["loss"] for row in rows(tmp_path / dtype, "train")]
    assert losses["bfloat16"] != losses["float32"]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.01)


@pytest.mark.parametrize("size", ["12", pytest.param("24", marks=pytest.mark.slow)])
def test_the_long_memory_of_an_evaluation_is_the_text_at_once(
    size: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 2100 and 3800 positions, segments of 80 and 128 see all of 2000 bytes."""
    stored.in_place_of_texts(monkeypatch)
    config = enwik8_transformer_xl.get_config("smoke")
    config.eval_batches = None
    published = enwik8_transformer_xl.SIZES[size]["evaluation"]
    config.evaluation = published | dict(rows=1)
    state = train(config, tmp_path).state
    _, found = evaluate.from_workdir(str(tmp_path), "test")
    config.evaluation = dict(rows=1, segment=2000, memory=0, clamp=published["clamp"])
    alpha = tk.export(state.params, state.opt_state)
    task, mesh = tasks.make(config), meshes.make(config.mesh)
    at_once = evaluate.evaluator(task, mesh)(alpha, "test")
    assert found == pytest.approx(at_once, rel=1e-5)
    config.evaluation = dict(rows=1, segment=published["segment"], memory=16)
    short = evaluate.evaluator(tasks.make(config), mesh)(alpha, "test")
    assert short != pytest.approx(at_once, rel=1e-5)


FORMS = [
    *(
        (method, ",tiny")
        for method in ("dense", "top_kast", "rigl", "gse", "magnitude")
    ),
    (
        "top_kast",
        "",
    ),  # plans of large networks take seconds, and by method differ little
]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("method", "form"), FORMS)
def test_every_key_is_read_and_every_form_can_be_built(
    name: str, method: str, form: str
) -> None:
    config = CONFIGS[name].get_config(f"method={method}{form}")
    cfg = Watched(config)
    run = assemble(cfg)
    assert (run.method is None) == (method == "dense")
    for key in ("name", "steps", "seed", "log_every", "eval_every", "eval_batches",
                "save_every", "keep", "on_nan", "dense_steps", "profile",
                "compilation_cache"):  # fmt: skip
        assert key in cfg and cfg.get(key, ...) is not ...  # read by the loop
    require_all_read(cfg)


def test_a_multiplier_moves_every_anchor() -> None:
    once, twice = (
        imagenet_resnet50.get_config(f"method=rigl,multiplier={m}") for m in (1, 2)
    )
    assert (once.steps, once.learning_rate.boundaries) == (32000, (9384, 21895, 28151))
    assert twice.steps == 64000 and twice.sparse.refresh_stop == 50_000
    for key in ("boundaries", "warmup"):
        found = np.asarray(twice.learning_rate[key])
        np.testing.assert_allclose(
            found, 2 * np.asarray(once.learning_rate[key]), atol=1
        )
    # Epochs 80 and 120 of 200, at 390.625 steps each.
    config = cifar_config.get_config("method=gse,size=vit,dataset=cifar100")
    assert config.steps == 78125
    assert config.learning_rate.boundaries == (31250, 46875)
    assert config.sparse.refresh_stop == 46875 and config.learning_rate.peak == 0.01
    config = enwik8_transformer_xl.get_config("size=24,multiplier=0.5")
    assert config.steps == 200_000 and config.learning_rate.warmup == 2000


@pytest.mark.parametrize("name", CONFIGS)
def test_arguments_that_are_none(name: str) -> None:
    with pytest.raises(ValueError, match="config argument size=7 is none of"):
        CONFIGS[name].get_config("size=7")
    with pytest.raises(ValueError, match=r"multiplier=-1.0 must be positive"):
        CONFIGS[name].get_config("multiplier=-1")
    with pytest.raises(ValueError, match="'widht' is unknown"):
        CONFIGS[name].get_config("widht=7")
    with pytest.raises(ValueError, match="backward= is for method=top_kast only"):
        CONFIGS[name].get_config("method=rigl,backward=0.5")


def test_anchors_scale() -> None:
    anchor = common.anchors(0.5)
    assert [anchor(s) for s in (0, 3, 100)] == [0, 2, 50]


SWEEPS = [
    file
    for file in sorted((pathlib.Path(__file__).parents[2] / "configs/sweeps").glob("*"))
    if "def get_sweep(" in (file.read_text() if file.suffix == ".py" else "")
]


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_every_sweep_can_be_loaded(file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """And every method of it can be built."""
    assert len(SWEEPS) > 15
    found = jobs.load(str(file), tmp_path)
    seeds = {job.labels["seed"] for job in found}
    assert seeds == {"0", "1", "2"} and len(found) % 3 == 0
    for job in found:
        if job.labels["seed"] != "0":
            continue
        config = jobs.configuration(job.config, job.overrides)
        rate = optimizer.learning_rate(config.learning_rate, config.steps)
        given, inner = config.sparse.to_dict(), optax.sgd(rate)
        method = optimizer.sparse(given, inner, rate, steps=config.steps, seed=0)[1]
        assert (method is None) == (given["method"] == "dense"), job.name
