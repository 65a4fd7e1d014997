"""Writes the weights of a run to a safetensors file, as it is evaluated with them.

    python -m experiments.export --workdir=runs/quickstart --out=model.safetensors

Every parameter has its path as name, `block_0/feed_forward/in/kernel`; sparse ones are
dense arrays with their zeros, averages where the run keeps them. `init_from=` of
`experiments.train` reads the file; `tk.from_zeros` finds the masks in its arrays.

    --map=FILE    JSON, a list of rules as in `init_map`: [[regex, name], ...], with
                  "transpose", "reshape" or "transpose reshape" as a third word
    --like=FILE   safetensors whose shapes and dtypes the arrays get, for "reshape"

Exit code 2 with one line on stderr where there is nothing to write, or it does not fit.
"""

import json
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import command, evaluate, paths, pretrained


def rules_of(file: str) -> list[tuple[str, ...]]:
    """Rules of names from a JSON file.

    Raises:
      ValueError: it holds something else.
    """
    found: Any = json.loads(paths.folder(file).read_text())
    if not isinstance(found, Sequence) or not all(
        isinstance(rule, list) and all(isinstance(word, str) for word in rule)
        for rule in found
    ):
        raise ValueError(f"--map={file} must be a list of lists of strings")
    return [tuple(rule) for rule in found]


def write(workdir: str, out: str, names: str = "", like: str = "") -> int:
    """Writes the file; returns the step that the weights are of.

    Args:
      workdir: folder of a run.
      out: the file to write.
      names: JSON file of rules of names; "": paths are names.
      like: file with the shapes and dtypes to write; "": those of the run.
    Raises:
      ValueError: no checkpoint that can be read, or names that do not fit.
    """
    rules = rules_of(names) if names else []
    weights = evaluate.read(workdir).weights
    pretrained.save(out, rules, weights.alpha, like)
    step: int = weights.meta["step"]
    return step


def main(argv: list[str]) -> int:
    """Writes the file, and says what is in it."""
    del argv
    workdir, out = flags.FLAGS.workdir, flags.FLAGS.out
    if workdir is None or out is None:
        raise command.BadInput("--workdir, the folder of a run, and --out are needed")
    with command.checking():
        step = write(workdir, out, flags.FLAGS.map, flags.FLAGS.like)
    print(f"{out}: the weights of {workdir} at step {step}")
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a run.")
    flags.DEFINE_string("out", None, "The file to write.")
    flags.DEFINE_string("map", "", "JSON file of rules of names.")
    flags.DEFINE_string("like", "", "safetensors file with the shapes to write.")
    command.run(main)
