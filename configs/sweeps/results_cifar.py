"""First evidence on CIFAR-10: a ResNet of 8 layers, 600 steps of 64 images.

    python -m experiments.prepare --dataset=cifar10
    python -m experiments.sweep --sweep=configs/sweeps/results_cifar.py \
        --results=docs/results_cifar.jsonl
    python -m experiments.sweep --sweep=configs/sweeps/results_cifar.py \
        --results=docs/results_cifar.jsonl --table \
        --metric=accuracy,flops_fraction,time_ratio

Budget: about two minutes a run on one CPU core, 63 runs, an hour on two cores. That is
3/4 of an epoch: read the order, not the values. The narrow dense network has 5 filters
where the others have 16.
"""

from typing import Any

from configs.sweeps.evidence import evidence

STEPS = 600


def get_sweep() -> list[dict[str, Any]]:
    """The jobs: one seed of everything before the next."""
    return evidence(
        "configs/cifar.py:tiny",
        STEPS,
        {"model.width": 5},
        # The others decay no weight that Top-KAST could penalize.
        {"weight decay": {"sparse.penalty": 0.0, "optimizer.decay_penalized": True}},
        eval_every=STEPS,
        save_every=STEPS,
        dense_steps=5,
    )
