"""A run whose rewards go over HTTP: the same numbers, and an end with a cause when the service is no good."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from tests.service import command_line as cli

QUICKSTART = [
    *("--num_steps", "1", "--groups_per_step", "2", "--group_size", "4"),
    *("--eval.num_prompts", "2", "--eval.samples_per_prompt", "1"),
]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rewards(run_dir: Path) -> list[dict[str, float]]:
    """What each step's rewards were, and each evaluation's."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: row[name] for name in row if name.startswith(("reward/", "eval/", "failed/")) and "_s" not in name}
        for row in rows
    ]


def test_rewards_over_http_are_those_of_this_process(tmp_path: Path) -> None:
    http = ["--reward_service.transport", "http", "--reward_service.port", str(_free_port())]
    for name, options in [("here", ["--placement", "in_process"]), ("http", ["--placement", "separate", *http])]:
        code, output = cli.run(
            ["train", "quickstart_image", "--run-dir", name, *QUICKSTART, *options], tmp_path, timeout_s=200
        )
        assert code == 0, output
    here, over_http = _rewards(tmp_path / "here"), _rewards(tmp_path / "http")
    assert here == over_http
    assert any("reward/ocr" in row for row in here)
    assert cli.summary(tmp_path / "here")["weights_sha256"] == cli.summary(tmp_path / "http")["weights_sha256"]
