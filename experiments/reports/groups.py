"""Runs of one config with several seeds: a group, its name, its numbers."""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.config import flatten
from experiments.reports.runs import Run

# What does not tell one group from another: nothing that is computed depends on it.
SAME = frozenset(["seed", "name", "data_dir", "compilation_cache", "profile",
                  "log_every", "eval_every", "save_every", "keep", "dense_steps"])  # fmt: skip
METRICS = ("accuracy", "bits_per_byte", "perplexity", "loss")
"""In the order in which a report chooses, where it is not told."""
SPARSITIES = ("forward_sparsity", "backward_sparsity", "sparsity")
FIRST = ("sparsity", "structure", "layout", "distribution")
"""What a label tells first, beside the method: the values alone."""
THEN = ("d_model", "width", "depth", "layers", "steps", "batch_size")
"""What it tells rather than other keys."""


class Spread(NamedTuple):
    """Mean over seeds, and sample deviation; None where there is one seed."""

    mean: float
    deviation: float | None

    def __str__(self) -> str:
        return self.words()

    def words(self, scale: float = 1.0, form: str = ".3f") -> str:
        """`"2.973 ± 0.012"`, divided by a scale."""
        text = f"{self.mean / scale:{form}}"
        if self.deviation is None:
            return text
        return f"{text} ± {self.deviation / scale:{form}}"


class Group(NamedTuple):
    """Runs that differ in their seed alone.

    Attributes:
      label: short, and no other group's.
      runs: at least one.
    """

    label: str
    runs: list[Run]

    def spread(self, value: Callable[[Run], float]) -> Spread:
        """Of a number of its runs."""
        return spread([value(run) for run in self.runs])

    def metric(self, name: str) -> Spread:
        """Of a held-out metric after the last step."""
        return self.spread(lambda run: run.metrics[name])

    def ratio(self, name: str) -> float | None:
        """Mean of a measured ratio to the dense step; None where no run has it."""
        found = [run.ratios[name] for run in self.runs if name in run.ratios]
        return statistics.fmean(found) if found else None

    def last(self, name: str) -> Spread | None:
        """Of the last value in rows of kind "train"; None where a run has none."""
        found = []
        for run in self.runs:
            values = [row[name] for row in run.of_kind("train") if name in row]
            if not values or values[-1] is None:
                return None
            found.append(values[-1])
        return spread(found)

    @property
    def dense(self) -> bool:
        """Whether it has no masks."""
        return self.runs[0].method == "dense"

    @property
    def simulated(self) -> bool:
        """Whether its FLOPs are those of zeros left out, and its steps leave out none."""
        return self.runs[0].simulated


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation)


def rises(metric: str) -> bool:
    """Whether more of a metric is better."""
    return "accuracy" in metric


def choose_metric(runs: Sequence[Run], wanted: str | None) -> str:
    """What the runs are compared by.

    Raises:
      ValueError: a run does not have it, or all have none in common.
    """
    common = [name for name in runs[0].metrics if all(name in r.metrics for r in runs)]
    if wanted is not None:
        for run in runs:
            if wanted not in run.metrics:
                raise ValueError(
                    f"--metric={wanted}: {run.folder} has {', '.join(run.metrics)}"
                )
        return wanted
    if not common:
        raise ValueError(
            f"no metric is common to all runs: {runs[0].folder} has "
            f"{', '.join(runs[0].metrics)}; name runs of one task"
        )
    return min(common, key=lambda m: METRICS.index(m) if m in METRICS else 99)


def repeated(runs: Iterable[Run]) -> dict[int, Run]:
    """Numbers of runs whose config and seed an earlier one has: they are no new seed."""
    seen: dict[str, Run] = {}
    again = {}
    for number, run in enumerate(runs):
        key = json.dumps([_key(run), run.config["seed"]])
        if key in seen:
            again[number] = seen[key]
        seen.setdefault(key, run)
    return again


