"""Runs one program as several processes that form one job over loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import topkast_jax

HERE = Path(__file__).parent
PATIENCE = 240  # seconds; a collective that somebody misses waits for ever


def run_job(
    program: list[str], processes: int, devices: int, folder: Path | None = None
) -> list[str]:
    """What the processes print; each has some fake CPU devices.

    Args:
      program: arguments of Python; address, number of processes and own number follow.
      processes: how many.
      devices: of each.
      folder: to run in.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    package = Path(topkast_jax.__file__).parent.parent
    paths = [str(package), str(HERE), os.environ.get("PYTHONPATH")]
    flags = os.environ.get("XLA_FLAGS", "")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
    }
    children = [
        subprocess.Popen(
            [sys.executable, *program, address, str(processes), str(number)],
            env=environment,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(processes)
    ]
    try:
        said = [child.communicate(timeout=PATIENCE)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, text in zip(children, said, strict=True):
        assert child.returncode == 0, text[-4000:]
    return said
