"""A sweep's results as a Markdown table: means over seeds."""

import statistics
from collections.abc import Iterable, Sequence

from experiments.jobs import COSTS, Job


def table(jobs: Iterable[Job], *metrics: str) -> str:
    """Mean and sample deviation of metrics after the last step, by row and column.

    Says how many seeds a cell has where some are missing; "-" where all are. A job
    without the label of the columns stands in every column. Jobs with one label beside
    the seed may show several metrics, a column each.

    Args:
      jobs: of one sweep, finished or not.
      *metrics: held-out ones, or of `experiments.jobs.COSTS`.
    Raises:
      ValueError: a finished job has no such metric, or there is no place for several.
    """
    jobs = list(jobs)
    row_label, *column_label = max((job.places() for job in jobs), key=len)
    if not column_label:
        return _by_metric(jobs, row_label, metrics)
    if len(metrics) != 1:
        raise ValueError(
            f"columns are {column_label[0]} here, so one metric at a time can be shown, "
            f"not {', '.join(metrics)}"
        )
    (metric,) = metrics
    cells: dict[str, dict[str | None, list[float | None]]] = {}
    for job in jobs:
        column = job.labels.get(*column_label)
        row = cells.setdefault(job.labels[row_label], {})
        row.setdefault(column, []).append(_value(job, metric))
    columns = sorted({c for row in cells.values() for c in row if c is not None})
    head = [row_label, *columns]
    lines = [head]
    for name, row in cells.items():
        found = [row.get(column, row.get(None, [])) for column in head[1:]]
        lines.append([name, *map(_cell, found)])
    return markdown(lines)


def _by_metric(jobs: Sequence[Job], label: str, metrics: Sequence[str]) -> str:
    names = dict.fromkeys(job.labels[label] for job in jobs)
    lines = [[label, *metrics]]
    for name in names:
        row = [job for job in jobs if job.labels[label] == name]
        cells = (_cell([_value(job, metric) for job in row]) for metric in metrics)
        lines.append([name, *cells])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table from its rows, the head first: names to the left, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    rows = [lines[0], rule, *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in rows)


def _value(job: Job, metric: str) -> float | None:
    result = job.result()
    if result is None:
        return None
    if metric not in result and metric in (name for _, name in COSTS):
        return None  # a dense network has no time beside the dense one
    if metric not in result:
        raise ValueError(f"{job.name} has no metric {metric!r}, only {list(result)}")
    value = result[metric]
    return float("nan") if value is None else float(value)


def _cell(values: list[float | None]) -> str:
    there = [value for value in values if value is not None]
    if not there:
        return "-"
    text = f"{statistics.fmean(there):.3f}"
    if len(there) > 1:
        text += f" ± {statistics.stdev(there):.3f}"
    return text + (f" ({len(there)} of {len(values)})" if None in values else "")
