"""The picture of a run: summary.png, drawn from metrics.jsonl."""

import io
import math
import os
from collections.abc import Sequence
from typing import Any, Literal

from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from experiments import log, paths

INK, MUTED, GRID = "#22272e", "#6b7480", "#e6e9ed"
BLUE, ORANGE, GREEN, PALE = "#2f6db5", "#d9772b", "#3a8f6b", "#b9cfe8"


def summary(workdir: str | os.PathLike[str], title: str) -> epath.Path:
    """Draws loss, churn, sparsity per layer, and cost beside dense.

    Args:
      workdir: holds metrics.jsonl; panels without rows say so.
      title: over everything.
    Returns:
      Path of the picture, `workdir/summary.png`.
    """
    rows = log.read(workdir)
    layout = ConstrainedLayoutEngine(w_pad=0.16, h_pad=0.14, wspace=0.04, hspace=0.05)
    figure = Figure(figsize=(12.5, 8.2), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(1.15, 1), height_ratios=(1, 1))
    panels = [figure.add_subplot(grid[i, j]) for i in range(2) for j in range(2)]
    _loss(panels[0], rows)
    _layers(panels[1], _kind(rows, "layers"))
    _churn(panels[2], _kind(rows, "train"))
    _cost(panels[3], rows)
    figure.suptitle(title, x=0.012, ha="left", fontsize=16, color=INK, weight="bold")
    path = paths.folder(workdir) / "summary.png"
    temporary = path.with_name("summary.tmp.png")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130)
    temporary.write_bytes(picture.getvalue())
    temporary.replace(path)
    return path


def _kind(rows: Sequence[log.Row], kind: str) -> list[log.Row]:
    return [row for row in rows if row["kind"] == kind]


def dress(axes: Axes, title: str, grid: Literal["x", "y", "both"] = "y") -> None:
    """Title, grid and quiet colours, the same in all pictures."""
    axes.set_title(title, loc="left", fontsize=11.5, color=INK, pad=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)


def empty(axes: Axes, text: str) -> None:
    """Says why there is nothing to see."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=MUTED)
    axes.set_xticks([])
    axes.set_yticks([])


def _series(rows: Sequence[log.Row], name: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _to_nats(bits: Any) -> Any:
    return bits * math.log(2)


def _to_bits(nats: Any) -> Any:
    return nats / math.log(2)


def _loss(axes: Axes, rows: Sequence[log.Row]) -> None:
    train, held_out = _kind(rows, "train"), _kind(rows, "eval")
    bits = any("bits_per_byte" in row for row in train)
    name = "bits_per_byte" if bits else "loss"
    label = "bits per byte" if bits else "loss"
    dress(axes, f"{label.capitalize()}: training, and held-out with exported weights")
    steps, values = _series(train, name)
    if not steps:
        empty(axes, "no rows yet")
        return
    axes.plot(steps, values, color=PALE, linewidth=1.6, label="training")
    # The first few steps go through values that would flatten all the rest.
    low, high = min(values), max(values[len(values) // 10 :])
    steps, values = _series(held_out, name)
    if steps:
        low, high = min(low, *values), max(high, *values)
        axes.plot(steps, values, color=BLUE, linewidth=1.8, marker="o", markersize=4.5,
                  label="held-out")  # fmt: skip
        axes.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), color=BLUE,
                      xytext=(0, 9), textcoords="offset points", ha="center",
                      fontsize=10, weight="bold")  # fmt: skip
    room = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - room, high + room)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    if bits:  # one curve, two units
        nats = axes.secondary_yaxis("right", functions=(_to_nats, _to_bits))
        nats.set_ylabel("loss, nats per byte", color=MUTED)
        nats.tick_params(colors=MUTED, labelsize=9, length=0)
        nats.spines["right"].set_visible(False)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _churn(axes: Axes, rows: Sequence[log.Row]) -> None:
    dress(axes, "Churn: share of the forward set that is new after a refresh")
    steps, values = _series(rows, "churn")
    if not steps:
        empty(axes, "no refresh")
        return
    axes.vlines(steps, 0, [100 * v for v in values], color=PALE, linewidth=1.6)
    axes.plot(steps, [100 * v for v in values], "o", color=ORANGE, markersize=4.5)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("% of A")


def _layers(axes: Axes, rows: Sequence[log.Row]) -> None:
    dress(axes, "Sparsity per layer, %", grid="x")
    if not rows:
        empty(axes, "dense: no masks")
        return
    paths = list(rows[-1]["forward"])
    forward = [100 * rows[-1]["forward"][path] for path in paths]
    backward = [100 * rows[-1]["backward"][path] for path in paths]
    places = range(len(paths))
    axes.barh(places, forward, height=0.68, color=PALE, label="forward set A")
    axes.plot(backward, places, "|", color=ORANGE, markersize=11, markeredgewidth=2.2,
              label="backward set B")  # fmt: skip
    names = [path.removesuffix("/kernel") for path in paths]
    axes.set_yticks(places, names, fontsize=min(8.5, max(4.5, 190 / len(paths))))
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=2, loc="lower right",
                bbox_to_anchor=(1.0, 0.995), borderaxespad=0.2)  # fmt: skip


def _cost(axes: Axes, rows: Sequence[log.Row]) -> None:
    dress(axes, "Cost beside the dense step, ratio", grid="x")
    dense, train = _kind(rows, "dense"), _kind(rows, "train")
    bars: list[tuple[str, float, str, str]] = []
    if train and train[-1].get("flops_fraction") is not None:
        simulated = not dense or dense[-1].get("simulated", 1)
        label = "FLOPs\nsimulated:\nmasked layout" if simulated else "FLOPs\nanalytic"
        bars.append((label, train[-1]["flops_fraction"], "white", "////"))
    names = (
        ("time_ratio", "step time\nmeasured", ORANGE),
        ("state_bytes_ratio", "bytes of state\nmeasured", BLUE),
        ("memory_ratio", "bytes of a step\nplanned by XLA", GREEN),
    )
    for name, label, color in names:
        if dense and dense[-1].get(name) is not None:
            bars.append((label, dense[-1][name], color, ""))
    if not bars:
        empty(axes, "no dense step was timed")
        return
    for place, (_, value, color, hatch) in enumerate(bars):
        axes.barh(place, value, height=0.6, color=color, hatch=hatch,
                  edgecolor=MUTED if hatch else color)  # fmt: skip
        beside = 1.0 if 0.9 < value < 1 else value  # clear of the dashed line
        axes.text(beside + 0.02, place, f"{value:.2f}", va="center", fontsize=10.5,
                  color=INK, weight="bold")  # fmt: skip
    axes.axvline(1, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.text(1, -0.62, "dense", ha="center", va="bottom", fontsize=9, color=MUTED)
    axes.set_yticks(range(len(bars)), [label for label, *_ in bars], color=INK)
    axes.set_xlim(0, max(1.25, 1.15 * max(value for _, value, *_ in bars)))
    axes.set_ylim(len(bars) - 0.4, -0.62)
    if dense:
        both = dense[-1]["step_time"], dense[-1]["dense_step_time"]
        axes.set_xlabel(
            f"step {1000 * both[0]:.1f} ms, dense {1000 * both[1]:.1f} ms: medians, "
            "run in turns in one process"
        )
