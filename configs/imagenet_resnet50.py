"""ResNet-50 on ImageNet, the recipe of RigL, which Top-KAST shares.

Evci et al., "Rigging the Lottery", 2020, arXiv:1911.11134, section 4.1 and appendix:
batch 4096, 32,000 steps, SGD with Nesterov momentum .9, rate 1.6 after 5 epochs of
warm-up, divided by ten after epochs 30, 70 and 90, L2 1e-4, label smoothing .1; masks
every 100 steps until step 25,000. Jayakumar et al., "Top-KAST", 2020, arXiv:2106.03517,
section 4.1 (its text does not give all of the recipe). GSE here draws two candidates for
every weight and replaces a fifth of them at first, as Heddes et al., 2024,
arXiv:2401.06898, do on ImageNet.

    python -m experiments.prepare --dataset=imagenet2012 --manual_dir=DOWNLOADS
    python -m experiments.train --config=configs/imagenet_resnet50.py \
        --workdir=gs://BUCKET/resnet50 --config.mesh=data:32

    :method=rigl,forward=0.95        see configs/sparse.py
    :distribution=erk                sparse are then all layers, the first one too
    :multiplier=5                    five times the steps, with every anchor of schedules
    :size=101                        layers: 50, 101 or 152
    :tiny                            a small network on 64x64 images, two CPU cores
    :smoke                           a few steps, for tests

Published top-1 of RigL's table (uniform, 1x): dense 76.8, static 70.6 at 80 % and 65.8 at
90 %, SET 72.9 and 69.6, RigL 74.6 and 72.0, pruning 75.6 and 73.9. Not run here: it takes
a pod.
"""

import ml_collections

from configs import common, sparse

STAGES = {"50": (3, 4, 6, 3), "101": (3, 4, 23, 3), "152": (3, 8, 36, 3)}
EPOCH = 1_281_167 / 4096  # steps


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config; `arg` is a comma separated list, see the docstring of this file."""
    args = common.parse(
        arg,
        **sparse.ARGUMENTS,
        distribution="uniform",
        size="50",
        multiplier=1.0,
        tiny=False,
        smoke=False,
    )
    smoke, small, chosen = (
        args["smoke"],
        args["tiny"] or args["smoke"],
        sparse.choose(args),
    )
    common.require_size(args["size"], STAGES)
    steps = 6 if smoke else 600 if small else 32_000
    anchor = common.anchors(args["multiplier"], steps, of=32_000)

    config = common.begin(f"resnet{args['size']}-{chosen.suffix}", anchor(32_000))

    config.task = "classification"
    side = 32 if smoke else 64 if small else 224
    config.data = common.pictures("imagenet2012", side=side, threads=16)
    config.batch_size = 4 if smoke else 16 if small else 4096
    config.label_smoothing = 0.1
    config.model = dict(
        name="resnet",
        stages=(1, 1) if smoke else (1,) * 4 if small else STAGES[args["size"]],
        width=4 if smoke else 8 if small else 64,
        dtype="float32" if small else "bfloat16",  # of activations
    )

    config.optimizer = dict(
        name="sgd",
        momentum=0.9,
        nesterov=True,
        weight_decay=1e-4,
        decay_where="*/kernel",
        decay_penalized=False,  # Top-KAST's penalty, be it 0, takes its place
    )
    config.learning_rate = dict(
        schedule="steps",
        peak=0.1 if small else 1.6,
        warmup=anchor(5 * EPOCH),
        boundaries=tuple(anchor(epoch * EPOCH) for epoch in (30, 70, 90)),
        factor=0.1,
    )

    everything = args["distribution"] != "uniform"
    # Uniform: the first convolution is dense, as in RigL's and Top-KAST's tables. Few for
    # the smoke test: every kernel takes its time to compile.
    some = "stage_1_*/spatial/kernel" if smoke else "stage_*/kernel,head/kernel"
    config.sparse = sparse.settings(
        chosen,
        refresh=2 if smoke else 20 if small else 100,
        where="" if everything else some,
        distribution=args["distribution"] if everything else "",
    )
    if "refresh_stop" in config.sparse and chosen.method != "top_kast" and not small:
        config.sparse.refresh_stop = anchor(25_000)
    if chosen.method == "gse":
        config.sparse.update(subset=2.0, drop_fraction=0.2)

    config.mesh = "data:1"
    config.sharding = ((r".*/kernel", "fsdp"), (r".*", ()))
    common.rhythm(config, every=2 if smoke else 50, evaluate=2 if smoke else 1000,
                  save=2 if smoke else 1000, batches=1 if small else None)  # fmt: skip
    return config
