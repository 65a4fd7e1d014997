"""Transformer-XL on WikiText-103, words.

Dai et al., "Transformer-XL", 2019, arXiv:1901.02860, and its authors' scripts; sparse in
Jayakumar et al., "Top-KAST", 2020, arXiv:2106.03517, section 4.2. Adam, rate 2.5e-4 with
a cosine to zero, adaptive embedding and softmax of 267,735 words.

    python -m experiments.prepare --dataset=wikitext103 --manual_dir=DOWNLOADS
    python -m experiments.train --config=configs/wikitext103_transformer_xl.py \
        --workdir=gs://BUCKET/wikitext103 --config.mesh=data:2
    python -m experiments.train --workdir=gs://BUCKET/large \
        --config=configs/wikitext103_transformer_xl.py:size=large --config.mesh=data:8

    :method=rigl,forward=0.95        see configs/sparse.py
    :size=large                      285M parameters; standard: 151M
    :multiplier=2                    twice the steps, with every anchor of schedules
    :tiny                            a small one, trained on the test text, two CPU cores
    :smoke                           a few steps on that text, for tests

A mesh must divide the rows of training and of evaluation: 60 and 10 (standard), 128 and 8
(large). --config.batch_size and --config.evaluation.rows change them.

The large network of the authors' script has 285,205,322 parameters, with embeddings,
projections and biases (tests/golden/test_parameter_counts.py adds them up), where their
paper says 257M, and not what it counts.

Published dense perplexities: 24.0 (standard), 18.3 (large). `:tiny` and `:smoke` train
on the benchmark's test split and evaluate on its validation split, with the words of both
as vocabulary: a check of the code, whose numbers compare with nothing.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from configs import common, sparse

SIZES = {
    "standard": dict(
        model=dict(layers=16, d_model=410, heads=10, d_head=41, d_inner=2100,
                   segment=150, memory=150, dropout=0.1, attention_dropout=0.0,
                   cutoffs=(20_000, 40_000, 200_000), div_val=1, tied_biases=True,
                   init_std=0.02),
        evaluation=dict(rows=10, segment=64, memory=640, clamp=400,
                        same_length=True),
        batch=60, warmup=0, steps=200_000,
    ),
    "large": dict(
        model=dict(layers=18, d_model=1024, heads=16, d_head=64, d_inner=4096,
                   segment=384, memory=384, dropout=0.2, attention_dropout=0.2,
                   cutoffs=(20_000, 40_000, 200_000), div_val=4, tied_biases=False,
                   init_std=0.005),
        evaluation=dict(rows=8, segment=128, memory=1600, clamp=1000,
                        same_length=True),
        batch=128, warmup=16_000, steps=4_000_000,
    ),
}  # fmt: skip
TINY = dict(
    model=dict(layers=2, d_model=128, heads=2, d_head=64, d_inner=256,
               segment=64, memory=64, dropout=0.0, attention_dropout=0.0,
               cutoffs=(1000, 4000), div_val=2, tied_biases=True, init_std=0.02),
    evaluation=dict(rows=16, segment=64, memory=128, clamp=64),
    batch=16, warmup=50, steps=400,
)  # fmt: skip
SMOKE = dict(
    model=dict(layers=1, d_model=32, heads=2, d_head=16, d_inner=64,
               segment=16, memory=16, dropout=0.0, attention_dropout=0.0,
               cutoffs=(1000, 4000), div_val=2, tied_biases=False, init_std=0.02),
    evaluation=dict(rows=8, segment=8, memory=32, clamp=16),
    batch=8, warmup=2, steps=8,
)  # fmt: skip


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config; `arg` is a comma separated list, see the docstring of this file."""
    args = common.parse(
        arg,
        **sparse.ARGUMENTS,
        size="standard",
        multiplier=1.0,
        tiny=False,
        smoke=False,
    )
    smoke, small, chosen = (
        args["smoke"],
        args["tiny"] or args["smoke"],
        sparse.choose(args),
    )
    common.require_size(args["size"], SIZES)
    size = SMOKE if smoke else TINY if small else SIZES[args["size"]]
    anchor = common.anchors(args["multiplier"])

    text = "wikitext103_heldout" if small else "wikitext103"
    config = common.begin(
        f"{text}-{'tiny' if small else args['size']}-{chosen.suffix}",
        anchor(size["steps"]),
    )

    config.task = "language_model"
    config.dataset = f"{text}_vocabulary" if small else text
    config.data_dir = placeholder(str)  # of TFDS; None: its default
    config.batch_size = size["batch"]
    config.model = dict(
        **size["model"],
        norm="post",
        dtype="float32" if small else "bfloat16",  # of activations
    )
    config.evaluation = size["evaluation"]

    config.optimizer = dict(name="adam", clip=0.25)
    config.learning_rate = dict(
        peak=1e-3 if small else 2.5e-4, warmup=anchor(size["warmup"]), end=0.0
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
                  evaluate=4 if smoke else 190 if small else 4000,
                  save=4 if smoke else 200 if small else 4000,
                  batches=2 if smoke else None)  # fmt: skip
    return config
