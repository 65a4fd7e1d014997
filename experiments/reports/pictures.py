"""What the pictures of a report have in common: their looks, and how they are kept."""

import io
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from experiments.plot import BLUE, GREEN, INK, MUTED, ORANGE, dress
from experiments.reports.groups import Group

COLORS = (BLUE, ORANGE, GREEN, "#a03b6f", "#7a5bb5", "#8c6d1f", "#2a8fa3", "#b5483a",
          "#5b6f2a", "#56749c")  # fmt: skip
MARKERS = "os^Dv"
TOGETHER = 6  # curves in one panel; more get a panel each
FAINT, LEADER = "#d5dae0", "#c6ccd4"


class Picture(NamedTuple):
    """A picture and its words.

    Attributes:
      name: of its file, without .png.
      title: a heading.
      caption: what is seen, in whole sentences.
      alt: for those who do not see it.
      png: None where there is nothing to draw; then the caption says why.
    """

    name: str
    title: str
    caption: str
    alt: str
    png: bytes | None = None


class Curve(NamedTuple):
    """A line and its band: arrays of one length; `deviation` None for one seed."""

    steps: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray | None


def colors(groups: Sequence[Group]) -> list[str]:
    """A colour for each group; dense ones are in ink."""
    sparse = iter(range(len(groups)))
    return [
        INK if group.dense else COLORS[next(sparse) % len(COLORS)] for group in groups
    ]


def markers(groups: Sequence[Group]) -> list[str]:
    """A shape for each group, another one when colours begin again."""
    return [MARKERS[i // len(COLORS) % len(MARKERS)] for i in range(len(groups))]


def canvas(width: float, height: float) -> Figure:
    """A white figure, sizes in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.04)
    figure = Figure(figsize=(width, height), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def png(figure: Figure) -> bytes:
    """The file of a figure."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=130)
    return out.getvalue()


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in [0, 1], in the order of those wanted, at least a gap apart.

    The nearest such places in least squares: an isotonic regression (pool adjacent
    violators) of what is left when the gaps are taken out. The gap shrinks where there
    is not room for all.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gap = min(gap, 1 / max(1, len(wanted) - 1))
    pools: list[list[float]] = []
    for rank, i in enumerate(order):
        pools.append([wanted[i] - rank * gap])
        while len(pools) > 1 and fmean(pools[-2]) >= fmean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    level = [fmean(pool) for pool in pools for _ in pool]
    most = 1 - (len(wanted) - 1) * gap
    places = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        places[i] = min(max(level[rank], 0.0), most) + rank * gap
    return places


def curves(
    groups: Sequence[Group],
    found: Sequence[Curve | None],
    title: str,
    ylabel: str,
    *,
    limits: tuple[float, float] | None = None,
    points: Callable[[Axes, int], None] | None = None,
    dots: bool = False,
) -> bytes:
    """Draws a curve for each group that has one, with a band of one deviation.

    Few share a panel; of many, each has its own, before the others in grey.

    Args:
      groups: of the report.
      found: their curves.
      title: over all.
      ylabel: what is drawn, and its unit.
      limits: of the vertical axis.
      points: `(axes, number of a group)` draws what else belongs to it.
      dots: whether single values are to be seen.
    """
    shown = [i for i, curve in enumerate(found) if curve is not None]
    color = colors(groups)

    def draw(axes: Axes, i: int) -> None:
        curve = found[i]
        assert curve is not None
        axes.plot(curve.steps, curve.mean, color=color[i], linewidth=1.7,
                  label=groups[i].label, marker="o" if dots else "", markersize=3.5)  # fmt: skip
        if curve.deviation is not None:
            low, high = curve.mean - curve.deviation, curve.mean + curve.deviation
            axes.fill_between(
                curve.steps, low, high, color=color[i], alpha=0.2, linewidth=0
            )
        if points is not None:
            points(axes, i)

    if len(shown) <= TOGETHER:
        figure = canvas(10.5, 5.6)
        axes = figure.add_subplot()
        dress(axes, title)
        for i in shown:
            draw(axes, i)
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)
        axes.set_ylim(limits)
        figure.legend(
            loc="outside right center", frameon=False, fontsize=9.5, labelcolor=INK
        )
        return png(figure)
    columns = 4
    lines = -(-len(shown) // columns)
    figure = canvas(11.5, 1.0 + 1.75 * lines)
    panels = [
        *figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    ]
    for axes, i in zip(panels, shown, strict=False):
        dress(axes, groups[i].label)
        axes.title.set_fontsize(9.5)
        for other in shown:
            curve = found[other]
            if other != i and curve is not None:
                axes.plot(curve.steps, curve.mean, color=FAINT, linewidth=0.8, zorder=1)
        draw(axes, i)
        axes.tick_params(labelsize=8)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    if limits is not None:
        panels[0].set_ylim(limits)
    figure.suptitle(title, x=0.012, ha="left", fontsize=11.5, color=INK)
    figure.supxlabel("step", fontsize=10, color=MUTED)
    figure.supylabel(ylabel, fontsize=10, color=MUTED)
    return png(figure)
