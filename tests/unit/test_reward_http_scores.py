"""What a request can ask for, and what comes back: choices, parameters, aggregation, groups, several pictures."""

import base64

import pytest

from raylign.types import RewardFailure, RewardScore
from rewards import JpegConfig
from tests.reward_cases.local_http import PNG, LengthConfig, LocalBackend, inline, post, refused, texts, with_app

LENGTH = (LengthConfig(name="length", weight=2.0), LengthConfig(name="other", weight=1.0, required=False))


def _score(samples: list[dict], backend: LocalBackend | None = None, path: str = "/v1/score", **more) -> dict:
    response = with_app(post(path, json={"samples": samples, **more}), backend or LocalBackend(LENGTH))
    assert response.status_code == 200, response.text
    return response.json()


def _rewards(answer: dict) -> list[float | None]:
    return [result["reward"] for result in answer["results"]]


def test_a_component_says_everything_about_one_score() -> None:
    (result,) = _score(texts("abc"), rewards=[{"name": "length"}])["results"]
    component = result["components"]["length"]
    assert component.pop("latency_ms") >= 0
    assert component == {
        "raw": 3.0,
        "value": 3.0,
        "weight": 2.0,
        "required": True,
        "status": "ok",
        "error": None,
        "version": "1",
        "model_fingerprint": "f1",
        "cache": "bypass",
        "details": {"letters": [1, None]},  # a tuple and a NaN, as JSON has them
    }
    assert (result["status"], result["reward"], result["flags"], result["error"]) == ("ok", 6.0, [], None)


def test_a_request_weighs_and_orders_its_rewards() -> None:
    choices = [{"name": "other", "weight": -1, "required": True}, {"name": "length"}]
    (result,) = _score(texts("abc"), rewards=choices)["results"]
    assert list(result["components"]) == ["other", "length"]
    assert result["reward"] == -3 + 2 * 3
    assert result["components"]["other"]["required"] is True


def test_parameters_reach_the_reward_and_are_checked() -> None:
    assert _rewards(_score(texts("abc"), rewards=[{"name": "length", "params": {"scale": 2}}])) == [12.0]
    for params, where in (({"scale": 0}, "scale"), ({"scael": 1}, "scael"), ({"scale": "x"}, "scale")):
        body = {"samples": texts("abc"), "rewards": [{"name": "length", "params": params}]}
        message = refused(with_app(post(json=body), LocalBackend(LENGTH)), 422)
        assert "params of reward 'length'" in message
        assert where in message


def test_a_version_is_the_one_that_is_served_or_refused() -> None:
    for version in ("1", "latest"):
        assert _rewards(_score(texts("abc"), rewards=[{"name": "length", "version": version}])) == [6.0]
    body = {"samples": texts("abc"), "rewards": [{"name": "length", "version": "2"}]}
    message = refused(with_app(post(json=body), LocalBackend(LENGTH)), 422)
    assert "not served in version '2'; ask for '1' or 'latest'" in message


def test_a_backend_that_cannot_be_described_is_a_503() -> None:
    class Gone(LocalBackend):
        async def describe(self):
            raise ConnectionError("secret detail")

    for response in (
        with_app(lambda client: client.get("/v1/rewards"), Gone(LENGTH)),
        with_app(post(json={"samples": texts("a"), "rewards": [{"name": "length", "version": "1"}]}), Gone(LENGTH)),
    ):
        assert "secret" not in refused(response, 503)
        assert response.headers["Retry-After"] == "1"
        assert response.json()["log_id"]


def test_what_is_served_is_described() -> None:
    listed = with_app(lambda client: client.get("/v1/rewards"), LocalBackend((*LENGTH, JpegConfig()))).json()["rewards"]
    length, _, jpeg = listed
    assert (length["name"], length["type"], length["version"], length["model_fingerprint"]) == (
        "length",
        "length",
        "1",
        "f1",
    )
    assert (length["modality"], length["range"], length["scores_groups"]) == ("text", [0.0, 10.0], True)
    assert (length["weight"], length["required"], length["uses_seed"], length["canaries"]) == (2.0, True, False, [])
    assert length["metadata_keys"] == {"language": "of the text"}
    assert length["params_schema"]["properties"]["scale"]["exclusiveMinimum"] == 0
    assert (jpeg["range"], jpeg["params_schema"], jpeg["scores_groups"]) == (None, None, False)


def test_affine_maps_declared_ranges_before_weighing() -> None:
    answer = _score(texts("abc"), aggregate={"normalise": "affine"})
    component = answer["results"][0]["components"]["length"]
    assert (component["raw"], component["value"]) == (3.0, 0.3)
    assert _rewards(answer) == [pytest.approx(2 * 0.3 + 0.3)]
    body = {"samples": texts("abc"), "aggregate": {"normalise": "affine"}}
    refusal = with_app(post(json=body), LocalBackend((*LENGTH, JpegConfig())))
    assert "jpeg has no finite range" in refused(refusal, 422)


def test_no_aggregate_leaves_the_reward_out() -> None:
    answer = _score(texts("abc", "", prompt="say"), aggregate={"method": "none"})
    assert _rewards(answer) == [None, None]
    assert answer["counts"] == {"ok": 2}
    assert answer["results"][0]["components"]["other"]["value"] == 3.0


