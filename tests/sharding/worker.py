"""Checks on eight fake devices: `python worker.py SUITE [full]` prints a JSON line for each.

Not a test module: test_*.py beside it start it and judge what it prints. Every step is
waited for, since eight fake devices on few cores can deadlock otherwise.
"""

import importlib
import sys

import jax

if __name__ == "__main__":
    assert jax.device_count() == 8
    importlib.import_module(f"suite_{sys.argv[1]}").run("full" in sys.argv[2:])
