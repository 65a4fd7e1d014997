"""Configs: parsing, strict reading, and one clear line for everything that is wrong."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import topkast_jax as tk
from configs import common, quickstart
from experiments import command, optimizer, tasks
from experiments import mesh as meshes
from experiments.config import Watched, as_json, differences, require_all_read
from experiments.train import train

ROOT = pathlib.Path(__file__).parents[2]


def test_argument_string_takes_the_types_of_its_defaults() -> None:
    found = common.parse("method=rigl, forward=0.95,smoke", method="x", forward=None,
                         smoke=False, steps=3)  # fmt: skip
    assert found == {"method": "rigl", "forward": 0.95, "smoke": True, "steps": 3}


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("methode=rigl", "'methode' is unknown; there are method, forward"),
        ("forward=much", "forward='much' is not of type float"),
        ("smoke=perhaps", "smoke='perhaps' is not of type bool"),
    ],
)
def test_argument_string_refuses(arg: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        common.parse(arg, method="x", forward=None, smoke=False)


def test_watched_names_what_nothing_read() -> None:
    config = Watched(
        ml_collections.ConfigDict({"a": 1, "part": {"b": 2, "c": 3}, "learning_rte": 4})
    )
    assert config.a == 1 and config.part.b == 2
    assert config.get("learning_rate", 0) == 0
    assert config.unread() == ["learning_rte", "part.c"]
    with pytest.raises(ValueError, match="nothing reads config.learning_rte"):
        require_all_read(config)
    assert dict(config.part) == {"b": 2, "c": 3}
    assert config["learning_rte"] == 4
    require_all_read(config)


def test_watched_suggests_a_near_name() -> None:
    config = Watched({"steps": 1, "stpes": 2})
    assert config.steps == 1
    with pytest.raises(ValueError, match=r"config.stpes \(did you mean steps\?\)"):
        require_all_read(config)


def test_watched_says_what_is_missing() -> None:
    config = Watched({"part": {"b": 2}})
    assert not hasattr(config, "steps")
    with pytest.raises(ValueError, match="config.part.c is missing; config.part has b"):
        _ = config.part.c


def test_differences_see_through_tuples() -> None:
    one = {"a": (1, (2, 3)), "b": {"c": 1.0}, "gone": 1}
    two = {"a": [1, [2, 3]], "b": {"c": 2.0}}
    assert differences(as_json(one), as_json(two)) == {
        "b.c": (1.0, 2.0),
        "gone": (1, "absent"),
    }


@pytest.mark.parametrize("method", ["dense", *tk.METHODS])
@pytest.mark.parametrize("smoke", ["", ",smoke"])
def test_quickstart_builds_every_method(method: str, smoke: str) -> None:
    config = quickstart.get_config(f"method={method}{smoke}")
    json.dumps(as_json(config))
    rate = optimizer.learning_rate(config.learning_rate, config.steps)
    inner = optimizer.inner(config.optimizer, rate)
    _, made = optimizer.sparse(config.sparse, inner, rate, steps=config.steps, seed=0)
    assert (made is None) == (method == "dense")
    assert smoke == "" or config.steps <= 8


def made(arg: str, **changes: Any) -> tk.Method:
    """The method of the quickstart with these arguments."""
    config = quickstart.get_config(arg)
    config.sparse.update(changes)
    rate = optimizer.learning_rate(config.learning_rate, config.steps)
    inner = optimizer.inner(config.optimizer, rate)
    method = optimizer.sparse(config.sparse, inner, rate, steps=1500, seed=0)[1]
    assert method is not None
    return method


def due_at(method: tk.Method) -> list[int]:
    assert method.due is not None
    return np.flatnonzero(method.due(np.arange(1501))).tolist()


def test_open_steps_are_shares_of_the_run() -> None:
    assert due_at(made("method=magnitude")) == [*range(200, 1125, 100), 1125]
    assert due_at(made("method=one_shot")) == [750]
    assert due_at(made("method=one_shot", at=7)) == [7]
    phases = due_at(made("method=acdc"))
    assert phases == list(range(150, 1201, 75))  # the last is compressed to the end
    with pytest.raises(ValueError, match="sparse.last=1500 never comes within"):
        made("method=acdc", last=1500)


REFRESHED = [
    name
    for name in tk.METHODS
    if "refresh" in quickstart.get_config(f"method={name}").sparse
]


@pytest.mark.parametrize("method", REFRESHED)
def test_a_method_that_never_fires_is_refused(method: str) -> None:
    message = r"sparse.refresh=1500 .* never falls within steps=1500"
    with pytest.raises(ValueError, match=message):
        made(f"method={method}", refresh=1500)


def test_a_dense_beginning() -> None:
    """Steps of the method count from there, and none falls after the run."""
    assert due_at(made("method=rigl", begin=450)) == [450, *range(550, 1500, 100)]
    assert due_at(made("method=one_shot", begin=500)) == [500, 1000]


def test_quickstart_defaults() -> None:
    config = quickstart.get_config()
    assert config.sparse.method == "top_kast"
    assert config.sparse.forward_sparsity == 0.9
    assert config.sparse.backward_sparsity == 0.8
    other = quickstart.get_config("forward=0.95,backward=0.9")
    assert other.sparse.backward_sparsity == 0.9
    config.sparse.refresh_stop = 7  # no placeholder is shared between two configs
    assert quickstart.get_config().sparse.refresh_stop is None


def test_quickstart_plan_and_shardings() -> None:
    """The whole model, by its shapes: 90/80 in every kernel, and no rule misses."""
    config = quickstart.get_config()
    task = tasks.make(config)
    params, carry = jax.eval_shape(task.init, jax.random.key(0))
    rate = optimizer.learning_rate(config.learning_rate, config.steps)
    inner = optimizer.inner(config.optimizer, rate)
    tx, _ = optimizer.sparse(config.sparse, inner, rate, steps=config.steps, seed=0)
    assert isinstance(tx, tk.Sparse)
    plan = tk.plan(tx, params)
    chosen = [row for row in plan.rows if row.sparse]
    assert len(chosen) == 4 * 7
    assert {row.path for row in chosen} == {
        r.path for r in plan.rows if "kernel" in r.path
    }
    for row in chosen:
        assert row.k_forward == round(0.1 * row.size)
        assert row.k_backward == round(0.2 * row.size)
    by_path = {row.path: row.axes for row in chosen}
    assert by_path["block_0/attention/query/kernel"] == "i o o"
    assert by_path["block_0/attention/out/kernel"] == "i i o"
    assert by_path["block_0/feed_forward/out/kernel"] == "i o"
    mesh = abstract_mesh(4, 2)
    meshes.batch_shardings(mesh, carry, "carry")
    found = meshes.parameter_shardings(mesh, config.sharding, params)
    assert found["block_0"]["attention"]["query"]["kernel"].spec == P(
        "fsdp", None, None
    )
    assert found["embed"]["embedding"].spec == P("fsdp", None)
    assert found["head_bias"].spec == P()


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("method=dense,forward=0.5", "forward=, structure= and layout= have no"),
        ("method=dense,structure=fan_in", "forward=, structure= and layout= have no"),
        ("method=dense,layout=packed", "forward=, structure= and layout= have no"),
        ("method=rigl,backward=0.5", "backward= is for method=top_kast"),
        ("sparsity=0.5", "'sparsity' is unknown"),
    ],
)
def test_quickstart_refuses(arg: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quickstart.get_config(arg)


BAD = [
    ({"learning_rte": 1.0}, "nothing reads config.learning_rte"),
    ({"optimizer__bb": 0.9}, r"optimizer.bb is no argument of adamw; it takes b1, b2"),
    ({"optimizer__name": "adamm"}, "optimizer.name='adamm' is no optimizer of optax"),
    ({"optimizer__clip": -1.0}, "optimizer.clip=-1.0"),
    ({"learning_rate__warmup": 12}, "warmup=12 must be in"),
    ({"sparse__method": "topkast"}, "sparse.method='topkast' is unknown; there are"),
    ({"sparse__drop": 0.1}, "sparse.drop is no argument of top_kast; it takes"),
    ({"sparse__backward_sparsity": 0.8}, "backward_sparsity=0.8 is above forward"),
    ({"sparse__forward_sparsity": 1.0}, "forward_sparsity"),
    ({"sparse__forward_sparsity": -0.1}, "forward_sparsity"),
    ({"sparse__forward_sparsity": 0.9999}, "would keep k=0"),
    ({"sparse__refresh": 12}, "sparse.refresh=12 .* never falls within steps=12"),
    ({"sparse__refresh": 0}, "n=0 must be at least 1"),
    ({"sparse__refresh_stop": 2}, "never fires"),
    ({"sparse__stop": 12}, "sparse.stop=12 never comes within steps=12"),
    ({"sparse__begin": 12}, r"sparse.begin=12 must be in \[1, steps=12\)"),
    ({"sparse__where": "*/kernal"}, "pattern '[*]/kernal' matches no parameter"),
    ({"sparse__distribution": "flat"}, "sparse.distribution='flat' is unknown"),
    ({"sparse__structure": "block:8x8"}, "sparse.structure='block:8x8' is unknown"),
    ({"sparse__structure": "blocks:8"}, "sparse.structure='blocks:8' is unknown"),
    ({"sparse__structure": "blocks:8x0"}, "blocks: 8x0: sides are at least 1"),
    ({"sparse__structure": "n_of_m:3"}, "not a multiple of 3, as N:3 needs"),
    ({"sparse__distribution": {"*/kernal": 0.5}}, "'[*]/kernal' matches no parameter"),
    ({"sparse__axes": (("*/kernel", "x y"),)}, "must be letters out of s, k, i, o"),
    ({"mesh": "data:4096"}, "needs 4096 devices, but there are"),
    ({"mesh": "model:1"}, "axis 'model' is none of"),
    ({"mesh": "data:0"}, "must be a positive integer"),
    ({"sharding": ((".*kernel", ()),)}, "no rule covers 'hidden/bias'; add a rule"),
    ({"sharding": (("a", ()), (".*", ()))}, "rule 'a' matches no parameter"),
    ({"on_nan": "ignore"}, "config.on_nan='ignore' must be one of"),
    ({"steps": 0}, "config.steps=0 must be an integer of at least 1"),
    ({"log_every": 0}, "config.log_every=0"),
    ({"keep": 1}, "keep=1"),
    ({"eval_batches": 0}, "eval_batches=0"),
    ({"data_dir": None}, "nothing reads config.data_dir"),
    ({"task": "chess"}, "config.task is 'chess'; possible are"),
]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("steps", "config.steps is missing; config has"),
        (
            "optimizer.name",
            "config.optimizer.name is missing; config.optimizer has clip",
        ),
        ("sparse.method", "config.sparse.method is missing"),
        ("sparse.forward_sparsity", "forward_sparsity is missing; top_kast needs it"),
        ("learning_rate.peak", "config.learning_rate.peak is missing"),
    ],
)
def test_a_missing_key_is_one_line(
    tiny: Any, tmp_path: pathlib.Path, key: str, message: str
) -> None:
    config = tiny()
    *folders, last = key.split(".")
    part = config
    for folder in folders:
        part = part[folder]
    del part[last]
    with pytest.raises(command.BadInput, match=message):
        train(config, tmp_path)


def test_optional_keys_have_defaults(tiny: Any) -> None:
    config = {"method": "top_kast", "forward_sparsity": 0.9, "backward_sparsity": 0.8}
    rate = optimizer.learning_rate(tiny().learning_rate, 12)
    inner = optimizer.inner({"name": "sgd"}, rate)
    assert optimizer.sparse(config, inner, rate, steps=12, seed=0)[1] is not None


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(c) for c, _ in BAD])
def test_bad_config_is_one_line_before_training(
    tiny: Any, tmp_path: pathlib.Path, change: dict[str, Any], message: str
) -> None:
    workdir = tmp_path / "run"
    with pytest.raises(command.BadInput, match=message) as caught:
        train(tiny(**change), workdir)
    assert len(str(caught.value).splitlines()) == 1
    assert not workdir.exists()


def abstract_mesh(data: int, fsdp: int) -> Any:
    return AbstractMesh(
        (data, fsdp), meshes.AXES, axis_types=(AxisType.Auto, AxisType.Auto)
    )


def shapes(**named: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(s, "float32") for name, s in named.items()}


def test_mesh_names_both_axes() -> None:
    assert meshes.parse("") == {"data": 1, "fsdp": 1}
    assert meshes.parse("fsdp:2, data:4") == {"data": 4, "fsdp": 2}
    assert list(meshes.parse("fsdp:2")) == ["data", "fsdp"]


def test_mesh_must_divide_the_batch() -> None:
    batch = shapes(tokens=(12, 5), scalar=())
    found = meshes.batch_shardings(abstract_mesh(2, 2), batch, "batch")
    assert found["tokens"].spec == P(("data", "fsdp")) and found["scalar"].spec == P()
    with pytest.raises(ValueError, match="'data:4,fsdp:2' does not divide the batch"):
        meshes.batch_shardings(abstract_mesh(4, 2), batch, "batch")


def test_a_bare_axis_cuts_the_largest_dimension_that_it_divides() -> None:
    params = shapes(a=(6, 8), b=(8, 8), c=(9, 4), d=(7, 3), e=())
    found = meshes.parameter_shardings(abstract_mesh(1, 2), [(".*", "fsdp")], params)
    assert {name: tuple(s.spec) for name, s in found.items()} == {
        "a": (None, "fsdp"),
        "b": (None, "fsdp"),
        "c": (None, "fsdp"),
        "d": (),
        "e": (),
    }


def test_a_spec_is_taken_by_the_letter() -> None:
    params = shapes(a=(6, 8), b=(9, 4))
    rules = [("a", (("data", "fsdp"), None)), ("b", (None, "fsdp"))]
    with pytest.raises(ValueError, match="dimension 0 of size 6 does not split"):
        meshes.parameter_shardings(abstract_mesh(2, 2), rules, params)
    found = meshes.parameter_shardings(abstract_mesh(3, 2), rules, params)
    assert found["a"].spec == P(("data", "fsdp"), None)
    assert found["b"].spec == P(None, "fsdp")
    with pytest.raises(ValueError, match="'model' is no axis"):
        meshes.parameter_shardings(abstract_mesh(1, 1), [(".*", ("model",))], params)
    with pytest.raises(ValueError, match="names 3 dimensions"):
        meshes.parameter_shardings(abstract_mesh(1, 1), [(".*", ((),) * 3)], params)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        pytest.param(
            "--config=configs/quickstart.py:methode=rigl",
            "argument 'methode' is unknown",
            marks=pytest.mark.slow,
        ),
        (
            "--config.stpes=3",
            "--config.stpes=3: the config has no such key. Did you mean steps",
        ),
        pytest.param("--config=configs/qiuckstart.py", "qiuck", marks=pytest.mark.slow),
        pytest.param("--config.steps=many", "many", marks=pytest.mark.slow),
        pytest.param("more", "unexpected arguments: more", marks=pytest.mark.slow),
    ],
)
def test_the_program_says_it_in_one_line(
    tmp_path: pathlib.Path, argument: str, message: str
) -> None:
    """Exit code 2, one line on stderr, and no traceback."""
    config = "--config=configs/quickstart.py"
    program = [sys.executable, "-m", "experiments.train", f"--workdir={tmp_path}"]
    done = subprocess.run(
        [*program, config, argument], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert message in line
