"""CIFAR-10 and CIFAR-100 with the networks and the recipe of GSE.

Heddes et al., "Always-Sparse Training by Growing Connections with Guided Stochastic
Exploration", 2024, arXiv:2401.06898, supplement and code: 200 epochs, batch 128, SGD with
momentum .9, rate .1 (.01 for the ViT) divided by ten after epochs 80 and 120, L2 1e-4,
5 epochs of warm-up, crops and flips; masks every 1000 steps until epoch 120, a fifth of A
at first, cosine to zero; Erdős–Rényi shares. Pruning ramps until epoch 120, here along a
cubic, in the authors' code along a cosine. GSE chooses within layers, as in the paper;
the authors' code does over all of them (`--config.sparse.scope=global`). The paper has no
Top-KAST: its masks are chosen every 1000 steps to the last one.

    python -m experiments.prepare --dataset=cifar10
    python -m experiments.train --config=configs/cifar.py --workdir=runs/cifar

    :method=gse,forward=0.98         see configs/sparse.py
    :size=resnet56                   or resnet20, vgg16, vit
    :dataset=cifar100
    :multiplier=1.5                  300 epochs, with every anchor of schedules
    :tiny                            a ResNet of 8 layers for two CPU cores, minutes
    :smoke                           a few steps, for tests

Published for GSE at 98 % on CIFAR-100, 200 epochs: ResNet-56 54.3, VGG-16 40.8, ViT 40.7.
"""

import ml_collections

from configs import common, sparse

MODELS = {
    "resnet56": dict(name="resnet_cifar", depth=56, width=16),
    "resnet20": dict(name="resnet_cifar", depth=20, width=16),
    "vgg16": dict(name="vgg", width=16, hidden=512),
    "vit": dict(name="vit", width=512, heads=6, d_inner=256),
}
TINY = dict(name="resnet_cifar", depth=8, width=16)
SMOKE = dict(name="resnet_cifar", depth=8, width=4)
EPOCH = 50_000 / 128  # steps


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config; `arg` is a comma separated list, see the docstring of this file."""
    args = common.parse(
        arg,
        **sparse.ARGUMENTS,
        dataset="cifar10",
        size="resnet56",
        multiplier=1.0,
        tiny=False,
        smoke=False,
    )
    smoke, small, chosen = (
        args["smoke"],
        args["tiny"] or args["smoke"],
        sparse.choose(args),
    )
    common.require_size(args["size"], MODELS)
    whole = round(200 * EPOCH)
    steps = 6 if smoke else 600 if small else whole
    anchor = common.anchors(args["multiplier"], steps, of=whole)
    vit = args["size"] == "vit" and not small

    size = "tiny" if small else args["size"]
    config = common.begin(f"{args['dataset']}-{size}-{chosen.suffix}", anchor(whole))

    config.task = "classification"
    config.data = common.pictures(args["dataset"], side=32, threads=0)
    config.batch_size = 8 if smoke else 64 if small else 128
    config.label_smoothing = 0.0
    config.model = SMOKE if smoke else TINY if small else MODELS[args["size"]]

    config.optimizer = dict(
        name="sgd",
        momentum=0.9,
        weight_decay=1e-4,
        decay_where="*kernel",
        decay_penalized=False,  # Top-KAST's penalty, be it 0, takes its place
    )
    config.learning_rate = dict(
        schedule="steps",
        peak=0.01 if vit else 0.1,
        warmup=anchor(5 * EPOCH),
        boundaries=(anchor(80 * EPOCH), anchor(120 * EPOCH)),
        factor=0.1,
    )

    config.sparse = sparse.settings(
        chosen,
        refresh=2 if smoke else 50 if small else 1000,
        where="stage_2_*kernel" if smoke else "",
        distribution="erdos_renyi",
    )
    if "drop_fraction" in config.sparse:
        config.sparse.drop_fraction = 0.2
    if "refresh_stop" in config.sparse and chosen.method != "top_kast" and not smoke:
        config.sparse.refresh_stop = anchor(120 * EPOCH)
    if chosen.method == "magnitude" and not small:
        config.sparse.update(start=0, stop=anchor(120 * EPOCH))

    config.mesh = "data:1"
    config.sharding = ((r".*kernel", "fsdp"), (r".*", ()))
    common.rhythm(config, every=2 if smoke else 25 if small else 100,
                  evaluate=3 if smoke else 300 if small else round(10 * EPOCH),
                  save=2 if smoke else 300 if small else 2000,
                  batches=1 if smoke else None)  # fmt: skip
    return config
