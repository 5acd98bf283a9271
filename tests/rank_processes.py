"""Learner ranks as real processes over gloo: started with a function of this repository's tests, waited for, ended."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_CODE = """
import json, sys
import torch
torch.set_num_threads(1)
from importlib import import_module
from learner.parallel import RankGroup

rank, num_ranks, address, module, function, *arguments = sys.argv[1:]
groups = []
def connect():
    groups.append(RankGroup.connect(int(rank), int(num_ranks), address, timeout_s=60))
    return groups[0]
answer = getattr(import_module(module), function)(connect, *arguments)
groups[0].barrier()
groups[0].close()
print(json.dumps(answer))
"""


def start_ranks(num_ranks: int, module: str, function: str, *arguments: str) -> list[subprocess.Popen[str]]:
    """`function(connect, *arguments)` in as many processes; each prints its answer as the last line.

    Models are made before `connect()`: transformers lets rank 0 alone write files once ranks are connected.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", _CODE, str(rank), str(num_ranks), address, module, function, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_ranks)
    ]


def answers_of(processes: list[subprocess.Popen[str]], timeout_s: float = 120.0) -> list[Any]:
    """What each rank's function returned, as JSON tells it; fails with a rank's own words if it failed."""
    return [json.loads(out.splitlines()[-1]) for out in outputs_of(processes, timeout_s)]


def outputs_of(processes: list[subprocess.Popen[str]], timeout_s: float = 120.0) -> list[str]:
    """What each rank printed, when all have ended."""
    try:
        told = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
    failed = [err[-3000:] for process, (_, err) in zip(processes, told, strict=True) if process.returncode != 0]
    assert not failed, "\n----\n".join(failed)
    return [out for out, _ in told]
