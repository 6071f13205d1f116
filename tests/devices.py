"""Start a program of JAX on eight devices, which one process makes out of the CPU, or several."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

N_DEVICES = 8
SECONDS = 150  # before processes that wait for each other are ended


def seen_by(program: str, *cases: str, processes: int = 1) -> Any:
    """Run cases of a program of this folder, or all; return the JSON of the first process."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={N_DEVICES // processes}",
    }
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        path = Path(__file__).parent / program
        command = [sys.executable, str(path), str(report), _free_port(), str(processes)]
        started = [
            subprocess.Popen(
                [*command, str(k), *cases],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for k in range(processes)
        ]
        try:
            ends = [(process.communicate(timeout=SECONDS)[1], process) for process in started]
        finally:
            for process in started:
                process.kill()
        for stderr, process in ends:
            assert process.returncode == 0, stderr.decode()
        return json.loads(report.read_text(encoding="utf-8"))


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
