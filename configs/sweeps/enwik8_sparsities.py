"""Transformer-XL on enwik8: dense, pruned, and Top-KAST by forward and backward sparsity.

Jayakumar et al., 2020, arXiv:2106.03517, section 4.2.

    python -m experiments.sweep --sweep=configs/sweeps/enwik8_sparsities.py --print_commands
    python -m experiments.sweep --sweep=configs/sweeps/enwik8_sparsities.py --table \\
        --metric=bits_per_byte
"""

from typing import Any

from configs.sweeps.jobs import job, percent

SIZES = ("12", "24")
PAIRS = (
    (0.8, 0.0),
    (0.8, 0.6),
    (0.8, 0.8),
    (0.9, 0.0),
    (0.9, 0.6),
    (0.9, 0.8),
    (0.95, 0.9),
)
PRUNED = (0.8, 0.9, 0.95)
SEEDS = (0, 1, 2)


def get_sweep() -> list[dict[str, Any]]:
    """The jobs: one seed of everything before the next."""
    jobs = []
    for seed in SEEDS:
        for size in SIZES:
            file, column = (
                f"configs/enwik8_transformer_xl.py:size={size}",
                ("size", size),
            )
            jobs.append(job(f"{file},method=dense", ("run", "dense"), column, seed))
            for sparsity in PRUNED:
                jobs += [
                    job(
                        f"{file},method={method},forward={sparsity}",
                        ("run", f"{method} {percent(sparsity)}"),
                        column,
                        seed,
                    )
                    for method in ("magnitude", "rigl")
                ]
            jobs += [
                job(
                    f"{file},forward={forward},backward={backward}",
                    ("run", f"top_kast {percent(forward)}/{percent(backward)}"),
                    column,
                    seed,
                )
                for forward, backward in PAIRS
            ]
    return jobs
