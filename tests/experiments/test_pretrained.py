"""Pretrained parameters are read whole, by a strict map of names."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.flax
from runs import ROOT
from safetensors.numpy import load_file, save_file

import topkast_jax as tk
from configs import quickstart
from experiments import evaluate, export, pretrained, tasks
from experiments.assembly import assemble
from experiments.config import Watched
from experiments.train import train

SHAPES: Any = {
    "block_0": {"up": {"kernel": (4, 6), "bias": (6,)}},
    "block_1": {"up": {"kernel": (4, 6), "bias": (6,)}},
    "out": {"kernel": (2, 3, 4)},
}
RULES = [
    (r"block_(\d)/up/kernel", r"transformer.h.\1.mlp.c_fc.weight", "transpose"),
    (r"block_(\d)/up/bias", r"transformer.h.\1.mlp.c_fc.bias"),
    (r"out/kernel", "lm_head.weight", "transpose reshape"),
]


def model() -> Any:
    def shape(x: tuple[int, ...]) -> Any:
        return jax.ShapeDtypeStruct(x, np.float32)

    return jax.tree.map(shape, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


@pytest.fixture
def file(tmp_path: pathlib.Path) -> pathlib.Path:
    """As Hugging Face stores a network of PyTorch: Linear is [outputs, inputs]."""
    draw = np.random.default_rng(0)
    tensors = {"lm_head.weight": draw.normal(size=(4, 6)).astype(np.float32)}
    for i in range(2):
        name = f"transformer.h.{i}.mlp.c_fc"
        tensors[f"{name}.weight"] = draw.normal(size=(6, 4)).astype(np.float32)
        tensors[f"{name}.bias"] = draw.normal(size=6).astype(np.float32)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_a_file_of_hugging_face_comes_in_whole(file: pathlib.Path) -> None:
    raw = load_file(file)
    found = pretrained.load(str(file), RULES, model())
    for i in range(2):
        weight = raw[f"transformer.h.{i}.mlp.c_fc.weight"]
        np.testing.assert_array_equal(found[f"block_{i}"]["up"]["kernel"], weight.T)
    out = raw["lm_head.weight"].T.reshape(2, 3, 4)
    np.testing.assert_array_equal(found["out"]["kernel"], out)


def test_a_checkpoint_of_orbax_comes_in_whole(tmp_path: pathlib.Path) -> None:
    tree = jax.tree.map(lambda s: np.full(s.shape, 2.5, np.float32), model())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", tree)
    found = pretrained.load(str(tmp_path / "saved"), [], model())
    jax.tree.map(np.testing.assert_array_equal, found, tree)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (RULES[:2], "it lacks 'out/kernel'.*; nothing takes 'lm_head.weight'"),
        ([*RULES[:2], ("out/kernel", "lm_head.weight")], r"is \(4, 6\), and 'out/ker"),
        ([*RULES, ("tail/.*", "x")], "'tail/.*' matches no parameter"),
        ([("out/kernel", "lm_head.weight", "flip")], "must be .regex, name."),
    ],
)
def test_what_does_not_fit_is_an_error(
    rules: Any, message: str, file: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=message):
        pretrained.load(str(file), rules, model())


@pytest.mark.parametrize("name", ["nothing.safetensors", "cut.safetensors", "empty"])
def test_what_cannot_be_read_is_an_error(
    name: str, file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    whole = file.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) - 20])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="init_from="):
        pretrained.load(str(tmp_path / name), RULES, model())


def begun(tiny: Any, tmp_path: pathlib.Path, **changes: Any) -> Any:
    """The weights that a run starts from, exported."""
    run = assemble(Watched(tiny(**changes)))
    state, _ = run.begin(tmp_path)
    if run.method is None:
        return state.params
    return tk.export(state.params, state.opt_state)


@pytest.fixture
def weights(tiny: Any, tmp_path: pathlib.Path) -> Any:
    """Parameters of the tiny task, in a file of their own."""
    task = tasks.make(tiny())
    params = jax.jit(lambda: task.init(jax.random.key(99))[0])()
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    save_file(
        {
            jax.tree_util.keystr(keys, simple=True, separator="/"): np.asarray(leaf)
            for keys, leaf in flat
        },
        tmp_path / "tiny.safetensors",
    )
    return params


SET = {
    "sparse": {"method": "set", "sparsity": 0.75, "refresh": 3, "drop_fraction": 0.3}
}


@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_a_run_starts_from_what_was_trained(
    layout: str, tiny: Any, tmp_path: pathlib.Path, weights: Any
) -> None:
    file = str(tmp_path / "tiny.safetensors")
    sparse = {**SET["sparse"], "init": "magnitude", "layout": layout}
    found = begun(tiny, tmp_path, sparse=sparse, init_from=file)
    want = np.asarray(weights["hidden"]["kernel"])
    kept = np.asarray(found["hidden"]["kernel"])
    largest = np.sort(np.abs(want), axis=None)[-want.size // 4 :]
    np.testing.assert_array_equal(np.sort(np.abs(kept[kept != 0])), largest)
    np.testing.assert_array_equal(kept[kept != 0], want[kept != 0])
    np.testing.assert_array_equal(found["hidden"]["bias"], weights["hidden"]["bias"])


def test_a_run_starts_from_a_file_of_masks(
    tiny: Any, tmp_path: pathlib.Path, weights: Any
) -> None:
    masks = jax.tree.map(lambda x: np.asarray(x) > 0.2, weights)
    tk.save_masks(tmp_path / "masks.npz", masks)
    sparse = {
        **SET["sparse"],
        "init": str(tmp_path / "masks.npz"),
        "distribution": "of_masks",
    }
    file = str(tmp_path / "tiny.safetensors")
    found = begun(tiny, tmp_path, sparse=sparse, init_from=file)
    for name in ("hidden", "out"):
        mask = masks[name]["kernel"]
        want = np.where(mask, weights[name]["kernel"], 0)
        np.testing.assert_array_equal(found[name]["kernel"], want)


def test_what_was_trained_is_not_dropped_at_random(
    tiny: Any, tmp_path: pathlib.Path, weights: Any
) -> None:
    file = str(tmp_path / "tiny.safetensors")
    sparse = {**SET["sparse"], "init": "random"}
    with pytest.raises(ValueError, match=r"say sparse.init=magnitude"):
        begun(tiny, tmp_path, sparse=sparse, init_from=file)
    rule = {"method": "random_pruning", "sparsity": 0.75, "start": 2, "stop": 9}
    for initial in (0.0, 0.5):
        rule["initial_sparsity"] = initial
        mixed = {"method": "rules", "rules": (("*/kernel", rule), ("*", "dense"))}
        if initial:
            with pytest.raises(ValueError, match=r"say sparse.init=magnitude"):
                begun(tiny, tmp_path, sparse=mixed, init_from=file)
        else:
            begun(tiny, tmp_path, sparse=mixed, init_from=file)
    dense = begun(tiny, tmp_path, sparse={"method": "dense"}, init_from=file)
    jax.tree.map(np.testing.assert_array_equal, dense, weights)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_a_file_of_hugging_face_goes_out_as_it_came_in(
    dtype: Any, file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    arrays = {name: jnp.asarray(x, dtype) for name, x in load_file(file).items()}
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    safetensors.flax.save_file(arrays, there)
    params = pretrained.load(str(there), RULES, model())
    pretrained.save(str(back), RULES, params, like=str(there))
    found = safetensors.flax.load_file(back)
    assert found.keys() == arrays.keys()
    for name, x in arrays.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], x)


@pytest.mark.parametrize(
    ("rules", "like", "message"),
    [
        (RULES, "", "'out/kernel' was reshaped; say like="),
        (RULES[:2], "model.safetensors", "lacks 'out/kernel'"),
        ([(".*", "x")], "", "two parameters would be called 'x'"),
        ([("tail", "x")], "", "'tail' matches no parameter"),
        ([("out/kernel", "lm_head.weight", "flip")], "", "must be .regex, name."),
        (
            [*RULES[:2], ("out/kernel", "lm_head.weight")],
            "model.safetensors",
            "in like",
        ),
        (
            [*RULES[:2], ("out/kernel", "x")],
            "model.safetensors",
            r"lacks 'x' \(of 'out/kernel'\)",
        ),
    ],
)
def test_what_cannot_be_written_leaves_no_file(
    rules: Any, like: str, message: str, file: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    params = pretrained.load(str(file), RULES, model())
    like = str(tmp_path / like) if like else ""
    with pytest.raises(ValueError, match=message):
        pretrained.save(str(tmp_path / "out.safetensors"), rules, params, like)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("before", "layout"),
    [
        ("dense", "masked"),
        ("dense", "packed"),
        ("masked", "packed"),
        ("packed", "masked"),
    ],
)
def test_a_run_starts_from_another_run(
    before: str, layout: str, tiny: Any, tmp_path: pathlib.Path
) -> None:
    half = {**SET["sparse"], "sparsity": 0.5, "layout": before}
    sparse = {"method": "dense"} if before == "dense" else half
    train(tiny(sparse=sparse), tmp_path / "before")
    left = evaluate.read(str(tmp_path / "before")).weights.alpha
    again = {**SET["sparse"], "init": "magnitude", "layout": layout}
    found = begun(
        tiny, tmp_path / "new", sparse=again, init_from=str(tmp_path / "before")
    )
    for name in ("hidden", "out"):
        kept, was = (np.asarray(tree[name]["kernel"]) for tree in (found, left))
        largest = np.sort(np.abs(was), axis=None)[-was.size // 4 :]
        np.testing.assert_array_equal(np.sort(np.abs(kept[kept != 0])), largest)
        np.testing.assert_array_equal(kept[kept != 0], was[kept != 0])
    np.testing.assert_array_equal(found["hidden"]["bias"], left["hidden"]["bias"])
    one = str(next((tmp_path / "before" / "checkpoints").iterdir()))
    with pytest.raises(ValueError, match="one checkpoint of a run; name the run's"):
        begun(tiny, tmp_path / "no", sparse=again, init_from=one)


def test_a_run_is_exported(tiny: Any, tmp_path: pathlib.Path) -> None:
    train(tiny(), tmp_path / "run")
    rules = [(r"(.*)/kernel", r"\1.weight", "transpose")]
    names, out = tmp_path / "map.json", tmp_path / "model.safetensors"
    names.write_text(json.dumps(rules))
    assert export.write(str(tmp_path / "run"), str(out), str(names)) == 12
    weights = evaluate.read(str(tmp_path / "run")).weights
    found = pretrained.load(str(out), rules, weights.params)
    jax.tree.map(np.testing.assert_array_equal, found, weights.alpha)
    kernel = load_file(out)["hidden.weight"].T
    mask = tk.dense_masks(weights.masks).forward["hidden"]["kernel"]
    np.testing.assert_array_equal(kernel != 0, mask)
    names.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="must be a list of lists of strings"):
        export.write(str(tmp_path / "run"), str(out), str(names))


@pytest.mark.slow
def test_the_program_exports(tmp_path: pathlib.Path) -> None:
    train(quickstart.get_config("smoke"), tmp_path / "run")
    program = [sys.executable, "-m", "experiments.export"]
    words = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'x.safetensors'}"]
    subprocess.run([*program, *words], cwd=ROOT, check=True)
    assert "embed/embedding" in load_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("method", sorted(tk.METHODS))
def test_every_method_can_start_from_what_was_trained(
    method: str, tmp_path: pathlib.Path
) -> None:
    """With the config's own `sparse.init`, set to magnitude where it would draw."""
    config = quickstart.get_config(f"method={method}")
    task = tasks.make(config)
    shapes = jax.eval_shape(task.init, jax.random.key(0))[0]
    params = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
    file = config.init_from = str(tmp_path / "all.safetensors")
    pretrained.save(file, [], params)
    at_random = "init" in config.sparse and config.sparse.init == "random"
    if at_random and config.sparse.get("initial_sparsity") != 0:
        with pytest.raises(ValueError, match="would drop most of what was trained"):
            assemble(Watched(config))
    if "init" in config.sparse:
        config.sparse.init = "magnitude"
    given = assemble(Watched(config)).given
    assert jax.tree.leaves(given)[0].shape == jax.tree.leaves(shapes)[0].shape
