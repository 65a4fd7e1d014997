"""Top-KAST on a small byte-level Transformer-XL, Tiny Shakespeare.

Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", 2020, arXiv:2106.03517,
section 4.2, where the model is a large Transformer-XL on enwik8.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

Other methods and sparsities, from the same file:

    --config=configs/quickstart.py:method=rigl      or dense, or any of tk.METHODS
    --config=configs/quickstart.py:forward=0.95,backward=0.9
    --config=configs/quickstart.py:layout=block,structure=fan_in:1x64
    --config=configs/quickstart.py:smoke            8 steps of a tiny model, for tests

Expected after 1500 steps, about three minutes on two CPU cores: 2.6 bits per byte on
held-out text with a tenth of the weights of every kernel (dense: 2.3). Masks over dense
arrays save no time: see the panel "cost" of summary.png.
"""

import ml_collections
from ml_collections.config_dict import placeholder

from configs import common, sparse


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config; `arg` is a comma separated list, see the docstring of this file."""
    args = common.parse(
        arg,
        **sparse.ARGUMENTS,
        smoke=False,
    )
    smoke, chosen = args["smoke"], sparse.choose(args)

    config = ml_collections.ConfigDict()
    # Names the default workdir, runs/<config.name>.
    config.name = f"quickstart-{chosen.suffix}"
    config.seed = 0
    # Parameters that were trained before: a .safetensors file, or an Orbax checkpoint.
    config.init_from = placeholder(str)
    config.init_map = ()  # (regex of a parameter, name there): experiments/pretrained.py
    config.steps = 8 if smoke else 1500

    config.task = "language_model"
    config.data_dir = placeholder(str)  # of TFDS; None: its default
    config.batch_size = 8 if smoke else 16  # rows, over all devices
    config.accumulate = 1  # parts of a batch, one after the other, for one update
    config.ema = 0.0  # decay of the average of weights to evaluate with; 0: none
    config.model = dict(
        layers=1 if smoke else 4,
        d_model=32 if smoke else 128,
        heads=2,
        d_head=16 if smoke else 64,
        d_inner=64 if smoke else 512,
        segment=16 if smoke else 64,  # bytes a row sees per step
        memory=16 if smoke else 64,  # bytes of the past it attends to besides
        dropout=0.0,
        norm="post",  # as in the paper of Transformer-XL, or "pre"
    )

    config.optimizer = dict(
        name="adamw",
        clip=1.0,  # global norm; 0: none
        b2=0.99,
        weight_decay=0.01,
    )
    config.learning_rate = dict(peak=3e-3, warmup=2 if smoke else 100, end=3e-4)

    config.sparse = sparse.settings(
        chosen,
        refresh=3 if smoke else 100,
        # Fewer for the smoke test: every one takes its time to compile.
        where="*/feed_forward/*/kernel" if smoke else "",
        axes=common.TRANSFORMER_AXES,
    )

    config.mesh = "data:1"  # devices: data:4,fsdp:2 needs 8
    # (regex of a parameter's whole path, spec), first match wins: experiments/mesh.py.
    config.sharding = (
        (r".*/(kernel|embedding)", "fsdp"),
        (r".*", ()),
    )

    config.compilation_cache = placeholder(str)  # folder of compiled programs
    config.profile = placeholder(str)  # steps, as in 20:25, to workdir/profile
    config.log_every = 2 if smoke else 25
    # Not a multiple of refresh: entries that just came into A are untrained, so for
    # some steps after a refresh the held-out loss is that of a network in repair.
    config.eval_every = 4 if smoke else 375
    config.eval_batches = 2 if smoke else placeholder(int)  # None: the whole split
    config.save_every = 4 if smoke else 250
    config.keep = 2  # checkpoints
    config.on_nan = "stop"  # at NaN or Inf: "stop", "skip" the update, or "restore"
    config.dense_steps = 0 if smoke else 10  # timed at the start, to compare; 0: none
    return config
