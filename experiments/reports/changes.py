"""What happened on the way: learning curves, and what became of the masks."""

import statistics
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from experiments.plot import BLUE, INK, MUTED, dress
from experiments.reports.costs import words
from experiments.reports.groups import Group, rises
from experiments.reports.pictures import Curve, Picture, canvas, colors, curves, png

FEW = 3  # evaluations that make no curve


def pictures(groups: Sequence[Group], metric: str) -> list[Picture]:
    """Learning, churn, use of the reservoir, sparsity per layer."""
    return [_learning(groups, metric), _churn(groups), _reservoir(groups),
            _layers(groups)]  # fmt: skip


def curve(group: Group, kind: str, name: str) -> Curve | None:
    """Mean and deviation at the steps that all runs of a group have; None: no value."""
    by_step: dict[int, list[float]] = {}
    for run in group.runs:
        for row in run.of_kind(kind):
            if row.get(name) is not None:
                by_step.setdefault(row["step"], []).append(row[name])
    found = {s: v for s, v in sorted(by_step.items()) if len(v) == len(group.runs)}
    if not found:
        return None
    mean = np.array([statistics.fmean(v) for v in found.values()])
    deviation = None
    if len(group.runs) > 1:
        deviation = np.array([statistics.stdev(v) for v in found.values()])
    return Curve(np.array(list(found)), mean, deviation)


def _learning(groups: Sequence[Group], metric: str) -> Picture:
    kind, name = "eval", metric
    found = [curve(group, kind, name) for group in groups]
    if all(each is None or len(each.steps) < FEW for each in found):
        has = any(metric in row for row in groups[0].runs[0].of_kind("train"))
        kind, name = "train", metric if has else "loss"
        found = [curve(group, kind, name) for group in groups]
    what = "held out" if kind == "eval" else "in training, means since the row before"
    title = f"Learning curves: {words(name).lower()}, {what}"
    caption = f"{words(name)}, {what}, by step. "
    if any(len(group.runs) > 1 for group in groups):
        caption += "The band is one deviation over seeds. "
    else:
        caption += "One seed each, so there are no bands. "
    ends = name == metric and kind == "train"
    if ends:
        caption += (
            "There are too few evaluations for a curve of held-out values; the point at "
            "the end is the last one, with one deviation."
        )
    color = colors(groups)

    def end(axes: Axes, i: int) -> None:
        last = groups[i].metric(metric)
        axes.errorbar(
            groups[i].runs[0].config["steps"], last.mean, last.deviation,
            color=color[i], marker="D", markersize=5, elinewidth=1.2, clip_on=False,
            zorder=4,
        )  # fmt: skip

    there = [each for each in found if each is not None]
    if not there:
        return Picture("learning", "Learning curves", f"No run logged {name}.", "")
    return Picture(
        "learning",
        "Learning curves",
        caption,
        f"Curves, one a group: {words(name)} up, steps across.",
        curves(groups, found, title, words(name).lower(),
               limits=_limits(there, groups, metric if ends else None, rises(name)),
               points=end if ends else None),
    )  # fmt: skip


