"""The service does what its OpenAPI document says, whatever is sent: generated requests against the application."""

import copy
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks
from schemathesis.config import GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig

from rewards import JpegConfig
from tests.reward_cases.local_http import LengthConfig, LocalBackend, app_of, inline, texts

CONFIGS = (JpegConfig(required=False), LengthConfig(name="length"))
PROMISES = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
# Requests that fit the document. Those that do not are made below: the library's own generator of them gives up on
# arrays whose negation holds nothing.
POSITIVE = SchemathesisConfig(
    projects=ProjectsConfig(default=ProjectConfig(generation=GenerationConfig(modes=[GenerationMode.POSITIVE])))
)
schema = schemathesis.openapi.from_asgi("/openapi.json", app_of(LocalBackend(CONFIGS)), config=POSITIVE)
locked = schemathesis.openapi.from_asgi("/openapi.json", app_of(LocalBackend(CONFIGS), token="s3cret"), config=POSITIVE)
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


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    if isinstance(value, dict):
        return [place for key, inner in value.items() for place in [(value, key), *_places(inner)]]
    if isinstance(value, list):
        return [place for key, inner in enumerate(value) for place in [(value, key), *_places(inner)]]
    return []


@pytest.mark.parametrize("path", ["/v1/score", "/v1/score_group"])
@settings(COMMON, max_examples=150)
@given(data=st.data())
def test_a_request_with_something_wrong_gets_a_documented_answer(path: str, data: st.DataObject) -> None:
    full: dict[str, Any] = {
        "rewards": [{"name": "length", "params": {"scale": 2.0}}],
        "deadline_ms": 5000,
        "return_details": True,
    }
    body: Any = copy.deepcopy({**full, **(_group() if path.endswith("group") else {"samples": [inline()]})})
    for _ in range(data.draw(st.integers(1, 3), label="changes")):
        places = _places(body)
        container, key = places[data.draw(st.integers(0, len(places) - 1), label="place")]
        change = data.draw(st.sampled_from(["replace", "remove", "add"]), label="change")
        if change == "replace":
            container[key] = data.draw(ANY_JSON, label="value")
        elif change == "remove":
            del container[key]
        elif isinstance(container, dict):
            container[data.draw(st.text(max_size=8), label="key")] = data.draw(ANY_JSON, label="value")
        if not _places(body):
            break
    schema[path]["POST"].Case(body=body, media_type="application/json").call_and_validate(checks=PROMISES)


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
