"""Longer training of GSE at 98 % on CIFAR-100: 200, 300 and 400 epochs.

Heddes et al., 2024, arXiv:2401.06898, supplement: ResNet-56 54.3, 56.4, 57.9; VGG-16
40.8, 44.1, 45.9; ViT 40.7, 45.3, 47.8. Every anchor of the schedules moves with the length.

    python -m experiments.sweep --sweep=configs/sweeps/cifar_length.py --print_commands
    python -m experiments.sweep --sweep=configs/sweeps/cifar_length.py --table \
        --metric=accuracy
"""

from typing import Any

from configs.sweeps.jobs import job

SIZES = ("resnet56", "vgg16", "vit")
EPOCHS = (200, 300, 400)
SEEDS = (0, 1, 2)


def get_sweep() -> list[dict[str, Any]]:
    """The jobs: one seed of everything before the next."""
    return [
        job(
            f"configs/cifar.py:dataset=cifar100,size={size},method=gse,forward=0.98,"
            f"multiplier={epochs / 200}",
            ("size", size),
            ("epochs", str(epochs)),
            seed,
        )
        for seed in SEEDS
        for size in SIZES
        for epochs in EPOCHS
    ]
