"""First evidence on text: the first 4 MB of enwik8, a Transformer-XL of 4 layers of 128.

    python -m experiments.prepare --dataset=enwik8_prefix4m --manual_dir=DOWNLOADS
    python -m experiments.sweep --sweep=configs/sweeps/results_enwik8.py \
        --results=docs/results_enwik8_prefix4m.jsonl
    python -m experiments.sweep --sweep=configs/sweeps/results_enwik8.py \
        --results=docs/results_enwik8_prefix4m.jsonl --table \
        --metric=bits_per_byte,flops_fraction,time_ratio

Budget: about two minutes a run on one CPU core, 60 runs, an hour on two cores: 500 of
the 1000 steps of `:tiny`, held-out text of 200,000 bytes. Its numbers do not compare with
published ones of enwik8. The narrow dense network is 46 wide in place of 128.
"""

from typing import Any

from configs.sweeps.evidence import evidence

STEPS = 500


def get_sweep() -> list[dict[str, Any]]:
    """The jobs: one seed of everything before the next."""
    return evidence(
        "configs/enwik8_transformer_xl.py:tiny",
        STEPS,
        {"model.d_model": 46, "model.d_head": 23, "model.d_inner": 184},
        steps=STEPS,
        eval_every=STEPS,
        save_every=STEPS,
        dense_steps=5,
    )
