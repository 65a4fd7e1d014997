"""One page about many runs: what each group reached, and what that cost.

    python -m experiments.report runs/methods                    all runs of a sweep
    python -m experiments.report runs/rigl-0 runs/rigl-1 ...     or runs by name
    ... --out=report          the folder: report.html, the pictures as PNG, table.md
    ... --metric=loss         of the evaluations; accuracy, bits_per_byte or perplexity
                              where it says nothing, whichever the runs have

Runs whose configs differ in nothing but the seed are a group: means, and deviations over
seeds. The page holds everything, so that one file can be sent. Only finished runs are
shown; others are named, with the reason. Nothing in the folders of the runs changes.

Exit codes: 0 the page is written; 2 bad input, said in one line.
"""

import math
from collections.abc import Sequence

from absl import flags
from etils import epath

from experiments import command, log, paths
from experiments.reports import changes, costs, groups, runs, tables
from experiments.reports.page import page
from experiments.table import markdown


def report(given: Sequence[str], out: str, metric: str | None = None) -> epath.Path:
    """Writes the page, the pictures and the table; returns the path of the page.

    Args:
      given: folders of runs, or of folders of runs; they may lie in a bucket.
      out: folder to write to; made where it is missing.
      metric: to compare by; None chooses.
    Raises:
      ValueError: no finished run, or no such metric.
      OSError: a folder that cannot be written.
    """
    read, left_out = _read(runs.find(given))
    metric = groups.choose_metric(read, metric)
    kept = []
    for run in read:
        if math.isfinite(run.metrics[metric]):
            kept.append(run)
        else:
            left_out[str(run.folder)] = f"{metric} is not finite after the last step"
    for number, first in groups.repeated(kept).items():
        left_out[str(kept[number].folder)] = (
            f"config and seed are those of {first.folder}"
        )
    kept = [run for run in kept if str(run.folder) not in left_out]
    if not kept:
        raise ValueError(f"no run has a finite {metric}: {_named(left_out)}")
    found = groups.grouped(kept, metric)
    results = tables.results(found, metric)
    of_costs, on_the_way = (
        costs.pictures(found, metric),
        changes.pictures(found, metric),
    )
    counts = f"{_counted(len(found), 'group')}, {_counted(len(kept), 'run')}"
    title = f"{costs.words(metric)} of {counts}"
    folder = paths.folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    for picture in (*of_costs, *on_the_way):
        if picture.png is not None:
            _write(folder / f"{picture.name}.png", picture.png)
    notes = _notes(found)
    table = "\n\n".join([markdown(results), *notes])
    _write(folder / "table.md", f"{table}\n".encode())
    text = page(
        title,
        _summary(found, metric, left_out),
        results,
        notes,
        of_costs,
        on_the_way,
        tables.differences(found),
        tables.common(found),
        tables.provenance(found),
        left_out,
    )
    path = folder / "report.html"
    _write(path, text.encode())
    for name, why in left_out.items():
        log.warn(f"left out: {name}: {why}")
    print(f"{title}, {len(left_out)} left out: {path}")
    return path


def _read(
    folders: Sequence[epath.Path],
) -> tuple[list[runs.Run], dict[str, str]]:
    read, left_out = [], {}
    for folder in folders:
        try:
            read.append(runs.read(folder))
        except runs.Unusable as error:
            left_out[str(folder)] = str(error)
    if not read:
        raise ValueError(f"no finished run: {_named(left_out)}")
    return read, left_out


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")


def _named(left_out: dict[str, str]) -> str:
    return "; ".join(f"{run}: {why}" for run, why in left_out.items())


def _summary(
    found: Sequence[groups.Group], metric: str, left_out: dict[str, str]
) -> list[str]:
    seeds = sorted({len(group.runs) for group in found})
    count = "one seed" if seeds == [1] else f"{seeds[0]} seeds"
    if len(seeds) > 1:
        count = f"{seeds[0]} to {seeds[-1]} seeds"
    order = "higher" if groups.rises(metric) else "lower"
    said = [
        f"{costs.words(metric)} on held-out data after the last step, {order} is better; "
        f"{count} a group. A group is runs whose configs differ in nothing but the seed.",
    ]
    commits = {run.origin.commit for group in found for run in group.runs}
    if len(commits) > 1:
        said.append(
            f"The runs are of {len(commits)} commits: see where they come from."
        )
    if left_out:
        said.append(f"Left out: {len(left_out)}, named at the end with the reasons.")
    return said


def _notes(found: Sequence[groups.Group]) -> list[str]:
    notes = [
        "Values are mean ± deviation over seeds. A gap under two deviations, the larger "
        "of the two groups', is a tie; where a group has one seed, that of the other one "
        "counts, and without any nothing is said.",
        "FLOPs are analytic, of matrix products: forward with A, gradients of activations "
        "with A, of weights with B; FLOPs / dense is of the same network without masks. "
        "Time and bytes (of parameters, masks and optimizer state) are measured.",
    ]
    if any(group.simulated for group in found):
        notes.append(
            f'"{tables.SIMULATED}" is said where zeros are stored and multiplied: there '
            "the share of FLOPs is no gain in time."
        )
    return notes


def _write(path: epath.Path, data: bytes) -> None:
    """At once: a reader never sees half of it."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def main(argv: list[str]) -> int:
    """Reports."""
    if len(argv) < 2:
        raise command.BadInput("name folders of runs, as in runs/methods")
    with command.checking():
        report(argv[1:], flags.FLAGS.out, flags.FLAGS.metric)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("out", "report", "Folder to write to.")
    flags.DEFINE_string("metric", None, "Of the evaluations, to compare by.")
    command.run(main, positional=True)
