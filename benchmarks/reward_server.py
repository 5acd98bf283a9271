"""Starts and stops the servers that the reward benchmarks measure, and builds the requests they send."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import psutil

HERE = Path(__file__).parent
HEIGHT, WIDTH = 32, 64
START_TIMEOUT_S = 120.0


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def words(count: int) -> list[str]:
    """Short texts to draw: four hexadecimal digits each, all different."""
    return [f"{place * 40503 % 65536:04X}" for place in range(count)]


def pictures(texts: Sequence[str]) -> list[np.ndarray]:
    """One small sign per text, with noise of its own: (32, 64, 3) uint8."""
    from PIL import Image, ImageDraw, ImageFont

    from raylign.assets import resolve

    font = ImageFont.truetype(str(next(resolve("asset:fonts").glob("*.ttf"))), 20)
    drawn: list[np.ndarray] = []
    for place, text in enumerate(texts):
        image = Image.new("RGB", (WIDTH, HEIGHT), (235, 235, 235))
        ImageDraw.Draw(image).text((4, 3), text, (20, 20, 90), font)
        noise = np.random.default_rng(place).normal(0, 6, (HEIGHT, WIDTH, 3))
        drawn.append(np.clip(np.asarray(image, np.float64) + noise, 0, 255).astype(np.uint8))
    return drawn


def request_body(texts: Sequence[str], files: Sequence[bytes], rewards: Sequence[str]) -> tuple[bytes, dict[str, str]]:
    """A multipart `POST /v1/score`, encoded once: the load generator is to cost little."""
    request = {
        "rewards": [{"name": name} for name in rewards],
        "samples": [
            {
                "id": f"s{place}",
                "prompt": f'a sign that says "{text}"',
                "image": {"encoding": "part", "mime": "image/png", "part": f"i{place}"},
            }
            for place, text in enumerate(texts)
        ],
        "return_details": False,
    }
    parts = [("request", ("request.json", json.dumps(request), "application/json"))]
    parts += [(f"i{place}", (f"i{place}", data, "image/png")) for place, data in enumerate(files)]
    built = httpx2.Request("POST", "http://x/v1/score", files=parts)  # type: ignore[arg-type]
    return built.read(), {"Content-Type": built.headers["Content-Type"]}


def service_toml(rewards: Sequence[str], port: int, service: Mapping[str, Any]) -> str:
    """The configuration of a `raylign serve-rewards`; `service` adds keys and tables to [service]."""
    import tomli_w

    tables = {
        "rewards": [{"type": name} for name in rewards],
        "service": {"http": True, "port": port, **service},
    }
    return tomli_w.dumps(tables)


@contextmanager
def raylign_service(rewards: Sequence[str], service: Mapping[str, Any]) -> Generator[tuple[str, int]]:
    """`raylign serve-rewards` as a process of its own: its URL and process id."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "rewards.toml"
        config.write_text(service_toml(rewards, port, service), encoding="utf-8")
        with _process([sys.executable, "-m", "services.cli", "serve-rewards", str(config)], port) as pid:
            yield f"http://127.0.0.1:{port}", pid


@contextmanager
def plain_server(rewards: Sequence[str]) -> Generator[tuple[str, int]]:
    """The comparison: FastAPI and uvicorn around the same scorers, in one process."""
    port = free_port()
    command = [sys.executable, str(HERE / "reward_service.py"), "--plain-server", str(port), "--rewards", *rewards]
    with _process(command, port) as pid:
        yield f"http://127.0.0.1:{port}", pid


@contextmanager
def _process(command: Sequence[str], port: int) -> Generator[int]:
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _ready(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"{' '.join(command)} did not start:\n{log.read()[-3000:]}")
                time.sleep(0.2)
            yield process.pid
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _ready(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/v1/readyz", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


def replicas(parent: int, name: str) -> list[psutil.Process]:
    """Ray Serve's replica processes below a process whose deployment is called `name`."""
    found: list[psutil.Process] = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            if f"ServeReplica:{name}" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found
