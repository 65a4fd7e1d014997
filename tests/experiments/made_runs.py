"""Folders of runs as `experiments.train` leaves them, written without training."""

import json
import pathlib
from typing import Any

STEPS = 40
SHAPES = {"in/kernel": "float32[8,16]", "in/bias": "float32[16]",
          "out/kernel": "float32[16,4]"}  # fmt: skip
SIZES = {"in/kernel": 128, "out/kernel": 64}
DENSE_FLOPS = 3e9


def config(method: str, seed: int, **sparse: Any) -> dict[str, Any]:
    """JSON data; a sparse method is in the masked layout unless it says otherwise."""
    section = {"method": method}
    if method != "dense":
        section |= {"layout": "masked", "sparsity": 0.75, **sparse}
    return {
        "name": f"{method}-{seed}",
        "seed": seed,
        "steps": STEPS,
        "task": "made",
        "model": {"width": 16},
        "sparse": section,
    }


def write(
    folder: pathlib.Path,
    given: dict[str, Any],
    value: float | None,
    *,
    metric: str = "accuracy",
    labels: dict[str, Any] | None = None,
    reached: int = STEPS,
    beside: bool = True,
    reservoir: bool = False,
) -> pathlib.Path:
    """One run; its last held-out value is `value`, and it has got to step `reached`.

    A quarter of every kernel is used, a step takes half a second, and the dense step
    timed beside it (`beside`) four fifths of it. `reservoir` adds its use to the log.
    """
    sparse = given["sparse"]["method"] != "dense"
    share = 0.25 if sparse else 1.0
    rows: list[dict[str, Any]] = []
    if sparse and beside:
        rows.append({"step": 0, "kind": "dense", "step_time": 0.5,
                     "dense_step_time": 0.4, "time_ratio": 1.25,
                     "state_bytes_ratio": 1.1})  # fmt: skip
    for step in range(4, reached + 1, 4):
        row = {"step": step, "kind": "train", "loss": 3.0 / step,
               "flops": share * DENSE_FLOPS * step / STEPS, "flops_fraction": share,
               "step_time": 0.5}  # fmt: skip
        if sparse:
            row |= {"sparsity": 0.75, "backward_sparsity": 0.5}
            row |= {"churn": 0.8 / step} if step % 8 == 0 else {}
            row |= {"reservoir_used": step / 100} if reservoir else {}
        rows.append(row)
    for step in range(10, reached + 1, 10):
        if sparse:
            each = {"in/kernel": 0.75, "out/kernel": 0.75}
            rows.append({"step": step, "kind": "layers", "forward": each,
                         "backward": dict.fromkeys(each, 0.5)})  # fmt: skip
        now = value if step == STEPS or value is None else value / 2
        rows.append({"step": step, "kind": "eval", metric: now, "loss": 0.5})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    if labels is not None:
        told = {"config": "x.py", "overrides": {}, "labels": labels}
        (folder / "job.json").write_text(json.dumps(told))
    saved = folder / "checkpoints" / str(reached)
    (saved / "meta").mkdir(parents=True)
    meta = {"config": given, "step": reached, "arrays": {"params": SHAPES},
            "commit": "0123456789abcdef-dirty", "versions": {"jax": "0.10.2"},
            "devices": "1 x cpu", "cores": 2}  # fmt: skip
    (saved / "meta" / "metadata").write_text(json.dumps(meta))
    note = {"commit_timestamp_nsecs": 1_700_000_000_000_000_000}
    (saved / "_CHECKPOINT_METADATA").write_text(json.dumps(note))
    return folder


def sweep(root: pathlib.Path, **options: Any) -> pathlib.Path:
    """Dense, RigL and SET, two seeds each: .900, .800 ± .014, .790 ± .014."""
    for method, middle in (("dense", 0.9), ("rigl", 0.8), ("set", 0.79)):
        for seed, off in enumerate((-0.01, 0.01)):
            write(
                root / f"{method}-{seed}", config(method, seed), middle + off, **options
            )
    return root