def _limits(
    found: Sequence[Curve], groups: Sequence[Group], metric: str | None, up: bool
) -> tuple[float, float]:
    """The first few steps go through values that would flatten all the rest."""
    late = [np.asarray(each.mean)[len(each.mean) // 10 :] for each in found]
    values = [*np.concatenate(late)]
    if metric is not None:
        values += [group.metric(metric).mean for group in groups]
    if up:
        values += [value for each in found for value in each.mean]
    low, high = float(min(values)), float(max(values))
    room = 0.06 * (high - low) or 0.1
    return low - room, high + room


def _churn(groups: Sequence[Group]) -> Picture:
    found = [_percent(curve(group, "train", "churn")) for group in groups]
    title, name = "Churn of A", "churn"
    there = {g.label: each for g, each in zip(groups, found, strict=True) if each}
    if not there:
        return Picture(
            name, title, "No run changed its masks after the first step.", ""
        )
    ends = {label: each.mean[-1] for label, each in there.items()}
    low, high = min(ends, key=lambda k: ends[k]), max(ends, key=lambda k: ends[k])
    caption = (
        "Share of A that is new after a refresh, at the last refresh before each row of "
        f"the log. At the end it is highest for {high}, {ends[high]:.1f} %, and lowest "
        f"for {low}, {ends[low]:.1f} %."
    )
    still = [group.label for group in groups if group.label not in there]
    if still:
        caption += f" Without refreshes, or without masks: {', '.join(still)}."
    most = max(float(each.mean.max()) for each in there.values())
    return Picture(
        name, title, caption, "Curves, one a group: churn of A in percent up, steps across.",
        curves(groups, found, "Churn: share of A that is new after a refresh", "% of A",
               limits=(0, 1.08 * most or 1), dots=True),
    )  # fmt: skip


def _reservoir(groups: Sequence[Group]) -> Picture:
    found = [_percent(curve(group, "train", "reservoir_used")) for group in groups]
    title, name = "Use of the reservoir", "reservoir"
    there = {g.label: each for g, each in zip(groups, found, strict=True) if each}
    if not there:
        return Picture(
            name,
            title,
            "Which weights outside the first A have ever been in A was not noted by these "
            "runs: it takes two bytes a weight, so a run is asked for it, with "
            "--config.sparse.track_reservoir=True.",
            "",
        )
    ends = {label: each.mean[-1] for label, each in there.items()}
    low, high = min(ends, key=lambda k: ends[k]), max(ends, key=lambda k: ends[k])
    caption = (
        "Share of the weights outside the first A that have been in A since: how much of "
        f"the reservoir was ever used. At the end {high} has used {ends[high]:.1f} %"
        + (f", {low} {ends[low]:.1f} %." if low != high else ".")
    )
    missing = [g.label for g in groups if g.label not in there and not g.dense]
    if missing:
        caption += f" Not noted by {', '.join(missing)}."
    most = max(float(each.mean.max()) for each in there.values())
    return Picture(
        name, title, caption,
        "Curves, one a group: share of the reservoir used in percent up, steps across.",
        curves(groups, found, "Reservoir: share of what was not in the first A that has "
               "been in A since", "% of the reservoir", limits=(0, 1.08 * most or 1)),
    )  # fmt: skip


def _percent(found: Curve | None) -> Curve | None:
    if found is None:
        return None
    deviation = None if found.deviation is None else 100 * found.deviation
    return Curve(found.steps, 100 * found.mean, deviation)


def _layers(groups: Sequence[Group]) -> Picture:
    columns: dict[str, dict[str, float]] = {}
    for group in groups:
        last = [r.of_kind("layers")[-1]["forward"] for r in group.runs
                if r.of_kind("layers")]  # fmt: skip
        if last:
            columns[group.label] = {
                path: 100 * statistics.fmean(each[path] for each in last)
                for path in last[0]
            }
    title, name = "Sparsity per layer", "layers"
    if not columns:
        return Picture(name, title, "All networks are dense: there are no masks.", "")
    paths = list(dict.fromkeys(path for each in columns.values() for path in each))
    table = np.array(
        [[each.get(path, np.nan) for each in columns.values()] for path in paths]
    )
    low, high = (np.unravel_index(f(table), table.shape)
                 for f in (np.nanargmin, np.nanargmax))  # fmt: skip
    labels = list(columns)
    caption = (
        f"Zeros of A in percent, by parameter and group, after the last step. Least: "
        f"{table[low]:.1f} in {paths[low[0]]} of {labels[low[1]]}; most: {table[high]:.1f} "
        f"in {paths[high[0]]} of {labels[high[1]]}."
    )
    return Picture(
        name, title, caption,
        "A grid: parameters down, groups across, the darker the more zeros.",
        _grid(table, paths, labels),
    )  # fmt: skip


def _grid(table: np.ndarray, paths: Sequence[str], labels: Sequence[str]) -> bytes:
    from matplotlib.colors import LinearSegmentedColormap

    rows, columns = table.shape
    figure = canvas(
        max(7.0, min(16.0, 3.5 + 0.48 * columns)),
        max(3.2, min(22.0, 1.6 + 0.26 * rows)),
    )
    axes = figure.add_subplot()
    dress(axes, "Sparsity of A per layer, % zeros")
    axes.grid(visible=False)
    shades = LinearSegmentedColormap.from_list("zeros", ["#f4f7fb", BLUE, "#173a66"])
    low = 10 * np.floor(np.nanmin(table) / 10)
    drawn = axes.imshow(table, cmap=shades, vmin=min(low, 90), vmax=100, aspect="auto")
    axes.set_yticks(range(rows), [p.removesuffix("/kernel") for p in paths],
                    fontsize=min(8.5, max(4.5, 1200 / max(1, rows) / 8)))  # fmt: skip
    axes.set_xticks(range(columns), labels, rotation=40, ha="right",
                    rotation_mode="anchor", fontsize=8.5, color=INK)  # fmt: skip
    axes.spines[:].set_visible(False)
    if rows * columns <= 1200:
        middle = 0.6 * min(low, 90) + 0.4 * 100
        for i, j in zip(*np.nonzero(~np.isnan(table)), strict=True):
            ink = "white" if table[i, j] > middle else INK
            text = f"{table[i, j]:.0f}" if table[i, j] < 99.95 else "100"
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color=ink)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.03, pad=0.01)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, length=0, labelcolor=MUTED)
    return png(figure)
