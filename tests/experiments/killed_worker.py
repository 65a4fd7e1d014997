"""Trains the smallest form of a config, and gets kill -9 before its last step.

    python killed_worker.py NAME DATA_DIR CACHE WORKDIR [WORKERS]

Not a test module: test_configs.py starts it.
"""

import importlib
import signal
import sys

import pytest
import stored
from absl import flags
from runs import hook_training_data, kill_at

from experiments.train import train

if __name__ == "__main__":
    name, data_dir, cache, workdir, *workers = sys.argv[1:]
    flags.FLAGS.mark_as_parsed()  # Grain asks them about its workers
    patch = pytest.MonkeyPatch()
    stored.in_place_of_texts(patch)
    config = importlib.import_module(f"configs.{name}").get_config("smoke")
    if config.task == "classification":
        config.data.data_dir = data_dir
        config.data.workers = int(workers[0]) if workers else 0
    config.compilation_cache = cache
    hook_training_data(patch, kill_at(config.steps, signal.SIGKILL))
    train(config, workdir)
