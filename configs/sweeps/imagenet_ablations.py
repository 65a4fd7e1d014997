"""Top-KAST on ImageNet at 90 %: what refresh, the end of exploration and the penalty do.

Jayakumar et al., 2020, arXiv:2106.03517, section 4.1: refreshes at every step against
every 100 (here also 1000), and the step at which exploration stops, with backward
sparsities of 80 % and 0. What the paper does not show: no penalty, weight decay of all
weights in its place, and the penalty decoupled from the gradient.

    python -m experiments.sweep --sweep=configs/sweeps/imagenet_ablations.py --print_commands
    python -m experiments.sweep --sweep=configs/sweeps/imagenet_ablations.py --table \
        --metric=accuracy
"""

from typing import Any

from configs.sweeps.jobs import job, percent

CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "refresh 1": {"sparse__refresh": 1},
    "refresh 1000": {"sparse__refresh": 1000},
    "stop 0": {"sparse__stop": 0},
    "stop 5000": {"sparse__stop": 5000},
    "stop 16000": {"sparse__stop": 16_000},
    "no penalty": {"sparse__penalty": 0.0},
    "weight decay": {"sparse__penalty": 0.0, "optimizer__decay_penalized": True},
    "penalty decoupled": {"sparse__penalty_mode": "decoupled"},
}
BACKWARD = (0.8, 0.0)
SEEDS = (0, 1, 2)


def get_sweep() -> list[dict[str, Any]]:
    """The jobs: one seed of everything before the next."""
    return [
        job(
            f"configs/imagenet_resnet50.py:forward=0.9,backward={backward}",
            ("change", change),
            ("sparsity", f"90/{percent(backward)}"),
            seed,
            **settings,
        )
        for seed in SEEDS
        for backward in BACKWARD
        for change, settings in CHANGES.items()
    ]
