"""Runs checks in a process of their own, which sees eight devices instead of one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import topkast_jax

HERE = Path(__file__).parent


def run_suite(name: str, full: bool = False) -> dict[str, Any]:
    """`{check: result}` of one suite of worker.py, which prints a JSON line for each."""
    package = str(Path(topkast_jax.__file__).parent.parent)
    shared = str(HERE.parent)  # tests/compilation.py
    paths = [package, shared, os.environ.get("PYTHONPATH")]
    search = os.pathsep.join(filter(None, paths))
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": search,
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=8",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "worker.py"), name, *["full"] * full],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line["check"]: line["result"] for line in lines}
