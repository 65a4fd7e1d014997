"""Wider networks with as many weights, on CIFAR-100: widths 1 to 4.

Heddes et al., 2024, arXiv:2401.06898: at a constant number of weights, convolutional
networks gain by width (6.5 points on average at 4), and the ViT loses. A network of w
times the width has about w^2 the weights, so the density is 2 % over w^2; small parts
(norms, biases) grow with w. Top-KAST trains twice as many weights as it uses. Beside them
the dense ViT, for which the paper has 60.3, 62.5, 62.2 and 62.2.

    python -m experiments.sweep --sweep=configs/sweeps/cifar_width.py --print_commands
    python -m experiments.sweep --sweep=configs/sweeps/cifar_width.py --table \
        --metric=accuracy
"""

from typing import Any

from configs.sweeps.jobs import arguments, job

METHODS = ("static", "set", "rigl", "gse", "top_kast")
WIDTHS = (1, 2, 3, 4)
SEEDS = (0, 1, 2)


def wider(size: str, width: int) -> dict[str, Any]:
    """Overrides of `config.model` for `width` times the width."""
    if size == "resnet56":
        return dict(model__width=16 * width)
    if size == "vgg16":
        return dict(model__width=16 * width, model__hidden=512 * width)
    return dict(
        model__width=512 * width, model__heads=6 * width, model__d_inner=256 * width
    )


def get_sweep() -> list[dict[str, Any]]:
    """The jobs: one seed of everything before the next."""
    runs = [
        (size, method)
        for size in ("resnet56", "vgg16", "vit")
        for method in (*METHODS, *(["dense"] if size == "vit" else []))
    ]
    return [
        job(
            f"configs/cifar.py:dataset=cifar100,size={size},"
            + arguments(method, round(1 - 0.02 / width**2, 6)),
            ("run", f"{size} {method}"),
            ("width", str(width)),
            seed,
            **wider(size, width),
        )
        for seed in SEEDS
        for size, method in runs
        for width in WIDTHS
    ]