def test_group_normalised_compares_siblings_only() -> None:
    # "abcd" and "ab": mean 3, population std 1. The lone "z" has nobody to compare with.
    samples = [{**s, "group_id": g} for s, g in zip(texts("abcd", "ab", "z"), ("g", "g", "h"), strict=True)]
    answer = _score(samples, aggregate={"method": "group_normalised"}, rewards=[{"name": "length"}])
    assert _rewards(answer) == pytest.approx([2 / 1.0001, -2 / 1.0001, 0.0])
    component = answer["results"][0]["components"]["length"]
    assert (component["raw"], component["value"]) == (4.0, pytest.approx(1 / 1.0001))


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ({"aggregate": {"method": "group_normalised"}}, "needs a group_id for every sample"),
        ({"aggregate": {"method": "group_normalised", "normalise": "affine"}}, "normalises by itself"),
        ({"aggregate": {"method": "mean"}}, "method"),
        ({"deadline_ms": 0}, "deadline_ms"),
    ],
)
def test_aggregates_that_make_no_sense_are_refused(more: dict, where: str) -> None:
    assert where in refused(with_app(post(json={"samples": texts("a"), **more}), LocalBackend(LENGTH)), 422)


def test_a_missing_optional_reward_is_flagged() -> None:
    async def half(samples):
        ok, error = RewardScore("length", 3.0), RewardFailure("model_error", "broken")
        return {"length": [ok for _ in samples], "other": [RewardScore("other", None, error) for _ in samples]}

    (result,) = _score(texts("abc"), LocalBackend(LENGTH, before=half))["results"]
    # Weights 2 and 1: the one that is left counts 3.
    assert (result["status"], result["reward"], result["flags"]) == ("ok", 9.0, ["renormalised"])
    assert result["components"]["other"]["raw"] is None
    assert result["components"]["other"]["error"]["code"] == "model_error"


def test_an_empty_prompt_costs_its_sample_only() -> None:
    answer = _score([*texts("abc", prompt=""), {**texts("de")[0], "id": "b"}])
    assert [result["status"] for result in answer["results"]] == ["invalid_input", "ok"]
    assert _rewards(answer) == [None, 6.0]


def test_everything_about_a_sample_reaches_the_backend() -> None:
    backend = LocalBackend(LENGTH)
    sample = {
        **texts("abc")[0],
        "group_id": "g",
        "reference": "abd",
        "metadata": {"deep": [{"x": 1.5}]},
        "seed": -(2**63),
    }
    _score([sample], backend)
    ((seen,),) = backend.calls
    assert (seen.id, seen.group_id, seen.reference, seen.text) == ("a", "g", "abd", "abc")
    assert (seen.prompt.text, seen.prompt.metadata, seen.seed) == ("say", {"deep": [{"x": 1.5}]}, -(2**63))


def test_several_pictures_are_one_sample() -> None:
    backend = LocalBackend()
    image = {"encoding": "base64", "mime": "image/png", "data": base64.b64encode(PNG).decode()}
    answer = _score([{"id": "a", "prompt": "x", "images": [image] * 3}, inline("b")], backend)
    assert len(backend.calls[0][0].more_images_HWC) == 2
    error = answer["results"][0]["components"]["jpeg"]["error"]
    assert "looks at one image, got 3" in error["message"]
    assert answer["results"][1]["status"] == "ok"
    both = {**inline("a"), "images": [image]}
    assert "exactly one" in refused(with_app(post(json={"samples": [both]})), 422)


def _group(candidates: list[dict], **more) -> dict:
    return {"prompt": "say", "candidates": candidates, **more}


def _candidates(*answers: str) -> list[dict]:
    return [{"id": chr(97 + i), "text": text} for i, text in enumerate(answers)]


def test_a_group_is_scored_together_and_ranked() -> None:
    backend = LocalBackend(LENGTH)
    body = _group(_candidates("abc", "a", "abcdef", "a"), metadata={"k": 1}, reference="r", request_id="r7")
    answer = with_app(post("/v1/score_group", json=body), backend).json()
    assert [result["id"] for result in answer["results"]] == ["a", "b", "c", "d"]
    # Places 2, 0, 3, 0, which the two rewards weigh 2 and 1; equal ones stay in order.
    assert _rewards(answer) == [6.0, 0.0, 9.0, 0.0]
    assert answer["ranking"] == ["c", "a", "b", "d"]
    (seen,) = backend.calls
    assert {(s.prompt.text, s.reference, s.group_id, s.prompt.metadata["k"]) for s in seen} == {("say", "r", "r7", 1)}


def test_a_failed_candidate_is_not_ranked() -> None:
    bad = {"id": "bad", "image": inline("x", b"no picture")["image"]}
    good = {"id": "good", "image": inline("x")["image"]}
    answer = with_app(post("/v1/score_group", json=_group([bad, good]))).json()
    assert [result["status"] for result in answer["results"]] == ["invalid_input", "ok"]
    assert answer["ranking"] == ["good"]


def test_group_requests_are_as_strict() -> None:
    for change, where in (
        ({"candidates": [*_candidates("a"), *_candidates("b")]}, "candidate ids must be unique"),
        ({"candidates": [{"id": "a", "text": "x", "prompt": "mine"}]}, "prompt"),
        ({"samples": []}, "samples"),
        ({"candidates": []}, "candidates"),
    ):
        body = {**_group(_candidates("a")), **change}
        assert where in refused(with_app(post("/v1/score_group", json=body), LocalBackend(LENGTH)), 422)


def test_a_group_can_be_normalised() -> None:
    body = _group(_candidates("abc", "a"), aggregate={"method": "group_normalised"}, rewards=[{"name": "length"}])
    answer = with_app(post("/v1/score_group", json=body), LocalBackend(LENGTH)).json()
    # Places 1 and 0: mean 1/2, std 1/2.
    assert _rewards(answer) == pytest.approx([2 * 0.5 / 0.5001, -2 * 0.5 / 0.5001])
