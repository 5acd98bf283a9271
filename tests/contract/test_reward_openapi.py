"""The service does what its OpenAPI document says, whatever is sent: generated requests against the application."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis import checks

from rewards import JpegConfig
from tests.reward_cases.local_http import LengthConfig, LocalBackend, app_of, inline, texts

CONFIGS = (JpegConfig(required=False), LengthConfig(name="length"))
PROMISES = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
schema = schemathesis.openapi.from_asgi("/openapi.json", app_of(LocalBackend(CONFIGS)))
locked = schemathesis.openapi.from_asgi("/openapi.json", app_of(LocalBackend(CONFIGS), token="s3cret"))
COMMON = settings(
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@schema.parametrize()  # type: ignore[misc]  # typed in part
@settings(COMMON, max_examples=30)
def test_generated_requests_get_documented_answers(case: schemathesis.Case) -> None:
    case.call_and_validate(checks=PROMISES)


@locked.include(path_regex="score|rewards").parametrize()  # type: ignore[misc]  # as above
@settings(COMMON, max_examples=3)
def test_nothing_is_scored_or_told_without_a_token(case: schemathesis.Case) -> None:
    response = case.call_and_validate(checks=PROMISES)
    assert response.status_code in (401, 405)


def _group(**more) -> dict:
    return {"prompt": "say", "candidates": [{"id": "a", "text": "x"}, {"id": "b", "text": "xy"}], **more}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/score", {"samples": [inline("a"), *texts("x", "", prompt="p")[1:], inline("c", b"bad")]}, 200),
        ("/v1/score", {"samples": texts("x"), "rewards": [{"name": "length"}], "return_details": False}, 200),
        ("/v1/score", {"samples": texts("x"), "rewards": [{"name": "nobody"}]}, 422),
        ("/v1/score", {"samples": texts("x") * 2}, 422),
        ("/v1/score", [], 422),
        ("/v1/score_group", _group(rewards=[{"name": "length", "weight": -1}]), 200),
        ("/v1/score_group", _group(aggregate={"method": "group_normalised"}), 200),
        ("/v1/score_group", _group(aggregate={"normalise": "affine"}), 422),
    ],
)
def test_answers_of_every_kind_fit_their_schema(path: str, body: Any, status: int) -> None:
    case = schema[path]["POST"].Case(body=body, media_type="application/json")
    response = case.call_and_validate(checks=PROMISES)
    assert response.status_code == status, response.text
