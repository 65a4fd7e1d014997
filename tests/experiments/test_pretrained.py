"""Pretrained parameters are read whole, by a strict map of names."""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

import topkast_jax as tk
from experiments import pretrained, tasks
from experiments.assembly import assemble
from experiments.config import Watched

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
    from safetensors.numpy import load_file

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
    dense = begun(tiny, tmp_path, sparse={"method": "dense"}, init_from=file)
    jax.tree.map(np.testing.assert_array_equal, dense, weights)
