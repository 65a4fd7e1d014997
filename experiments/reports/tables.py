"""What a report says in rows: results, differences of configs, provenance."""

from collections.abc import Sequence
from typing import Any

from experiments.config import flatten
from experiments.reports.groups import Group, counterpart, standing, told_apart

Rows = list[list[str]]
SIMULATED = "simulated: masked layout"


def results(groups: Sequence[Group], metric: str) -> Rows:
    """One row a group, the head first.

    Shares of FLOPs are of the group's own network without masks, and analytic; ratios of
    time and bytes are measured.
    """
    flops, prefix = scale([group.spread(lambda r: r.flops).mean for group in groups])
    said = standing(groups, metric)
    sparse = [group for group in groups if not group.dense]
    throughout = bool(sparse) and all(group.simulated for group in sparse)
    head = ["group", "seeds", metric, "standing", f"training {prefix}FLOPs",
            f"FLOPs / dense ({SIMULATED})" if throughout else "FLOPs / dense",
            "time / dense", "bytes / dense", "parameters",
            "sparsity of A, B", "churn at last"]  # fmt: skip
    rows = [head]
    for group, words in zip(groups, said, strict=True):
        fraction = f"{group.spread(lambda r: r.flops_fraction).mean:.3f}"
        if group.simulated and not throughout:
            fraction += f" ({SIMULATED})"
        sides = [group.last(name) for name in ("sparsity", "backward_sparsity")]
        share = ", ".join(f"{side.mean:.3f}" for side in sides if side)
        churn = group.last("churn")
        rows.append(
            [
                group.label,
                str(len(group.runs)),
                str(group.metric(metric)),
                ", ".join(words),
                f"{group.spread(lambda r: r.flops).mean / flops:.3g}",
                "1" if group.dense else fraction,
                "1" if group.dense else time_ratio(group, groups) or "-",
                "1" if group.dense else _two(group.ratio("state_bytes_ratio")),
                f"{round(group.spread(lambda r: r.parameters).mean):,}",
                share or "-",
                churn.words(1, ".3f") if churn else "-",
            ]
        )
    return rows


def time_ratio(group: Group, groups: Sequence[Group]) -> str | None:
    """Of a step to the dense one: from turns in one process, else from a dense run."""
    beside = group.ratio("time_ratio")
    if beside is not None:
        return f"{beside:.2f}"
    dense = counterpart(group, groups)
    if dense is None:
        return None
    both = (each.spread(lambda r: r.seconds).mean for each in (group, dense))
    own, other = both
    return f"{own / other:.2f} (of another run)"


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def differences(groups: Sequence[Group]) -> Rows:
    """What their configs do not share: a row a group, a column a key."""
    found = told_apart(groups)
    rows = [["group", *found]]
    for number, group in enumerate(groups):
        rows.append([group.label, *(_short(row[number]) for row in found.values())])
    return rows


def common(groups: Sequence[Group]) -> dict[str, Any]:
    """`{"dotted.key": value}` of what all configs share."""
    apart = {*told_apart(groups), "seed", "name"}
    config = flatten(groups[0].runs[0].config)
    return {key: value for key, value in config.items() if key not in apart}


def provenance(groups: Sequence[Group]) -> Rows:
    """One row a run."""
    rows = [["group", "seed", "folder", "commit", "devices", "cores", "jax", "saved"]]
    for group in groups:
        for run in group.runs:
            origin = run.origin._replace(commit=_commit(run.origin.commit))
            seed = str(run.config["seed"])
            commit, devices, cores, jax, saved = origin
            rows.append([group.label, seed, str(run.folder), commit, devices, cores,
                         jax, saved])  # fmt: skip
    return rows


def _commit(text: str) -> str:
    commit, dash, dirty = text.partition("-")
    return f"{commit[:10]}{dash}{dirty}" if text != "-" else text


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def scale(values: Sequence[float]) -> tuple[float, str]:
    """What to divide by, and its prefix: (1e12, "T")."""
    most = max(map(abs, values), default=0)
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"),
                           (1e6, "M"), (1e3, "k")):  # fmt: skip
        if most >= factor:
            return factor, prefix
    return 1.0, ""


def clock(seconds: Sequence[float]) -> tuple[float, str]:
    """What to divide by, and the unit."""
    most = max(seconds, default=0)
    if most >= 7200:
        return 3600.0, "hours"
    return (60.0, "minutes") if most >= 120 else (1.0, "seconds")
