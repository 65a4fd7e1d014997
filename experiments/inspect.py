"""Looks into a run: its plan, its masks, the degrees of its neurons.

    python -m experiments.inspect runs/quickstart
    python -m experiments.inspect runs/quickstart --layer=block_0/feed_forward/in
    ... --picture=mask.png       draws the mask of the layer, inputs down, outputs across;
                                 of a stacked one the first slice, or --slice=N
    ... --masks=masks.npz        writes all masks, for `tk.load_masks` and `sparse.init=`

The plan, and one line for each sparse parameter, with its in- and out-degrees (entries of
A in a column and in a row) and its dead units; of one layer also how many neurons have
each degree. Exit code 2 with one line on stderr where there is nothing to look at.
"""

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

import topkast_jax as tk
from experiments import command, evaluate
from experiments.assembly import assemble
from experiments.table import markdown


class Degrees(NamedTuple):
    """Connections of the neurons on both sides of a layer, all slices together.

    Attributes:
      inward: [outputs], entries of A in the column of each output.
      outward: [inputs], entries in the row of each input.
    """

    inward: np.ndarray
    outward: np.ndarray

    @property
    def dead(self) -> int:
        """Outputs without any input."""
        return int((self.inward == 0).sum())


def as_matrix(mask: np.ndarray, axes: str) -> np.ndarray:
    """[slices, inputs, outputs] of a mask.

    Args:
      mask: of the parameter's shape.
      axes: a letter for each axis, as in the plan: s, k, i, o.
    """
    letters = axes.split()
    order = sorted(range(mask.ndim), key=lambda a: "skio".index(letters[a]))
    sizes = {k: 1 for k in "so"}
    for letter, size in zip(letters, mask.shape, strict=True):
        if letter in sizes:
            sizes[letter] *= size
    return mask.transpose(order).reshape(sizes["s"], -1, sizes["o"])


def degrees(matrix: np.ndarray) -> Degrees:
    """Counts entries by column and by row, of [slices, inputs, outputs]."""
    return Degrees(matrix.sum(axis=1).reshape(-1), matrix.sum(axis=2).reshape(-1))


def matrices(run: evaluate.Run, plan: tk.Plan) -> dict[str, np.ndarray]:
    """A of every sparse parameter by path, [slices, inputs, outputs].

    Raises:
      ValueError: the network is dense.
    """
    forward = tk.dense_masks(run.weights.masks).forward
    flat = jax.tree_util.tree_flatten_with_path(forward)[0]
    masks = {
        jax.tree_util.keystr(keys, simple=True, separator="/"): np.asarray(mask)
        for keys, mask in flat
    }
    axes = {row.path: row.axes for row in plan.rows if row.sparse}
    return {path: as_matrix(mask, axes[path]) for path, mask in masks.items()}


def described(found: Mapping[str, np.ndarray]) -> str:
    """A Markdown table: sparsity, degrees and dead units of every parameter."""
    rows = []
    for path, matrix in found.items():
        each = degrees(matrix)
        cells = [f"{1 - matrix.mean():.4f}"]
        for side in each:
            low, middle, high = np.percentile(side, (0, 50, 100))
            cells.append(f"{low:.0f} / {middle:.0f} / {high:.0f}")
        rows.append([path, *cells, str(each.dead)])
    head = ["parameter", "sparsity of A", "in-degree", "out-degree", "dead units"]
    return f"{markdown([head, *rows])}\n\ndegrees: least / median / most"


def draw(file: pathlib.Path, title: str, matrix: np.ndarray) -> None:
    """Writes a mask as PNG: inputs down, outputs across, A dark; one slice, a pixel an
    entry where there are few.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    inputs, outputs = matrix.shape
    wide = 8.0
    high = min(16.0, max(2.0, wide * inputs / outputs)) + 0.8
    figure = Figure(figsize=(wide, high), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(~matrix, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("outputs")
    axes.set_ylabel("inputs")
    figure.savefig(file, dpi=150)


def look(
    workdir: str,
    layer: str | None,
    picture: str | None,
    masks: str | None,
    number: int = 0,
) -> str:
    """What was asked for, as text; files are written besides.

    Args:
      workdir: folder of a run.
      layer: path of a parameter; its kernel may be left out.
      picture: PNG to write, of the layer.
      masks: npz to write, of all masks.
      number: which slice of a stacked parameter is drawn.
    Raises:
      ValueError: nothing to look at, or no such layer or slice.
    """
    run = evaluate.read(workdir)
    assembly = assemble(run.config)
    if assembly.method is None:
        raise ValueError(f"{workdir} holds a dense network: it has no masks")
    shapes = jax.eval_shape(assembly.task.init, assembly.init_key)[0]
    plan = tk.plan(assembly.tx, shapes)
    found = matrices(run, plan)
    if masks is not None:
        tk.save_masks(masks, tk.dense_masks(run.weights.masks).forward)
    if layer is None:
        if picture is not None:
            raise ValueError("--picture is of one layer: name it with --layer")
        return f"{plan}\n\n{described(found)}"
    path = layer if layer in found else f"{layer}/kernel"
    if path not in found:
        raise ValueError(f"no layer {layer!r}; there are {', '.join(found)}")
    if not 0 <= number < len(found[path]):
        raise ValueError(f"--slice={number}: {path} has {len(found[path])}, from 0 on")
    if picture is not None:
        of = f", slice {number} of {len(found[path])}" if len(found[path]) > 1 else ""
        title = f"{path}{of}, step {run.weights.meta['step']}"
        draw(pathlib.Path(picture), title, found[path][number])
    only = tuple(row for row in plan.rows if row.path == path)
    text = [str(plan._replace(rows=only, slotless=())), described({path: found[path]})]
    for name, side in zip(("in", "out"), degrees(found[path]), strict=True):
        values, counts = np.unique(side, return_counts=True)
        pairs = ", ".join(f"{v}: {c}" for v, c in zip(values, counts, strict=True))
        text.append(f"{name}-degree: number of neurons\n  {pairs}")
    return "\n\n".join(text)


def main(argv: list[str]) -> int:
    """Looks, and prints."""
    chosen = flags.FLAGS
    folders = [*argv[1:], *([] if chosen.workdir is None else [chosen.workdir])]
    if len(folders) != 1:
        raise command.BadInput("name one folder of a run, as in runs/quickstart")
    with command.checking():
        print(
            look(
                folders[0],
                chosen.layer,
                chosen.picture,
                chosen.masks,
                chosen.slice,
            )
        )
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of a run, which may also stand alone.")
    flags.DEFINE_string("layer", None, "Path of a sparse parameter.")
    flags.DEFINE_integer("slice", 0, "Which slice of a stacked parameter is drawn.")
    flags.DEFINE_string("picture", None, "PNG to write, of the layer's mask.")
    flags.DEFINE_string("masks", None, "npz to write, of all masks.")
    command.run(main, positional=True)
