"""Erdős–Rényi shares of layers against uniform ones, on CIFAR-100.

Heddes et al., 2024, arXiv:2401.06898: for SET and RigL Erdős–Rényi shares are better on
all three networks.

    python -m experiments.sweep --sweep=configs/sweeps/cifar_distribution.py --print_commands
    python -m experiments.sweep --sweep=configs/sweeps/cifar_distribution.py --table \
        --metric=accuracy
"""

from typing import Any

from configs.sweeps.jobs import job, percent

SIZES = ("resnet56", "vgg16", "vit")
METHODS = ("set", "rigl", "gse")
DISTRIBUTIONS = ("erdos_renyi", "uniform")
SPARSITIES = (0.9, 0.95, 0.98)
SEEDS = (0, 1, 2)


def get_sweep() -> list[dict[str, Any]]:
    """The jobs: one seed of everything before the next."""
    return [
        job(
            f"configs/cifar.py:dataset=cifar100,size={size},method={method},"
            f"forward={sparsity}",
            ("run", f"{method}, {distribution}"),
            ("on", f"{size} {percent(sparsity)}"),
            seed,
            sparse__distribution=distribution,
        )
        for seed in SEEDS
        for size in SIZES
        for method in METHODS
        for distribution in DISTRIBUTIONS
        for sparsity in SPARSITIES
    ]