def grouped(runs: Iterable[Run], metric: str) -> list[Group]:
    """Groups, the best first."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_key(run), []).append(run)
    members = [sorted(each, key=lambda r: r.config["seed"]) for each in found.values()]
    groups = [
        Group(label, each)
        for label, each in zip(_labels(members), members, strict=True)
    ]
    sign = -1 if rises(metric) else 1
    return sorted(groups, key=lambda group: sign * group.metric(metric).mean)


def told_apart(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """`{"dotted.key": value of each group}` of what is not the same in all configs."""
    flat = [_flat(group.runs[0]) for group in groups]
    keys = sorted(set().union(*flat))
    rows = {key: [each.get(key, "-") for each in flat] for key in keys}
    return {key: row for key, row in rows.items() if any(v != row[0] for v in row)}


def standing(groups: Sequence[Group], metric: str) -> list[list[str]]:
    """What may be said of the order: who is best, and who ties with the best.

    A gap under two deviations, the larger of the two groups', is a tie. Without any
    deviation nothing is said. Sparse groups are compared among themselves as well.
    """
    said: list[list[str]] = [[] for _ in groups]
    sparse = [i for i, group in enumerate(groups) if not group.dense]
    pools = {"best": list(range(len(groups)))}
    if len(sparse) not in (0, len(groups)):
        pools["best of the sparse"] = sparse
    for word, pool in pools.items():
        values = {i: groups[i].metric(metric) for i in pool}
        best = pool[0]  # groups are sorted
        if word != "best" and best == 0:
            continue
        said[best].append(word)
        for i in pool[1:]:
            known = [v.deviation for v in (values[i], values[best]) if v.deviation]
            gap = abs(values[i].mean - values[best].mean)
            if (known and gap < 2 * max(known)) or gap == 0:
                said[i].append(f"a tie with the {word}")
    return said


def counterpart(group: Group, groups: Iterable[Group]) -> Group | None:
    """The dense group of the same config but for its sparsity."""

    def rest(run: Run) -> dict[str, Any]:
        flat = _flat(run)
        return {k: v for k, v in flat.items() if not k.startswith("sparse.")}

    for other in groups:
        if other.dense and rest(other.runs[0]) == rest(group.runs[0]):
            return other
    return None


def _flat(run: Run) -> dict[str, Any]:
    return {k: v for k, v in flatten(run.config).items() if k not in SAME}


def _key(run: Run) -> str:
    return json.dumps(_flat(run), sort_keys=True)


def _labels(members: Sequence[Sequence[Run]]) -> list[str]:
    """The sweep's where they do, else the method and what must be said besides."""
    given = [" ".join(runs[0].labels.values()) for runs in members]
    agreed = all(run.labels == runs[0].labels for runs in members for run in runs)
    if agreed and all(given) and len(set(given)) == len(given):
        return given
    traits = [_traits(runs[0]) for runs in members]
    methods = [runs[0].method for runs in members]
    words = [_words(i, methods, traits) for i in range(len(members))]
    if len(set(methods)) == 1 and all(words):
        return [" ".join(each) for each in words]  # the method goes without saying
    return [
        " ".join([method, *each]) for method, each in zip(methods, words, strict=True)
    ]


def _words(
    which: int, methods: Sequence[str], traits: Sequence[Mapping[str, str]]
) -> list[str]:
    """What tells a group from others of its method."""
    rivals = [i for i, method in enumerate(methods) if method == methods[which]]
    words = []
    told = (*FIRST, *THEN)

    def rank(key: str) -> tuple[int, str]:
        name = key.rpartition(".")[2]
        return (told.index(name) if name in told else len(told), key)

    keys = sorted(set().union(*(traits[i] for i in rivals)), key=rank)
    left = [i for i in rivals if i != which]  # that are still called the same
    for key in keys:
        own = traits[which].get(key, f"no {key}")
        apart = [i for i in left if traits[i].get(key, f"no {key}") != own]
        # The structure, say, is told even where the sparsity differs as well.
        first = key in FIRST and key in traits[which]
        if apart or (first and any(traits[i].get(key) != own for i in rivals)):
            words.append(own)
            left = [i for i in left if i not in apart]
    return words


def _traits(run: Run) -> dict[str, str]:
    """What a label may say: `{key: words}`."""
    flat = {k.removeprefix("sparse."): v for k, v in _flat(run).items()}
    shares = [flat.pop(key) for key in SPARSITIES if key in flat]
    flat.pop("method", None)
    traits = {
        key: str(value) if key in FIRST else f"{key.rpartition('.')[2]}={value}"
        for key, value in flat.items()
    }
    numbers = [s for s in shares if isinstance(s, int | float) and math.isfinite(s)]
    if numbers:
        traits["sparsity"] = "/".join(f"{100 * share:g}" for share in numbers)
    return traits
