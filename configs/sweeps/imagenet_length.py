"""ImageNet for one, two and five times the steps: RigL's tables and Top-KAST's figures.

Evci et al., 2020, arXiv:1911.11134: RigL at 80 and 90 % gains with every extension (5x).
Jayakumar et al., 2020, arXiv:2106.03517, compare Top-KAST with it at equal training FLOPs
and 98 and 99 %, for 1, 2 and 5 times the steps. Every anchor of the schedules moves with
the length. Top-KAST trains twice as many weights as it uses.

    python -m experiments.sweep --sweep=configs/sweeps/imagenet_length.py --print_commands
    python -m experiments.sweep --sweep=configs/sweeps/imagenet_length.py --table \
        --metric=accuracy
"""

from typing import Any

from configs.sweeps.jobs import arguments, job, percent

METHODS = ("static", "set", "rigl", "top_kast")
SPARSITIES = (0.8, 0.9, 0.98, 0.99)
MULTIPLIERS = (1, 2, 5)
SEEDS = (0, 1, 2)
FILE = "configs/imagenet_resnet50.py"


def get_sweep() -> list[dict[str, Any]]:
    """The jobs: one seed of everything before the next."""
    return [
        job(
            f"{FILE}:{arguments(method, sparsity)},multiplier={multiplier}",
            ("run", f"{method} {multiplier}x"),
            ("sparsity", percent(sparsity)),
            seed,
        )
        for seed in SEEDS
        for method in METHODS
        for multiplier in MULTIPLIERS
        for sparsity in SPARSITIES
    ]
