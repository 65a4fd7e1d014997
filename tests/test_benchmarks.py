"""Benchmarks run and print what they promise; what they measure is not tested."""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from benchmarks import (
    crossover,
    hidden,
    layouts,
    peak,
    probe,
    problems,
    replicas,
    select,
    step,
    timing,
    width,
)


def test_select_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    select.main(["--sizes=64,2K", "--repeats=1", "--lax-up-to=64"])
    out = capsys.readouterr().out
    assert "| 64 " in out
    assert "| 2K " in out
    assert out.count("skipped") == 2  # in the row, and said below
    assert "cores" in out


def test_step_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    step.main(["--quick", "--only=RigL"])
    out = capsys.readouterr().out
    for row in (step.AGAIN, "RigL 90, every 100"):
        assert f"| {row} " in out
    assert "Top-KAST" not in out
    assert "nan" not in out


def test_replicas_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    replicas.main(["--quick"])
    out = capsys.readouterr().out
    assert "| dense " in out and "| Top-KAST 90/80 " in out and "nan" not in out


def test_layouts_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    layouts.main(["--quick", "--ways=fan-in"])
    out = capsys.readouterr().out
    assert "| block, fan-in 1x256 " in out and "masked" not in out
    assert "nan" not in out and "Top-KAST 90/80" in out


def test_layouts_prints_a_table_in_bfloat16(
    capsys: pytest.CaptureFixture[str],
) -> None:
    layouts.main(["--quick", "--ways=128x128", "--dtype=bfloat16"])
    out = capsys.readouterr().out
    assert ", bfloat16, Top-KAST 90/80" in out and "nan" not in out


def test_parameters_and_moments_stay_float32_around_bfloat16_products() -> None:
    problem = problems.mlp((8, 16), rows=4)
    training = layouts.Training(problem, None, (0.5, 0.25), jnp.bfloat16)
    training.step()
    kinds = {x.dtype for x in jax.tree.leaves(training.state)}
    assert kinds == {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.parametrize(
    "problem",
    [
        lambda: problems.mlp((8, 16), rows=4),
        lambda: problems.stack(2, 8, 16, rows=4, scanned=True),
        lambda: problems.transformer(1, 16, rows=2, segment=8),
    ],
    ids=["mlp", "stack", "transformer"],
)
def test_every_product_is_in_the_dtype_of_alpha(
    problem: Callable[[], problems.Problem],
) -> None:
    made = problem()
    args = problems.in_dtype((made.params, made.carry), jnp.bfloat16)
    value, _ = jax.eval_shape(made.loss, *args)
    assert value.dtype == jnp.float32

    def products(jaxpr: Any) -> Iterator[Any]:
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                yield from (x.aval.dtype for x in equation.invars)
            for inner in jaxprs_in_params(equation.params):
                yield from products(inner)

    gradient = jax.grad(lambda *args: made.loss(*args)[0])
    assert set(products(jax.make_jaxpr(gradient)(*args).jaxpr)) == {
        jnp.dtype(jnp.bfloat16)
    }


@pytest.mark.parametrize(
    "flags", ["--sizes=huge", "--ways=ring", "--sparsities=90", "--dtype=float16"]
)
def test_layouts_refuses_flags(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        layouts.main([flags])
    assert flags.partition("=")[0] in capsys.readouterr().err


def test_width_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    width.main(["--quick"])
    out = capsys.readouterr().out
    assert "| 256 " in out and "| 512 " in out and "nan" not in out


@pytest.mark.parametrize("flags", ["--widths=100", "--widths=x", "--blocks=0"])
def test_width_refuses_flags(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        width.main([flags])
    assert flags.partition("=")[0] in capsys.readouterr().err


def test_crossover_prints_a_table_and_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    picture = tmp_path / "crossover.png"
    crossover.main(["--quick", f"--picture={picture}"])
    out = capsys.readouterr().out
    assert "| packed, unstructured " in out and "crosses" in out and "nan" not in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [((0.9, 0.5, 0.1), "< 50"), ((1.5, 0.5, 0.1), "60"), ((1.1, 0.5, 1.0), "-")],
)
def test_where_a_layout_becomes_faster(
    ratios: tuple[float, ...], expected: str
) -> None:
    assert crossover.crossing([50, 70, 90], ratios) == expected


@pytest.mark.parametrize("flags", ["--sparsities=90,50", "--sparsities=x"])
def test_crossover_refuses_flags(
    flags: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        crossover.main([flags])
    assert flags.partition("=")[0] in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
@pytest.mark.slow
def test_peak_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    peak.main(["--quick"])
    out = capsys.readouterr().out
    assert "| dense " in out and "| block " in out and "nan" not in out


def test_probe_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    probe.main(["--quick"])
    out = capsys.readouterr().out
    assert "| tiny " in out and "nan" not in out


def test_hidden_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    hidden.main(["--quick"])
    out = capsys.readouterr().out
    assert "| packed, unstructured " in out and "nan" not in out


@pytest.mark.parametrize("scanned", [False, True])
def test_a_stack_trains_packed(scanned: bool) -> None:
    problem = problems.stack(2, 8, 16, rows=4, scanned=scanned)
    training = layouts.Training(problem, layouts.WAYS[1], (0.5, 0.25))
    training.step()
    assert layouts.fraction(problem, training) == pytest.approx(7 / 12, abs=0.01)


def test_the_floor_has_the_shapes_of_the_problem_and_no_kernels() -> None:
    problem = problems.transformer(1, 16, rows=2, segment=8)
    assert problem.floor is not None
    paths = jax.tree_util.tree_flatten_with_path(problem.floor.params)[0]
    assert paths and "kernel" not in str([path for path, _ in paths])
    whole, floor = (
        jax.eval_shape(jax.value_and_grad(p.loss, has_aux=True), p.params, p.carry)[0]
        for p in (problem, problem.floor)
    )
    assert whole == floor


def test_a_step_refreshes_when_it_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    method = step.tk.top_kast(0.5, 0.2, refresh=step.tk.every(10))
    training = step.Training(problems.mlp((4, 8), rows=4), method)
    monkeypatch.setattr(training, "step", lambda: None)
    for timed, refreshes in ((1, False), (9, True)):
        training.before(timed)
        number = int(training.opt_state.sparse_step) + 1
        assert number == timed
        assert bool(method.due(number + 1)) == refreshes


@pytest.mark.parametrize("wrong", ["0", "1.5M", "7G", ""])
def test_sizes_that_make_no_sense(wrong: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no number of entries"):
        select.count(wrong)


@pytest.mark.parametrize("entries", [64, 3 * 2**10, 2**26, 1000])
def test_a_size_is_read_as_it_is_written(entries: int) -> None:
    assert select.count(select.named(entries)) == entries


@pytest.mark.parametrize(
    "flags", ["--sizes=huge", "--repeats=0", "--every=1", "--only=x"]
)
def test_step_refuses_flags(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main([flags])
    assert flags.partition("=")[0] in capsys.readouterr().err


def test_a_ratio_is_taken_within_rounds() -> None:
    contest = timing.Contest({"a": [2.0, 20.0, 5.0], "b": [1.0, 10.0, 1.0]})
    assert contest.ratio("a", to="b") == 2
    assert contest.median("a") == 5
