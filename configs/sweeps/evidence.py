"""What the sweeps of docs/results.md compare, the same on every data set.

Dense, a dense network that is so narrow that it has the weights of the sparse ones, and
methods at 90 %; Top-KAST at five pairs of sparsities with masks at every step, as the
paper defines it, and what happens to it with random B, without its penalty, when
exploration stops early, and with masks every 100 steps. How often masks change is the one
number that is tried twice, for Top-KAST and for the methods that drop and grow; all else,
learning rates included, is what the configs say, for every method.
"""

from collections.abc import Mapping
from typing import Any

METHODS = ("static", "set", "rigl", "gse", "magnitude", "straight_through")
PAIRS = ((0.8, 0.8), (0.8, 0.5), (0.9, 0.9), (0.9, 0.8), (0.95, 0.9))
SEEDS = (0, 1, 2)


def evidence(
    file: str,
    length: int,
    small: Mapping[str, Any],
    more: Mapping[str, Mapping[str, Any]] | None = None,
    **every_job: Any,
) -> list[dict[str, Any]]:
    """The jobs: one seed of everything before the next.

    Args:
      file: config and arguments, as in "configs/cifar.py:tiny".
      length: steps of a run.
      small: overrides that make the narrow dense network.
      more: further changes to Top-KAST 90/80, overrides by name.
      **every_job: overrides of all, `__` for dots.
    """
    every_step = {"sparse.refresh": 1}
    runs: dict[str, tuple[str, Mapping[str, Any]]] = {
        "dense": ("method=dense", {}),
        "small dense": ("method=dense", small),
        **{method: (f"method={method},forward=0.9", {}) for method in METHODS},
    }
    for forward, backward in PAIRS:
        name = f"top_kast {100 * forward:.0f}/{100 * backward:.0f}"
        runs[name] = (f"forward={forward},backward={backward}", every_step)
    changes: dict[str, Mapping[str, Any]] = {
        "random B": every_step | {"sparse.explore": "random"},
        "no penalty": every_step | {"sparse.penalty": 0.0},
        "stop at a quarter": every_step | {"sparse.stop": length // 4},
        "refresh 100": {"sparse.refresh": 100},
    }
    changes |= {name: every_step | change for name, change in (more or {}).items()}
    for method in ("set", "rigl", "gse"):
        often = {"sparse.refresh": 20}
        runs[f"{method}, refresh 20"] = (f"method={method},forward=0.9", often)
    for name, change in changes.items():
        runs[f"top_kast 90/80, {name}"] = ("forward=0.9,backward=0.8", change)
    always = {key.replace("__", "."): value for key, value in every_job.items()}
    return [
        dict(
            name=f"{name}-{seed}".replace(" ", "-").replace("/", "-").replace(",", ""),
            config=f"{file},{arguments}",
            overrides={"seed": seed, **always, **changes},
            labels={"run": name, "seed": seed},
        )
        for seed in SEEDS
        for name, (arguments, changes) in runs.items()
    ]
