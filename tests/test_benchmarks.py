"""Benchmarks run and print what they promise; what they measure is not tested."""

import argparse

import pytest

from benchmarks import layouts, problems, select, step, timing, width


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


def test_layouts_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    layouts.main(["--quick", "--ways=fan-in"])
    out = capsys.readouterr().out
    assert "| block, fan-in 1x256 " in out and "masked" not in out
    assert "nan" not in out and "Top-KAST 90/80" in out


@pytest.mark.parametrize("flags", ["--sizes=huge", "--ways=ring", "--sparsities=90"])
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
