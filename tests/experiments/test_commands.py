"""Commands that the docs print: they parse, build, and their meshes divide their rows."""

import ast
import itertools
import math
import pathlib
import re
import shlex
import sys
from typing import Any

import jax
import pytest
from absl import flags
from ml_collections import config_flags
from runs import ROOT

from configs import cifar, enwik8_transformer_xl, quickstart
from configs import wikitext103_transformer_xl as wikitext103
from experiments import mesh as meshes
from experiments import tasks
from experiments.assembly import assemble
from experiments.config import Watched

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "configs").rglob("*.py")),
    *sorted((ROOT / "experiments").glob("*.py")),
]
COMMAND = re.compile(
    r"(?:python -m experiments\.\w+ +)?(?:--[^\s`]+ +)*--config=[^\s`]+(?: +--[^\s`]+)*"
)
ANY = "--config=..."


class Device:
    """As much of a device as a mesh looks at."""

    platform = device_kind = "pretended"
    process_index = 0


DEVICES = [Device() for _ in range(64)]


def printed(text: str) -> list[str]:
    """Commands with --config= of a text: in its lines, or between its backticks."""
    text = re.sub(r"\\\n\s*", " ", text.replace("```", ""))
    text = re.sub(r"`[^`]*`", lambda span: " ".join(span[0].split()), text)
    found = (c for line in text.splitlines() for c in COMMAND.findall(line))
    return [" ".join(command.split()) for command in found if ANY not in command]


def read(page: pathlib.Path) -> str:
    text = page.read_text()
    return ast.get_docstring(ast.parse(text)) or "" if page.suffix == ".py" else text


COMMANDS = [
    (str(page.relative_to(ROOT)), command)
    for page in PAGES
    for command in printed(read(page))
]


def test_commands_are_found() -> None:
    text = """
    python -m experiments.train --config=a.py:x \\
        --workdir=gs://B --config.mesh=data:8

    --config=b.py:y=1      or so, or `--config=c.py
    --config.steps=2`, and `--config=d.py`.

    `python -m experiments.aot --config=... --topology=x`, then --config=e.py
    """
    assert printed(text) == [
        "python -m experiments.train --config=a.py:x --workdir=gs://B --config.mesh=data:8",
        "--config=b.py:y=1",
        "--config=c.py --config.steps=2",
        "--config=d.py",
        "--config=e.py",
    ]
    configs = {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    configs -= {f"configs/{name}.py" for name in ("__init__", "common", "sparse")}
    assert {page for page, _ in COMMANDS} >= {
        "README.md", "docs/results.md", "experiments/train.py", "experiments/aot.py",
        *configs,
    }  # fmt: skip


def parsed(command: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The config of a command, by the flags that the programs have."""
    words = [word for word in shlex.split(command) if word.startswith("--")]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["program", *words])  # read by config flags
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    for name in ("workdir", "distributed", "topology"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    assert values(sys.argv) == ["program"]
    return values.config


@pytest.mark.parametrize(
    "command", [command for _, command in COMMANDS], ids=[page for page, _ in COMMANDS]
)
def test_a_printed_command_builds_and_its_mesh_divides_its_rows(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = Watched(parsed(command, monkeypatch))
    run = assemble(cfg, DEVICES)
    meshes.require_rows(run.mesh, cfg.batch_size, run.task.held_out_rows)


ARGUMENTS = [
    f"{page.relative_to(ROOT)}:{argument}"
    for page in PAGES
    if page.parent.name == "configs"
    for argument in re.findall(r"^    :(\S+)", read(page), re.MULTILINE)
]


@pytest.mark.parametrize("config", ARGUMENTS)
def test_a_printed_argument_makes_a_config(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert parsed(f"--config={config}", monkeypatch).steps > 0


def test_arguments_are_found() -> None:
    assert "configs/enwik8_transformer_xl.py:method=rigl,forward=0.95" in ARGUMENTS
    assert "configs/cifar.py:multiplier=1.5" in ARGUMENTS


def mesh(text: str) -> Any:
    return meshes.make(text, DEVICES)


@pytest.mark.parametrize(
    ("text", "training", "held_out", "said"),
    [
        ("data:8", 22, 10, "batch_size=22 and evaluation.rows=10 rows .* 8 .* 2 do"),
        ("data:4,fsdp:2", 60, 10, "'data:4,fsdp:2' .*batch_size=60 and .* 5 do"),
        ("data:4", 60, 10, "batch: evaluation.rows=10 rows do not .* 2 do, else"),
        ("data:8", 12, None, "batch: batch_size=12 rows do not split .* 6 do"),
        ("fsdp:2", 9, 4, "batch: batch_size=9 rows .* 1 does, else change the rows"),
    ],
)
def test_rows_that_do_not_split(
    text: str, training: int, held_out: int | None, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        meshes.require_rows(mesh(text), training, held_out)


def test_rows_that_split() -> None:
    for devices, training, held_out in itertools.product(range(1, 9), (24, 30), (6, 8)):
        if training % devices == held_out % devices == 0:
            meshes.require_rows(mesh(f"data:{devices}"), training, held_out)
            meshes.require_rows(mesh(f"fsdp:{devices}"), training)
    meshes.require_rows(mesh("data:1"), 7, 3)


@pytest.mark.parametrize(
    ("module", "argument", "rows"),
    [
        (enwik8_transformer_xl, "", (22, 10)),
        (enwik8_transformer_xl, "size=24", (64, 16)),
        (wikitext103, "", (60, 10)),
        (wikitext103, "size=large", (128, 8)),
        (quickstart, "", (16, 16)),
        (cifar, "", (128, None)),
    ],
)
def test_tasks_say_the_rows_of_an_evaluation(
    module: Any, argument: str, rows: tuple[int, int | None]
) -> None:
    config = module.get_config(argument)
    assert (config.batch_size, tasks.make(config).held_out_rows) == rows


# Of 256 bytes, where the golden counts have the 204 that enwik8 uses: .03M more.
@pytest.mark.parametrize(
    ("module", "size", "words"),
    [
        (enwik8_transformer_xl, "12", r"12 \((\d+)M parameters\)"),
        (enwik8_transformer_xl, "24", r"24 \((\d+)M\)"),
        (wikitext103, "standard", r"standard: (\d+)M"),
        (wikitext103, "large", r"(\d+)M parameters; standard"),
    ],
)
def test_docstrings_say_how_many_parameters_there_are(
    module: Any, size: str, words: str
) -> None:
    task = tasks.make(module.get_config(f"method=dense,size={size}"))
    shapes = jax.eval_shape(task.init, jax.random.key(0))[0]
    found = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    (said,) = re.findall(words, module.__doc__)
    assert round(found / 1e6) == int(said)
    if size == "large":
        assert f"{found:,}" == "285,205,322" and f"{found:,}" in module.__doc__
