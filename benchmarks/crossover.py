"""Where each layout becomes faster than dense: step time against sparsity, drawn.

    python -m benchmarks.crossover --picture=docs/crossover.png
    python -m benchmarks.crossover --quick

One whole train step of `benchmarks.layouts` at each forward sparsity, the backward one
10 points less, against the dense step. "crosses" is the sparsity from which on a layout
takes less time than dense, by straight lines between the points; the picture needs
matplotlib.
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence

import jax

import topkast_jax as tk
from benchmarks import timing
from benchmarks.layouts import Training, Way
from benchmarks.problems import PROBLEMS, Problem

WAYS = [
    Way("masked", tk.unstructured),
    Way("packed", tk.unstructured),
    Way("block", tk.fan_in(1, 256)),
    Way("block", tk.blocks(128, 128)),
]
COLORS = ["#6b7480", "#d9772b", "#3a8f6b", "#2f6db5"]
INK, GRID = "#22272e", "#e6e9ed"


def measure(problem: Problem, forward: int, repeats: int) -> dict[str, float]:
    """Time / dense of every layout at a forward sparsity in percent."""
    pair = (forward / 100, (forward - 10) / 100)
    trainings = {"dense": Training(problem, None, pair)}
    trainings |= {way.name: Training(problem, way, pair) for way in WAYS}
    contest = timing.in_turns(
        {name: timing.Contestant(t.step) for name, t in trainings.items()}, repeats
    )
    jax.clear_caches()
    return {way.name: contest.ratio(way.name, to="dense") for way in WAYS}


def crossing(sparsities: Sequence[int], ratios: Sequence[float]) -> str:
    """From which sparsity on ratios stay below 1, in percent; "-" where never."""
    above = [i for i, ratio in enumerate(ratios) if ratio >= 1]
    if not above:
        return f"< {sparsities[0]}"
    i = above[-1]
    if i + 1 == len(ratios):
        return "-"
    (x0, x1), (y0, y1) = sparsities[i : i + 2], ratios[i : i + 2]
    return f"{x0 + (x1 - x0) * (y0 - 1) / (y0 - y1):.0f}"


def draw(
    path: pathlib.Path,
    title: str,
    sparsities: Sequence[int],
    ratios: Mapping[str, Sequence[float]],
) -> None:
    """Writes the chart."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (name, values), color in zip(ratios.items(), COLORS, strict=True):
        axes.plot(sparsities, values, "o-", color=color, markersize=4, label=name)
    axes.axhline(1, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.text(sparsities[0], 1.01, "dense", va="bottom", fontsize=9, color=INK)
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("forward sparsity, % (backward: 10 less)")
    axes.set_ylabel("time of a step / dense")
    axes.set_xticks(sparsities)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints and draws; `argv` without the name of the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crossover")
    parser.add_argument("--size", default="mlp-4096", choices=PROBLEMS)
    parser.add_argument("--sparsities", default="50,60,70,80,90,95,98")
    parser.add_argument("--picture", type=pathlib.Path, help="PNG to write")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--quick", action="store_true", help="tiny model, 2 rounds")
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.sparsities, args.repeats = "tiny", "90", 2
    try:
        sparsities = [int(text) for text in args.sparsities.split(",")]
    except ValueError:
        parser.error(f"--sparsities={args.sparsities} is no list of percents")
    if sparsities != sorted(set(sparsities)) or sparsities[0] < 10:
        parser.error(f"--sparsities={args.sparsities} must ascend from 10 or more")
    if sparsities[-1] > 99 or args.repeats < 1:
        parser.error("--sparsities end at 99, --repeats begin at 1")
    problem = PROBLEMS[args.size]()
    found = [measure(problem, sparsity, args.repeats) for sparsity in sparsities]
    ratios = {way.name: [ratio[way.name] for ratio in found] for way in WAYS}
    rows = [
        [name, *(f"{value:.2f}" for value in values), crossing(sparsities, values)]
        for name, values in ratios.items()
    ]
    header = ["time / dense", *map(str, sparsities), "crosses"]
    print(f"{problem.title}: medians of {args.repeats} rounds\n")
    print(timing.table(header, rows))
    print(f"\n{timing.hardware()}")
    if args.picture is not None:
        draw(args.picture, problem.title, sparsities, ratios)


if __name__ == "__main__":
    main()
