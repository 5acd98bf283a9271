"""A whole run against a reward service that breaks in the middle: it stops with the cause, and goes on exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from raylign.types import RewardFailure, RewardSample, RewardScore
from rewards import JpegConfig
from rewards.base import RewardAsk
from tests.http_servers import served
from tests.reward_cases.local_http import LocalBackend, app_of
from tests.service import command_line as cli

NUM_STEPS = 4
SAMPLES_PER_STEP = 8
NUM_EVALUATED = 4
"""Pictures of the evaluation before step 1: 2 held-out prompts, 2 each."""


class Sabotaged(LocalBackend):
    """Scores honestly so many samples; then the next `num_bad` fail."""

    def __init__(self) -> None:
        super().__init__([JpegConfig()])
        self.honest_samples = 10**9
        self.num_bad = 0
        self.num_seen = 0

    async def score(
        self, samples: Sequence[RewardSample], asks: Sequence[RewardAsk], deadline_s: float | None = None
    ) -> dict[str, list[RewardScore]]:
        scores = await super().score(samples, asks, deadline_s)
        self.num_seen += len(samples)
        if self.num_seen <= self.honest_samples:
            return scores
        now = min(self.num_bad, len(samples))
        self.num_bad -= now
        bad = RewardScore("jpeg", None, RewardFailure("model_error", "sabotage"))
        return {"jpeg": [bad] * now + scores["jpeg"][now:]}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli.write_config(tmp_path_factory.mktemp("config"), NUM_STEPS)


@pytest.fixture(scope="module")
def reference(config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of a run whose reward is computed in its own process."""
    folder = tmp_path_factory.mktemp("reference")
    code, output = cli.run(["train", str(config), "--run-dir", "run", "--placement", "in_process"], folder)
    assert code == 0, output
    return cli.summary(folder / "run")["weights_sha256"]


def _train(config: Path, url: str, *more: str) -> list[str]:
    rewards = f'[{{type = "remote", name = "jpeg", url = "{url}", reward = "jpeg"}}]'
    return ["train", str(config), "--run-dir", "run", "--placement", "in_process", "--rewards", rewards, *more]


def test_a_service_that_fails_stops_the_run_with_the_cause_and_resuming_is_exact(
    config: Path, reference: str, tmp_path: Path
) -> None:
    backend = Sabotaged()
    backend.honest_samples, backend.num_bad = NUM_EVALUATED + 2 * SAMPLES_PER_STEP, SAMPLES_PER_STEP
    with served(app_of(backend)) as url:
        code, output = cli.run(_train(config, url), tmp_path)
        assert code == 1
        assert "sabotage" in output
        assert "Traceback" not in output
        assert cli.num_logged(tmp_path / "run") == 2, "no step is made of samples without rewards"
        backend.num_bad = 0
        code, output = cli.run(["resume", "run"], tmp_path)
        assert code == 0, output
    assert cli.summary(tmp_path / "run")["weights_sha256"] == reference


def test_a_few_failures_are_left_out_and_counted(config: Path, reference: str, tmp_path: Path) -> None:
    backend = Sabotaged()
    backend.honest_samples, backend.num_bad = NUM_EVALUATED + SAMPLES_PER_STEP, 1
    with served(app_of(backend)) as url:
        code, output = cli.run(_train(config, url), tmp_path)
    assert code == 0, output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["failed/reward_failed"] for row in rows[1:]] == [0, 1, 0, 0]
    assert all(math.isfinite(row["reward/mean"]) for row in rows[1:])
    assert cli.summary(tmp_path / "run")["weights_sha256"] != reference, "a failed sample earns nothing, not a number"
