"""What a metric costs: against FLOPs, against time, against parameters.

The figure 2 of Top-KAST (Jayakumar et al., 2020, arXiv 2106.03517) is drawn against
FLOPs; time is what it left out.
"""

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from experiments.plot import INK, MUTED, dress
from experiments.reports import tables
from experiments.reports.groups import Group, Spread
from experiments.reports.pictures import (
    LEADER,
    Picture,
    apart,
    canvas,
    colors,
    markers,
    png,
)
from experiments.reports.runs import Run


def pictures(groups: Sequence[Group], metric: str) -> list[Picture]:
    """The three of them."""
    return [_flops(groups, metric), _time(groups, metric), _parameters(groups, metric)]


def _flops(groups: Sequence[Group], metric: str) -> Picture:
    factor, prefix = tables.scale([g.spread(lambda r: r.flops).mean for g in groups])
    simulated = any(group.simulated for group in groups)
    label = f"training FLOPs of matrix products, {prefix}FLOPs, analytic"
    if simulated:
        label += f"\n(hollow: {tables.SIMULATED})"
    sparse = [group for group in groups if not group.dense]
    sentences = [_best(groups, metric)]
    if sparse:
        first = sparse[0]
        fraction = first.spread(lambda r: r.flops_fraction).mean
        sentences.append(
            f"{first.label} takes {fraction:.3f} of the FLOPs of its dense network"
            + (f" ({tables.SIMULATED})" if first.simulated else "")
            + f"; measured beside a dense step: {measured(first, groups)}."
        )
    if simulated:
        sentences.append(
            "Hollow points are of the masked layout, which multiplies its zeros: their "
            "FLOPs are those of a program that would not."
        )
    return Picture(
        "flops",
        f"{words(metric)} against training FLOPs",
        " ".join(sentences),
        f"Points, one a group: {words(metric)} up, training FLOPs across. "
        "The table has the numbers.",
        _draw(groups, metric, lambda r: r.flops / factor, label,
              [group.label for group in groups]),
    )  # fmt: skip


def _time(groups: Sequence[Group], metric: str) -> Picture:
    factor, unit = tables.clock([g.spread(lambda r: r.seconds).mean for g in groups])
    labels = []
    for group in groups:
        ratio = None if group.dense else tables.time_ratio(group, groups)
        labels.append(
            f"{group.label}, {ratio.split()[0]} of dense" if ratio else group.label
        )
    machines = {
        (r.origin.devices, r.origin.cores, r.origin.jax) for g in groups for r in g.runs
    }
    said = "; ".join(
        f"{devices}, {cores} cores, jax {jax}"
        for devices, cores, jax in sorted(machines)
    )
    caption = (
        f"{_best(groups, metric)} Time is the sum of the times of the steps, without "
        "compiling, evaluating and saving, as they ran: where other work ran beside, it "
        f"is in there. Hardware: {said}. Ratios are to the dense step, timed in turns "
        "in the process of the run where it was."
    )
    return Picture(
        "time",
        f"{words(metric)} against measured time",
        caption,
        f"Points, one a group: {words(metric)} up, time of all steps across. "
        "The table has the ratios.",
        _draw(groups, metric, lambda r: r.seconds / factor,
              f"time of all steps, {unit}, measured", labels),
    )  # fmt: skip


def _parameters(groups: Sequence[Group], metric: str) -> Picture:
    most = [group.spread(lambda r: r.size).mean for group in groups]
    factor, prefix = tables.scale(most)
    caption = (
        f"{_best(groups, metric)} Parameters are the weights that the network uses after "
        "the last step: all that are not off the mask, and those of layers without one."
    )
    return Picture(
        "parameters",
        f"{words(metric)} against parameters",
        caption,
        f"Points, one a group: {words(metric)} up, parameters that are used across. "
        "The table has the numbers.",
        _draw(groups, metric, lambda r: r.parameters / factor,
              f"parameters used, {prefix or 'as they are'}",
              [group.label for group in groups]),
    )  # fmt: skip


def words(metric: str) -> str:
    """`"Bits per byte"`."""
    return metric.replace("_", " ").capitalize()


def measured(group: Group, groups: Sequence[Group]) -> str:
    """`"step time 1.16, bytes of state 1.16"`."""
    time = tables.time_ratio(group, groups)
    held = group.ratio("state_bytes_ratio")
    return (
        f"step time {time or 'not measured'}, bytes of state "
        f"{'not measured' if held is None else f'{held:.2f}'}"
    )


def _best(groups: Sequence[Group], metric: str) -> str:
    first = groups[0]
    text = f"{words(metric)}, held out, after the last step: best is {first.label}, "
    text += str(first.metric(metric))
    sparse = [group for group in groups if not group.dense]
    if sparse and sparse[0] is not first:
        text += f"; of the sparse ones {sparse[0].label}, {sparse[0].metric(metric)}"
    if any(len(group.runs) > 1 for group in groups):
        return text + ". Bars are one deviation over seeds."
    return text + ". One seed each, so there are no deviations."


def _draw(
    groups: Sequence[Group],
    metric: str,
    value: Callable[[Run], float],
    xlabel: str,
    labels: Sequence[str],
) -> bytes:
    figure = canvas(10.5, max(5.0, 1.4 + 0.24 * len(groups)))
    axes = figure.add_subplot()
    dress(axes, f"{words(metric)}, held out", grid="both")
    color, marker = colors(groups), markers(groups)
    places: list[tuple[Spread, Spread]] = []
    for i, group in enumerate(groups):
        x, y = group.spread(value), group.metric(metric)
        places.append((x, y))
        axes.errorbar(
            x.mean, y.mean, xerr=x.deviation, yerr=y.deviation, color=color[i],
            marker=marker[i], markersize=8, elinewidth=1.2, markeredgewidth=1.8,
            markerfacecolor="white" if group.simulated else color[i], zorder=3,
        )  # fmt: skip
    axes.set_xlim(left=0)
    axes.margins(y=0.08)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(words(metric).lower())
    _name(axes, places, labels, color)
    return png(figure)


def _name(
    axes: Axes,
    places: Sequence[tuple[Spread, Spread]],
    labels: Sequence[str],
    color: Sequence[str],
) -> None:
    """Labels in a column at the right, each with a thin line to its point."""
    low, high = axes.get_ylim()
    wanted = [(y.mean - low) / (high - low) for _, y in places]
    for (x, y), text, height, ink in zip(
        places, labels, apart(wanted, 0.045), color, strict=True
    ):
        axes.annotate(
            text, (x.mean, y.mean), xytext=(1.03, height), textcoords="axes fraction",
            fontsize=9, color=ink if ink != INK else MUTED, va="center",
            annotation_clip=False, zorder=2,
            arrowprops={"arrowstyle": "-", "color": LEADER, "linewidth": 0.9,
                        "shrinkB": 5, "relpos": (0, 0.5)},
        )  # fmt: skip
