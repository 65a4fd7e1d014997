"""Wider networks with as many weights: GSE on CIFAR-100, ResNet-56 of width 1 to 4.

Heddes et al., 2024, arXiv:2401.06898: at a constant number of weights, convolutional
networks gain by width. A network of w times the width has about w^2 the weights, so the
density is 2 % over w^2; small parts (norms, biases) grow with w.

    python -m experiments.sweep --sweep=configs/sweeps/cifar_width.py --print_commands
    python -m experiments.sweep --sweep=configs/sweeps/cifar_width.py --table \
        --metric=accuracy
"""

from typing import Any

from configs.sweeps.jobs import job

METHODS = ("static", "set", "rigl", "gse", "top_kast")
WIDTHS = (1, 2, 3, 4)
SEEDS = (0, 1, 2)


def get_sweep() -> list[dict[str, Any]]:
    """The jobs: one seed of everything before the next."""
    return [
        job(
            f"configs/cifar.py:dataset=cifar100,method={method},"
            f"forward={round(1 - 0.02 / width**2, 6)}",
            ("method", method),
            ("width", str(width)),
            seed,
            model__width=16 * width,
        )
        for seed in SEEDS
        for method in METHODS
        for width in WIDTHS
    ]
