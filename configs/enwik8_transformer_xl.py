"""Transformer-XL on enwik8, bytes.

Dai et al., "Transformer-XL", 2019, arXiv:1901.02860, and its authors' scripts; sparse in
Jayakumar et al., "Top-KAST", 2020, arXiv:2106.03517, section 4.2. Adam, rate 2.5e-4
with a cosine to zero over 400,000 steps; evaluation with a memory of 2100 (12 layers)
and 3800 (24 layers).

    python -m experiments.prepare --dataset=enwik8
    python -m experiments.train --config=configs/enwik8_transformer_xl.py \
        --workdir=gs://BUCKET/enwik8 --config.mesh=data:2
    python -m experiments.train --config=configs/enwik8_transformer_xl.py:size=24 \
        --workdir=gs://BUCKET/enwik8-24 --config.mesh=data:16

    :method=rigl,forward=0.95        see configs/sparse.py
    :size=24                         layers: 12 (41M parameters) or 24 (277M)
    :multiplier=2                    twice the steps, with every anchor of schedules
    :tiny                            4 layers of 128 on enwik8_prefix4m, two CPU cores
    :smoke                           a few steps on that text, for tests

A mesh must divide the rows of training and of evaluation: 22 and 10 (12 layers), 64 and
16 (24). --config.batch_size and --config.evaluation.rows change them.

Published dense bits per byte: 1.06 (12 layers), 0.99 (24). `:tiny` reads the first 4
MB of enwik8 alone: its numbers do not compare with published ones.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from configs import common, sparse

SIZES = {
    "12": dict(
        model=dict(layers=12, d_model=512, heads=8, d_head=64, d_inner=2048,
                   segment=512, memory=512, dropout=0.1, attention_dropout=0.0),
        evaluation=dict(rows=10, segment=80, memory=2100, clamp=820,
                        same_length=True),
        batch=22, warmup=0,
    ),
    "24": dict(
        model=dict(layers=24, d_model=1024, heads=8, d_head=128, d_inner=3072,
                   segment=768, memory=768, dropout=0.15, attention_dropout=0.15),
        evaluation=dict(rows=16, segment=128, memory=3800, clamp=1000,
                        same_length=True),
        batch=64, warmup=4000,
    ),
}  # fmt: skip
TINY = dict(
    model=dict(layers=4, d_model=128, heads=2, d_head=64, d_inner=512,
               segment=64, memory=64, dropout=0.0, attention_dropout=0.0),
    evaluation=dict(rows=32, segment=64, memory=128, clamp=64),
    batch=16, warmup=100,
)  # fmt: skip
SMOKE = dict(
    model=dict(layers=1, d_model=32, heads=2, d_head=16, d_inner=64,
               segment=16, memory=16, dropout=0.0, attention_dropout=0.0),
    evaluation=dict(rows=8, segment=8, memory=32, clamp=16),
    batch=8, warmup=2,
)  # fmt: skip


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config; `arg` is a comma separated list, see the docstring of this file."""
    args = common.parse(
        arg, **sparse.ARGUMENTS, size="12", multiplier=1.0, tiny=False, smoke=False
    )
    smoke, small, chosen = (
        args["smoke"],
        args["tiny"] or args["smoke"],
        sparse.choose(args),
    )
    common.require_size(args["size"], SIZES)
    size = SMOKE if smoke else TINY if small else SIZES[args["size"]]
    anchor = common.anchors(args["multiplier"])

    text = "enwik8_prefix4m" if small else "enwik8"
    config = common.begin(
        f"{text}-{'tiny' if small else args['size']}-{chosen.suffix}",
        anchor(8 if smoke else 1000 if small else 400_000),
    )

    config.task = "language_model"
    config.dataset = text
    config.data_dir = placeholder(str)  # of TFDS; None: its default
    config.batch_size = size["batch"]
    config.model = dict(
        **size["model"],
        norm="post",
        tied_biases=True,
        init_std=placeholder(float) if small else 0.02,
        dtype="float32" if small else "bfloat16",  # of activations
    )
    config.evaluation = size["evaluation"]

    config.optimizer = dict(name="adam", clip=1.0 if small else 0.25)
    config.learning_rate = dict(
        peak=3e-3 if small else 2.5e-4, warmup=anchor(size["warmup"]), end=0.0
    )
    config.sparse = sparse.settings(
        chosen,
        refresh=3 if smoke else 100,
        where="*/feed_forward/*/kernel" if smoke else "",
        axes=common.TRANSFORMER_AXES,
    )

    config.mesh = "data:1"
    config.sharding = ((r".*/(kernel|embedding)", "fsdp"), (r".*", ()))
    common.rhythm(config, every=2 if smoke else 25 if small else 200,
                  evaluate=4 if smoke else 475 if small else 4000,
                  save=4 if smoke else 500 if small else 4000,
                  batches=2 if smoke else None)  # fmt: skip
    return config
