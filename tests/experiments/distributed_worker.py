"""Trains the tiny task, alone or as one of several processes.

    python distributed_worker.py WORKDIR CHANGES BATCH ADDRESS PROCESSES NUMBER

CHANGES are of the config, as JSON. At batch BATCH, if not 0, the last process gets
SIGTERM. Not a test module: test_distributed.py starts it.
"""

import json
import signal
import sys

import pytest
from conftest import tiny_config, tiny_task
from runs import hook_training_data, kill_at

from experiments import distributed, tasks
from experiments.train import train

if __name__ == "__main__":
    workdir, changes, batch, address, processes, number = sys.argv[1:]
    if int(processes) > 1:
        distributed.join(f"{address},{processes},{number}")
    tasks.TASKS["tiny"] = tiny_task
    if int(batch) and int(number) == int(processes) - 1:
        hook = kill_at(int(batch), signal.SIGTERM)
        hook_training_data(pytest.MonkeyPatch(), hook)
    config = tiny_config()
    for name, value in json.loads(changes).items():
        target, *rest = config, *name.split("__")
        for folder in rest[:-1]:
            target = target[folder]
        target[rest[-1]] = value
    outcome = train(config, workdir)
    # Not print: only the first process has an output.
    sys.stderr.write(json.dumps([outcome.step, outcome.signal]) + "\n")
