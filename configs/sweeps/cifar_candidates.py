"""GSE's candidates at 98 %: how many of them (gamma), and drawn how, beside RigL.

Heddes et al., 2024, arXiv:2401.06898: with about as many candidates as weights GSE is as
good as RigL, which looks at every weight; uniform draws are no worse than those by
statistics (GraBo, GraEst). CIFAR-100.

    python -m experiments.sweep --sweep=configs/sweeps/cifar_candidates.py --print_commands
    python -m experiments.sweep --sweep=configs/sweeps/cifar_candidates.py --table \
        --metric=accuracy
"""

from typing import Any

from configs.sweeps.jobs import job

SIZES = ("resnet56", "vgg16", "vit")
CANDIDATES = ("uniform", "grabo", "graest")
GAMMAS = (0.25, 0.5, 1.0, 1.5, 2.0)
SEEDS = (0, 1, 2)


def get_sweep() -> list[dict[str, Any]]:
    """The jobs: one seed of everything before the next."""
    jobs = []
    for seed in SEEDS:
        for size in SIZES:
            file, column = (
                f"configs/cifar.py:dataset=cifar100,size={size}",
                ("on", size),
            )
            jobs.append(
                job(f"{file},method=rigl,forward=0.98", ("run", "rigl"), column, seed)
            )
            jobs += [
                job(
                    f"{file},method=gse,forward=0.98",
                    ("run", f"gse {candidates} {gamma:g}"),
                    column,
                    seed,
                    sparse__candidates=candidates,
                    sparse__subset=gamma,
                )
                for candidates in CANDIDATES
                for gamma in GAMMAS
            ]
    return jobs
