"""The example of the README: it runs, and it is an optax loop plus two lines."""

import doctest
import pathlib

README = pathlib.Path(__file__).parent.parent / "README.md"


def example() -> list[str]:
    """Source lines of the example, in order."""
    text = README.read_text().split("## Really sparse")[0]
    parsed = doctest.DocTestParser().get_examples(text)
    return [line for one in parsed for line in one.source.splitlines() if line.strip()]


def test_it_runs():
    result = doctest.testfile(str(README), module_relative=False)
    assert result.attempted >= 10
    assert result.failed == 0


def test_two_lines_turn_an_optax_loop_sparse():
    """Without the lines marked as added, what is left is a plain optax loop that runs."""
    lines = example()
    added = [line for line in lines if "# added" in line]
    assert len(added) == 2
    plain = "\n".join(line for line in lines if "# added" not in line)
    plain = plain.split("weights = ")[0]
    plain = plain.replace("import topkast_jax as tk\n", "").replace("alpha", "theta")
    assert "tk." not in plain
    names: dict = {}
    exec(compile(plain, "README", "exec"), names)
    assert float(names["loss"](names["params"])) < 0.5
