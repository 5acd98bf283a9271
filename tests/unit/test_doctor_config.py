"""`raylign doctor CONFIG`: what a configuration lacks is found without starting it, each with its remedy."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raylign.errors import ConfigError
from services.doctor import Check, Status
from services.doctor_config import check_judge, check_redis, diagnose_config, judge_at


def _by_name(checks: list[Check]) -> dict[str, Check]:
    found = {check.name: check for check in checks}
    assert len(found) == len(checks)
    assert all(check.remedy for check in checks if check.status is not Status.OK)
    return found


def test_the_quickstart_lacks_nothing() -> None:
    checks = _by_name(diagnose_config(["quickstart_image"], {}))
    assert {check.status for check in checks.values()} <= {Status.OK, Status.WARN}
    assert checks["model"].found == "asset:glyphs is a sd3 that can be loaded"
    assert checks["train prompts"].found.startswith("732 in ")
    assert checks["reward ocr"].status is Status.OK


def test_a_typo_is_the_only_finding() -> None:
    (check,) = diagnose_config(["quickstart_image"], {"learner.lrr": "1"})
    assert check.status is Status.FAIL
    assert "did you mean `lr`?" in check.found


def test_what_a_large_run_lacks_is_named_with_the_key(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    overrides = {
        "model.path": str(tmp_path),
        "prompts.train": str(prompts),
        "prompts.heldout": str(tmp_path / "no.txt"),
    }
    overrides["rewards.0.path"] = str(tmp_path / "pickscore")
    checks = _by_name(diagnose_config(["flux_flow_grpo"], overrides))
    failed = {name for name, check in checks.items() if check.status is Status.FAIL}
    assert failed >= {"model", "heldout prompts", "reward pickscore", "resources"}
    assert checks["train prompts"].found == f"1 in {prompts}"
    assert "--rewards.0.path FOLDER" in checks["reward pickscore"].remedy
    assert "--prompts.heldout" in checks["heldout prompts"].remedy
    assert "8 GPUs" in checks["resources"].found or "7.8 GPUs" in checks["resources"].found


def test_the_port_of_a_run_that_serves_its_rewards_must_be_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        overrides = {"reward_service.http": "true", "reward_service.port": port}
        assert _by_name(diagnose_config(["quickstart_image"], overrides))["reward service's port"].status is Status.FAIL
    assert _by_name(diagnose_config(["quickstart_image"], overrides))["reward service's port"].status is Status.OK


class _Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"object": "list", "data": [{"id": "judge-7b", "object": "model"}]}).encode()
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Tests are quiet."""


@pytest.fixture
def judge() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Models)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_judge_is_asked_which_model_it_runs(judge: str) -> None:
    assert check_judge(judge_at(f"{judge}/v1")).status is Status.OK
    assert check_judge(judge_at(f"{judge}/v2")).status is Status.FAIL, "an address without a list of models"
    named = check_judge(judge_at(f"{judge}/v1").model_copy(update={"model": "judge-70b"}))
    assert named.status is Status.FAIL
    assert "judge-70b" in named.found
    with pytest.raises(ConfigError, match="--judge"):
        judge_at("127.0.0.1:8000")


def test_a_redis_that_is_away_is_told_without_its_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    check = check_redis(f"redis://:secret@127.0.0.1:{port}/0")
    assert check.status is Status.FAIL
    assert f"127.0.0.1:{port}/0 does not answer" in check.found
    assert "secret" not in check.found + check.remedy
    assert check_redis("http://127.0.0.1").status is Status.FAIL
