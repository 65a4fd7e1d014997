"""Trains a task with a sparse method.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart

The same command resumes. Ctrl-C and SIGTERM save first; a second one kills. The workdir
gets metrics.jsonl, tensorboard/, checkpoints/ and summary.png. With --distributed=auto
(or address:port,processes,number) it runs once in each of several processes, which share
the workdir; the first one talks.

Exit codes: 0 finished; 2 bad input, found before training and said in one line; 3 the
training had to stop (NaN, a gradient that reached dead weights); 130 and 143 saved
after Ctrl-C and SIGTERM.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

import topkast_jax as tk
from experiments import (
    budget,
    command,
    compare,
    distributed,
    evaluate,
    explored,
    log,
    packing,
    paths,
    plot,
    speed,
)
from experiments import mesh as meshes
from experiments import state as states
from experiments.assembly import assemble
from experiments.checkpoint import Checkpoints
from experiments.config import Watched, as_json, require, require_all_read
from experiments.data.shard import WHOLE
from experiments.interrupt import Interrupts
from experiments.position import (
    Position,
    flops,
    later,
    layers,
    line,
    never,
    train_row,
    words,
)
from experiments.provenance import provenance, require_same_config
from experiments.refresh import Refresh, lands
from experiments.tasks.shared import shared
from experiments.tracing import Trace

AT_LEAST = {"seed": 0, "steps": 1, "log_every": 1, "eval_every": 1, "save_every": 1,
            "dense_steps": 0}  # fmt: skip
ON_NAN = ("stop", "skip", "restore")
MOST_SKIPS = 20  # in a row, with on_nan="skip"
MOST_RESTORES = 3  # without a new checkpoint, with on_nan="restore"
SHOWN = (
    "loss",
    "accuracy",
    "bits_per_byte",
    "perplexity",
    "sparsity",
    "churn",
    "rows_per_second",
    "tokens_per_second",
    "mfu",
)
ADVICE = (
    "Nothing was saved since; to go on without such batches, say "
    "--config.on_nan=skip or --config.on_nan=restore"
)
TOO_LATE = (
    "Its gradient was finite, so the update was made and cannot be skipped; say "
    "--config.on_nan=restore, or lower the learning rate"
)
STOPPED = 3


class Stopped(RuntimeError):
    """Training cannot go on; the checkpoints on disk are from before it went wrong."""


class Outcome(NamedTuple):
    """What `train` leaves: the last state, the steps done, the metrics of the last
    evaluation, and the number of the signal that ended the run early, if one did.
    """

    state: states.State
    step: int
    metrics: dict[str, float]
    signal: int | None


def train(config: ConfigDict, workdir: str | os.PathLike[str]) -> Outcome:
    """Trains what `config` says, or goes on from the workdir's newest checkpoint.

    Args:
      config: see configs/quickstart.py.
      workdir: where everything is written; made where it is missing. May lie in a
        bucket, as gs://bucket/run, but for packed layouts with a reservoir.
    Raises:
      BadInput: the config or the workdir cannot be trained with.
      Stopped: the training went wrong, see `config.on_nan`.
    """
    workdir = paths.folder(workdir)
    with command.checking():
        cfg = Watched(config)
        require(cfg, AT_LEAST, {"on_nan": ON_NAN})
        if cfg.get("compilation_cache"):
            jax.config.update("jax_compilation_cache_dir", cfg.compilation_cache)
        run = assemble(cfg)
        trace = Trace(cfg.get("profile"), workdir / "profile")
        mesh, task, method = run.mesh, run.task, run.method
        if run.packed and method.reservoir and paths.is_remote(workdir):
            raise ValueError(
                f"workdir={workdir}: the reservoir of {method.name} lives in files of "
                "this machine; name a local workdir, or say layout=masked"
            )
        abstract = run.abstract()  # what does not fit together is said now
        shard = meshes.own_rows(mesh)
        own = {} if shard == WHOLE else {"shard": shard}
        data = iter(task.batches("train", seed=cfg.seed, loop=True, **own))
        data_start, batch = data.get_state(), next(data)
        rows = shard.count * len(jax.tree.leaves(batch)[0])
        batch = meshes.place_batch(batch, mesh, shard)
        evaluation = evaluate.evaluator(task, mesh, cfg.eval_batches)
        checkpoints = Checkpoints(workdir, cfg.keep, warn=log.warn)

        def prepare(meta: Mapping[str, Any]) -> states.State:
            for change in require_same_config(workdir, meta["config"], as_json(config)):
                print(f"since the checkpoint: {change}")
            return run.saved(meta)

        print(f"{cfg.name}: {cfg.steps} steps on mesh {meshes.describe(mesh)}")
        require_all_read(cfg)
        recall = functools.partial(packing.recall, workdir, run.in_files)
        if run.packed:  # before a reservoir is read
            needed, kept = packing.needs(abstract, method.reservoir), method.reservoir
            there = budget.room(
                str(workdir / packing.THETA) if kept and run.in_files else None,
                str(workdir / packing.RESERVOIR) if kept else None,
            )
            print(f"what this run takes:\n{budget.table(needed, there)}")
            budget.require(needed, there)
        restored = checkpoints.restore(prepare, recall)
        if restored is not None:
            restored = run.adopt(restored, workdir)
    print(run.plan())

    if restored:
        state, store = restored.state, restored.store
        at = Position(**restored.meta["position"])
        data.set_state(restored.data)
        print(f"going on from step {at.step}, the newest checkpoint in {workdir}")
    else:
        (state, store), at = run.begin(workdir), Position()
        data.set_state(data_start)
    if at.step == cfg.steps:
        if distributed.is_first():
            plot.summary(workdir, cfg.name)
        return Outcome(state, at.step, log.last(workdir, "eval") or {}, None)
    workdir.mkdir(parents=True, exist_ok=True)
    told = workdir if distributed.is_first() else None
    origin = provenance(config)

    def save() -> None:
        meta = {"position": dataclasses.asdict(at), **origin}
        checkpoints.save(at.step, state, data.get_state(), meta, store)

    with (
        Interrupts() as interrupts,
        contextlib.closing(trace),
        checkpoints,
        log.Log(told, step=at.step if restored else None, steps=cfg.steps) as out,
    ):
        key = meshes.place_key(run.step_key, mesh)
        arguments = (batch, key, np.int32(0))
        began = time.perf_counter()
        compiled_for = _shapes(state)
        step = run.compile(state, *arguments)
        refresh = None
        if store is not None:
            refresh = Refresh(task, run.tx, method, run.delay, store, state, at.step)
        out.say(f"compiled the step in {time.perf_counter() - began:.1f} s")
        compared = distributed.of_first(bool(log.last(workdir, "dense")))
        if method and cfg.dense_steps and not compared:
            beside = compare.with_dense(
                task, run.dense_tx, mesh, cfg.sharding, step, state, *arguments,
                rounds=cfg.dense_steps,
            )  # fmt: skip
            out.write("dense", at.step, beside | {"simulated": float(not run.packed)})
        if cfg.on_nan == "restore":
            save()  # so that there is something to go back to
        # On CPU, several devices on few cores deadlock when steps queue up (jax 0.10).
        lockstep = mesh.size > 1 and jax.default_backend() == "cpu"

        intervals = (cfg.log_every, cfg.eval_every, cfg.save_every)
        refreshed = method.due if method and method.due else never
        metrics = log.last(workdir, "eval") or {}
        passed_over: set[int] = set()  # batches, after a restore
        churn: dict[str, float] = {}  # of the last refresh
        skips, restores, seconds, timed, paid = 0, 0, 0.0, 0, 0.0
        owed = False  # a checkpoint

        def landing() -> int | None:
            """Step until which nothing is saved: masks are chosen and not in force."""
            if refresh is not None:
                return refresh.lands
            after = lands(method, run.delay, at.step - at.skipped)
            return after and after + at.skipped

        while at.step < cfg.steps and (interrupts.signal is None or landing()):
            # To the next step after which there is something to do.
            pause = min(at.step - at.step % every + every for every in intervals)
            if owed or interrupts.signal is not None:
                pause = max(at.step + 1, min(pause, landing() or pause))
            pause = trace.pause(at.step, pause)
            trace.at(at.step)
            pending: list[tuple[int, states.Measures]] = []  # (batch, what it gave)
            began = time.perf_counter()
            while at.step < min(pause, cfg.steps):
                batch = next(data)
                at.batches += 1
                if at.batches in passed_over:
                    continue
                placed = meshes.place_batch(batch, mesh, shard)
                inputs = (placed, key, np.int32(at.step))
                found = refresh.before(state, at.step, *inputs) if refresh else None
                state, measures = step(state, *inputs)
                at.step += 1
                if refresh and (changed := refresh.after(state, at.step, found)):
                    state, measures["churn"] = changed
                    if _shapes(state) != compiled_for:  # B := A
                        compiled_for = _shapes(state)
                        step = run.compile(state, *inputs)
                pending.append((at.batches, measures))
                if lockstep:
                    jax.block_until_ready(measures)
                if interrupts.signal is not None and not landing():
                    break
            batches, measured = zip(*jax.device_get(pending), strict=True)  # waits
            seconds += time.perf_counter() - began
            timed += len(measured)
            log_now, eval_now, save_now = (
                at.step % every == 0 or at.step == cfg.steps for every in intervals
            )

            # A step that was not finite changed nothing, so looking late loses nothing.
            bad = [i for i, each in enumerate(measured) if each["bad"].any()]
            skips = skips + len(bad) if len(bad) == len(measured) else 0
            if bad:
                said = states.blame(measured[bad[0]]["bad"], state.params)
                number = at.step - len(measured) + bad[0]
                problem = f"step {number}, batch {batches[bad[0]]}: {said}"
                applied = states.was_applied(measured[bad[0]]["bad"])
                if cfg.on_nan == "stop":
                    raise Stopped(f"{problem}. {ADVICE}")
                if cfg.on_nan == "skip" and skips >= MOST_SKIPS:
                    raise Stopped(f"{problem}. The last {skips} steps were all like it")
                if cfg.on_nan == "skip" and applied:
                    raise Stopped(f"{problem}. {TOO_LATE}")
                if restores >= MOST_RESTORES:
                    raise Stopped(
                        f"{problem}. Going back {restores} times did not help"
                    )
                if cfg.on_nan == "restore":
                    # Of an update that broke the weights, all later steps are victims.
                    passed_over |= {batches[i] for i in (bad[:1] if applied else bad)}
                    restores += 1
                    if store is not None and store.journal is not None:
                        store.journal.wait()
                    back = checkpoints.restore(prepare, recall)
                    assert back is not None  # saved before the first step
                    back = run.adopt(back, workdir)
                    state, at = back.state, Position(**back.meta["position"])
                    data.set_state(back.data)
                    if back.store is not None:
                        store = back.store
                        refresh = Refresh(
                            task, run.tx, method, run.delay, store, state, at.step
                        )
                    out.rewind(at.step)
                    out.say(f"{problem}; back to step {at.step}, without the batch")
                    continue
                at.skipped += len(bad)
                out.say(f"{problem}; skipped, {at.skipped} steps so far")

            at.add(measured)
            masks = tk.masks(state.opt_state) if method else None
            always = bool(method and method.probe == "always")
            probed = [always or refreshed(at.step - n) for n in range(len(measured))]
            reads = bool(method and (method.probe or method.needs_gradient))
            apart = run.packed and reads
            draws = isinstance(method, tk.Method) and method.candidates is not None
            drawn = cfg.sparse.get("subset", 1.0) if draws else None
            spent, dense = flops(state.params, masks, task.uses, probed, apart, drawn)
            at.flops, at.dense_flops = at.flops + spent, at.dense_flops + dense
            paid += spent
            if log_now:
                row = train_row(at, masks, later(refreshed, run.delay), run.rate)
                row |= explored.measured(state.opt_state)
                fast = speed.measured(rows, timed, seconds, paid, mesh, task.tokens)
                out.write("train", at.step, row | fast)
                churn = {"churn": row["churn"]} if "churn" in row else churn
                text = line(churn | row | fast, SHOWN, cfg.steps - at.step)
                out.progress(at.step, text)
                at.window, seconds, timed, paid = [], 0.0, 0, 0.0
            if eval_now:
                weights = state.params
                if masks is not None:
                    _require_sound(state, at.step)
                    weights = tk.export(state.params, state.opt_state)
                    out.write("layers", at.step, layers(masks))
                weights = state.ema if run.decay else weights
                metrics = evaluation(weights, "validation", shared(state.carry))
                out.write("eval", at.step, metrics)
                out.say(f"step {at.step}: held-out {words(metrics)}")
            interrupts.agree()
            owed = owed or save_now
            if owed and not landing():
                save()
                owed, restores = False, 0
        save()
    if told:
        picture = plot.summary(workdir, cfg.name)
        print(f"{workdir}: {log.ROWS}, tensorboard/, checkpoints/, {picture.name}")
    left = interrupts.signal if at.step < cfg.steps else None
    return Outcome(state, at.step, metrics, left)


def _shapes(state: states.State) -> list[tuple[int, ...]]:
    return [x.shape for x in jax.tree.leaves(state)]


def _require_sound(state: states.State, step: int) -> None:
    """Stops on a gradient that reached dead weights, and on weights off the mask."""
    try:
        tk.check(state.params, state.opt_state)
    except ValueError as error:
        raise Stopped(f"step {step}: {error}") from error


def main(argv: list[str]) -> int:
    """Trains, and turns what happened into an exit code."""
    del argv
    with command.checking():
        distributed.join(flags.FLAGS.distributed)
    config = flags.FLAGS.config
    if config is None:
        raise command.BadInput("--config is missing, as in configs/quickstart.py")
    try:
        name = config.name
    except OSError as error:  # the flag keeps a missing file to itself until asked
        raise command.BadInput(f"--config: {error.__cause__ or error}") from error
    workdir = flags.FLAGS.workdir or f"runs/{name}"
    try:
        outcome = train(config, workdir)
    except Stopped as error:
        log.warn(f"stopped: {error}")
        return STOPPED
    if outcome.signal is not None:
        print(f"saved at step {outcome.step}; the same command goes on from there")
        return 128 + outcome.signal
    print(f"finished: held-out {words(outcome.metrics)}")
    return 0


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "File, or file:arguments.")
    flags.DEFINE_string("workdir", None, "Where to write; default runs/<config.name>.")
    flags.DEFINE_string("distributed", "", "'auto', or address:port,processes,number.")
    command.run(main)
