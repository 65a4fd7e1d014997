"""Methods on CIFAR-10 and CIFAR-100 at 90, 95 and 98 %, the table of GSE.

Heddes et al., 2024, arXiv:2401.06898: ResNet-56, VGG-16 and a small ViT, three seeds.
Top-KAST, which the paper does not have, trains twice as many weights as it uses.

    python -m experiments.sweep --sweep=configs/sweeps/cifar_methods.py --print_commands
    python -m experiments.sweep --sweep=configs/sweeps/cifar_methods.py --table \
        --metric=accuracy
"""

from typing import Any

from configs.sweeps.jobs import arguments, job, percent

METHODS = ("static", "snip", "set", "rigl", "gse", "magnitude", "top_kast")
MODELS = ("resnet56", "vgg16", "vit")
DATASETS = ("cifar10", "cifar100")
SPARSITIES = (0.9, 0.95, 0.98)
SEEDS = (0, 1, 2)


def get_sweep() -> list[dict[str, Any]]:
    """The jobs: one seed of everything before the next."""
    jobs = []
    for seed in SEEDS:
        for dataset in DATASETS:
            for model in MODELS:
                file = f"configs/cifar.py:dataset={dataset},size={model}"
                where = f"{dataset} {model}"
                jobs.append(
                    job(
                        f"{file},method=dense", ("method", "dense"), ("on", where), seed
                    )
                )
                jobs += [
                    job(
                        f"{file},{arguments(method, sparsity)}",
                        ("method", method),
                        ("on", f"{where} {percent(sparsity)}"),
                        seed,
                    )
                    for method in METHODS
                    for sparsity in SPARSITIES
                ]
    return jobs
