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

from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from configs import common

DROP_GROW: dict[str, dict[str, Any]] = {
    "set": {},
    "rigl": {},
    "rigl_itop": {},
    # beta of the mean gradient; whether entries move between layers.
    "snfs": dict(momentum=0.9, redistribute=True),
    # lambda of |theta| + lambda |g|; whether A is larger until the next refresh.
    "mest": dict(weight=0.01, soft=False),
    # Share of the fan-in that must be salient, else a neuron goes.
    "srigl": dict(gamma_sal=0.3),
    # The first H; by how much its count may be off before H changes.
    "dsr": dict(threshold=1e-3, tolerance=0.1),
    # "grabo" and "graest" draw by statistics, "all" takes every entry; candidates for
    # each weight; or "global".
    "gse": dict(candidates="uniform", subset=1.0, scope="layer"),
}
"""What these methods take beside a drop fraction."""
OWN_DISTRIBUTION = {"granet": "erk", "gse": "erdos_renyi"}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The config; `arg` is a comma separated list, see the docstring of this file."""
    args = common.parse(
        arg,
        method="top_kast",
        forward=None,
        backward=None,
        structure="unstructured",
        layout="masked",
        smoke=False,
    )
    method, smoke = args["method"], args["smoke"]
    forward = 0.9 if args["forward"] is None else args["forward"]
    backward = (
        max(0.0, round(forward - 0.1, 6))
        if args["backward"] is None
        else args["backward"]
    )
    structured = args["structure"] != "unstructured"
    structure = args["structure"]
    if method == "srigl" and not structured:
        structure = "fan_in"  # what it is about
    masked = args["layout"] == "masked"
    if method == "dense" and (structured or not masked or args["forward"] is not None):
        raise ValueError(
            "config arguments forward=, structure= and layout= have no meaning for "
            "method=dense"
        )
    if method != "top_kast" and args["backward"] is not None:
        raise ValueError("config argument backward= is for method=top_kast only")

    config = ml_collections.ConfigDict()
    dense = method == "dense"
    # Names the default workdir, runs/<name>.
    config.name = f"quickstart-{method}" + ("" if dense else f"-{forward:g}")
    if not masked:
        config.name += "-" + args["layout"]
    if structured:
        config.name += "-" + args["structure"].replace(":", "-")
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

    refreshes = dict(
        refresh=3 if smoke else 100,  # steps between two choices of masks
        refresh_start=placeholder(int),  # the first; None: after `refresh` steps
        refresh_stop=placeholder(int),  # none from this step on; None: to the last step
    )
    ramp = dict(
        start=placeholder(int),  # of the fall in density; None: a tenth of the run
        stop=placeholder(int),  # None: three quarters of the run
        ramp="cubic",  # or "linear"
    )
    config.sparse = dict(method=method)
    if not dense:
        config.sparse.update(
            reset="init",  # moments of entries that enter or leave B: "init" or "keep"
            # Globs of sparse parameters, comma separated; "": all kernels. Fewer for the
            # smoke test: every one takes its time to compile.
            where="*/feed_forward/*/kernel" if smoke else "",
            # What the axes of a kernel mean, first match wins: inputs and outputs.
            axes=(
                ("*/attention/out/kernel", "i i o"),
                ("*/attention/*/kernel", "i o o"),
            ),
            layout=args["layout"],  # or "packed", "block": see README.md
            refresh_delay=0,  # steps from the choice of masks to their coming into force
            reservoir="memory",  # of packed layouts, or "files" in the workdir
            # Or "blocks:8x128", "fan_in", "fan_in:1x64", "n_of_m:32".
            structure=structure,
            # Selections apart, by which packed parameters are cut over a mesh.
            groups=1,
            groups_along="outputs",  # or "inputs", or ((glob, axis), ...)
            # Or "uniform", "erk", "erdos_renyi", {glob: sparsity}, "of_masks" (of init).
            distribution=OWN_DISTRIBUTION.get(method, "uniform"),
            begin=placeholder(int),  # dense before this step; None: the method at once
        )
    if method in ("static", "deep_r", *DROP_GROW):
        config.sparse.init = "random"  # the first A; or "magnitude", or masks.npz
    if method == "top_kast":
        config.sparse.update(
            forward_sparsity=forward,
            backward_sparsity=backward,
            penalty=1e-4,  # weight of the exploration penalty
            penalty_norm="l2",  # or "l1"
            penalty_mode="gradient",  # or "decoupled", after the optimizer
            stop=placeholder(int),  # last choice of masks, then B := A; None: never
            explore="top",  # B\A: the next largest, or "random"
            **refreshes,
        )
    elif method in DROP_GROW:
        config.sparse.update(
            sparsity=forward,
            drop_fraction=0.3,  # share of A replaced at a refresh
            drop_decay="cosine",  # to 0 at the last step, or "constant"
            **refreshes,
            **DROP_GROW[method],
        )
        if method == "srigl" and not masked:
            config.sparse.gamma_sal = 0.0  # packed arrays cannot lose neurons
    elif method == "deep_r":
        config.sparse.update(
            sparsity=forward,
            l1=1e-5,  # weight of the penalty
            temperature=1e-9,  # of the noise: sqrt(2 eta T) at each step
            scope="network",  # within which entries move, or "leaf"
            strict=False,  # whether a weight of exactly zero dies
            **refreshes | dict(refresh=1),
        )
    elif method in ("magnitude", "saliency", "random_pruning"):
        config.sparse.update(
            sparsity=forward,
            initial_sparsity=0.0,
            scope="layer",  # or "global"
            **ramp,
            **refreshes,
        )
    elif method == "granet":
        config.sparse.update(
            sparsity=forward,
            initial_sparsity=0.5,
            drop_fraction=0.5,  # share of A replaced at a refresh
            drop_decay="cosine",
            scope="global",  # or "layer"
            **ramp,
            **refreshes,
        )
    elif method == "one_shot":
        config.sparse.update(
            sparsity=forward,
            at=placeholder(int),  # None: half of the run
            score="magnitude",  # or "saliency", "random"
            scope="layer",
        )
    elif method == "snip":
        config.sparse.update(
            sparsity=forward,
            batches=1,  # that are looked at before the choice
            average="gradient",  # over batches, or "score"
            scope="global",
        )
    elif method == "straight_through":
        # Masks change at every step, as in the papers.
        config.sparse.update(sparsity=forward, soft=False, refresh=1)
    elif method == "acdc":
        config.sparse.update(
            sparsity=forward,
            warmup=placeholder(int),  # dense steps first; None: a tenth of the run
            compressed=placeholder(int),  # of a phase; None: a twentieth
            dense=placeholder(int),  # of a phase; None: a twentieth
            last=placeholder(int),  # compressed from here on; None: after four fifths
            scope="global",
        )
    elif not dense:
        config.sparse.update(sparsity=forward)

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
