"""Whether runs of several seeds end with the same masks, up to a permutation of neurons.

    python -m experiments.agreement --runs=runs/methods/rigl-0,runs/methods/rigl-1 \
        --chain=block_0/feed_forward/in/kernel,block_0/feed_forward/out/kernel

A chain names layers that follow each other; its hidden units are matched (see
`tk.mask_agreement`). `--chain` may be given several times; without it every sparse
parameter is compared as it stands. Prints a Markdown table: the overlap of A as the
networks stand, after matching, and what random masks reach after matching, means over
all pairs of runs. Exit code 2 with one line on stderr where nothing can be compared.
"""

from collections.abc import Sequence

import jax
from absl import flags

import topkast_jax as tk
from experiments import command, evaluate
from experiments.table import markdown


def forward(workdir: str) -> dict[str, jax.Array]:
    """A of a run's newest checkpoint, by path.

    Raises:
      ValueError: no checkpoint, or a dense network.
    """
    masks = tk.dense_masks(evaluate.read(workdir).weights.masks).forward
    flat = jax.tree_util.tree_flatten_with_path(masks)[0]
    if not flat:
        raise ValueError(f"{workdir} holds a dense network: it has no masks")
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): mask
        for keys, mask in flat
    }


def compare(workdirs: Sequence[str], chains: Sequence[Sequence[str]]) -> str:
    """The table; see the docstring of this file.

    Args:
      workdirs: of two runs or more.
      chains: paths of layers that follow each other; none: every parameter alone.
    Raises:
      ValueError: fewer than two runs, or networks that cannot be compared.
    """
    masks = [forward(workdir) for workdir in workdirs]
    rows = []
    for chain in chains or [[path] for path in masks[0]]:
        for path, found in tk.mask_agreement(masks, chain).items():
            rows.append([path, *(f"{value:.3f}" for value in found)])
    return markdown([["overlap of A", "as it stands", "matched", "random"], *rows])


def main(argv: list[str]) -> int:
    """Compares, and prints."""
    del argv
    if flags.FLAGS.runs is None:
        raise command.BadInput("--runs is missing: folders of two runs or more")
    chains = [chain.split(",") for chain in flags.FLAGS.chain]
    with command.checking():
        print(compare(flags.FLAGS.runs.split(","), chains))
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("runs", None, "Folders of runs, comma separated.")
    flags.DEFINE_multi_string("chain", [], "Layers that follow each other.")
    command.run(main)
