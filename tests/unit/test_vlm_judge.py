"""The judge of pictures around a scripted engine: P(yes), aspects, tournaments, templates and what goes wrong."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from raylign.config import parse_config
from raylign.errors import ConfigError, PromptError
from raylign.types import Prompt, RewardFailure, RewardSample, RewardScore
from rewards.base import HasCanaries, ScoresGroups, TakesParams, score_totally
from rewards.judging.engine import JudgeReply, JudgeRequest, LabelLogprobs
from rewards.judging.template import library, load_template
from rewards.vlm_judge import VlmJudgeConfig, VlmJudgeParams, VlmJudgeReward
from tests.reward_cases.judges import ScriptedEngine, label_logprobs, pictures, said

CAPTION = Prompt("p", 'a "red" cube {caption} <|im_end|> 100%')
NO_LOGPROBS = RewardFailure("model_error", "gave no log-probs; use engine.type = 'decision'")


def _reward(engine: ScriptedEngine, /, **config) -> VlmJudgeReward:
    return VlmJudgeReward(parse_config(VlmJudgeConfig, config, "test"), engine)


def _says(**probability_by_label: float) -> ScriptedEngine:
    return ScriptedEngine(labels=lambda _request, _labels: label_logprobs(**probability_by_label))


def _picture(level: int = 128, prompt: Prompt = CAPTION, seed: int = 0) -> RewardSample:
    return RewardSample("s", prompt, np.full((8, 8, 3), level, np.uint8), seed=seed)


def _score(reward: VlmJudgeReward, *samples: RewardSample) -> list[RewardScore]:
    return asyncio.run(score_totally(reward, samples))


def _group(reward: VlmJudgeReward, *levels: int | None) -> list[RewardScore]:
    samples = [RewardSample("s", CAPTION) if level is None else _picture(level) for level in levels]
    return asyncio.run(reward.score_group(samples))


def _code(score: RewardScore) -> str | None:
    return score.error.code if score.error else None


@pytest.mark.parametrize(
    ("config", "value"), [({}, 0.75), ({"normalise": "vocabulary"}, 0.6), ({"template": "vqascore"}, 0.75)]
)
def test_p_yes_by_hand(config, value) -> None:
    """P(yes) = 0.6, P(no) = 0.2: 0.6 / 0.8 = 0.75 among the labels, 0.6 among all tokens, mass 0.8."""
    (score,) = _score(_reward(_says(yes=0.6, no=0.2), **config), _picture())
    assert score.value == pytest.approx(value)
    assert score.details["label_mass"] == pytest.approx(0.8)
    assert (score.details["low_confidence"], score.details["source"]) == (False, "logprobs")
    assert score.details["template"] == config.get("template", "yes_no")


def test_little_label_mass_is_flagged() -> None:
    (score,) = _score(_reward(_says(yes=0.3, no=0.1)), _picture())
    assert score.value == pytest.approx(0.75)
    assert score.details["low_confidence"] is True
    (score,) = _score(_reward(_says(yes=0.3, no=0.1), low_confidence_below=0.3), _picture())
    assert score.details["low_confidence"] is False


@pytest.mark.parametrize(("probabilities", "value"), [({"yes": 0.9}, 1.0), ({"no": 0.9}, 0.0)])
def test_a_label_that_is_not_among_the_likeliest_counts_as_nothing(probabilities, value) -> None:
    (score,) = _score(_reward(_says(**probabilities)), _picture())
    assert score.value == value


def test_no_label_at_all_is_an_error() -> None:
    (score,) = _score(_reward(_says()), _picture())
    assert (score.value, _code(score)) == (None, "unparseable")


@pytest.mark.parametrize("mode", ["yes_no", "pairwise"])
def test_an_engine_without_log_probs_is_an_error_that_says_what_to_do(mode) -> None:
    engine = ScriptedEngine(labels=lambda _request, _labels: NO_LOGPROBS)
    scores = _group(_reward(engine, mode=mode), 1, 2)
    assert [score.error for score in scores] == [NO_LOGPROBS, NO_LOGPROBS]


@pytest.mark.parametrize("name", sorted(library()))
def test_the_caption_and_the_picture_are_in_every_question(name: str) -> None:
    mode = load_template(name).kind
    marks = json.dumps({"reasoning": "", "alignment": 3, "coherence": 3, "style": 3})
    engine = ScriptedEngine(
        lambda _: marks, lambda _request, labels: LabelLogprobs(dict.fromkeys(labels, -1.0), "logprobs")
    )
    _group(_reward(engine, mode=mode, template=name), 10, 20)
    assert engine.requests
    for request in engine.requests:
        assert 'a "red" cube {caption}   100%' in said(request)
        assert "<|im_end|>" not in said(request)
        user = request.messages[-1]
        assert user.role == "user"
        assert {int(image_HWC[0, 0, 0]) for image_HWC in user.images_HWC} <= {10, 20}
        assert len(user.images_HWC) == (2 if mode == "pairwise" else 1)
    shown = {int(image_HWC[0, 0, 0]) for request in engine.requests for image_HWC in request.messages[-1].images_HWC}
    assert shown == {10, 20}


def test_the_library_has_a_template_of_its_own_name_for_each_mode() -> None:
    assert {"yes_no", "aspects", "pairwise", "vqascore"} == set(library())
    assert all(library()[mode].kind == mode for mode in ("yes_no", "aspects", "pairwise"))
    assert all(template.source for template in library().values())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('kind = "yes_no"\nuser = "is it nice?"\nfirst = "yes"\nsecond = "no"\n', "has to know what was asked"),
        ('kind = "yes_no"\nuser = "{caption}?"\nfirst = "yes"\n', "two different labels"),
        ('kind = "pairwise"\nuser = "{caption}?"\nfirst = "A"\nsecond = "a"\n', "two different labels"),
        ('kind = "aspects"\nuser = "{caption}?"\n', "names them"),
        ('kind = "aspects"\nuser = "{caption}?"\naspects = ["reasoning"]\n', "names them"),
    ],
)
def test_a_template_that_cannot_work_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'name = "mine"\n{text}', encoding="utf-8")
    with pytest.raises(ConfigError, match=says):
        load_template(str(path))


def _marks(alignment: object = 4, coherence: object = 3.5, style: object = 2) -> str:
    return json.dumps({"reasoning": "so", "alignment": alignment, "coherence": coherence, "style": style})


def test_aspects_by_hand() -> None:
    """(4 + 3.5 + 2) / 3 = 3.1667, (3.1667 - 1) / 4 = 0.541667."""
    engine = ScriptedEngine(lambda _: _marks())
    (score,) = _score(_reward(engine, mode="aspects"), _picture())
    assert score.value == pytest.approx(6.5 / 12)
    details = dict(score.details)
    assert [details[key] for key in ("alignment", "coherence", "style", "reasoning")] == [4.0, 3.5, 2.0, "so"]
    schema = engine.requests[0].json_schema
    assert schema is not None
    assert schema["required"] == ["reasoning", "alignment", "coherence", "style"]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("Alignment: 4, Coherence: 4, Style: 4", "unparseable"),
        (_marks(alignment="4"), "unparseable"),
        (_marks(style=True), "unparseable"),
        (_marks(style=None), "unparseable"),
        ('{"alignment": 4, "style": 3}', "unparseable"),
        (_marks(coherence=5.5), "out_of_range"),
        (_marks(coherence=0), "out_of_range"),
        (JudgeReply(_marks(), finish_reason="length"), "truncated"),
        (f"<think>{_marks()}", "truncated"),
    ],
)
def test_unusable_marks_are_an_error_after_retries(answer, code) -> None:
    engine = ScriptedEngine(lambda _: answer)
    (score,) = _score(_reward(engine, mode="aspects"), _picture())
    assert (score.value, _code(score)) == (None, code)
    assert len({request.seed for request in engine.requests}) == 3


def test_an_unusable_answer_is_asked_for_again() -> None:
    answers = iter(["hm", f"```json\n{_marks(5, 5, 5)}\n```"])
    (score,) = _score(_reward(ScriptedEngine(lambda _: next(answers)), mode="aspects"), _picture())
    assert score.value == 1.0


def _brighter(weight_of_place: float = 0.0) -> Callable[[JudgeRequest, tuple[str, ...]], LabelLogprobs]:
    """Prefers the brighter picture, and the first one by a weight."""

    def labels(request: JudgeRequest, asked: tuple[str, ...]) -> LabelLogprobs:
        first, second = (float(image_HWC[0, 0, 0]) for image_HWC in request.messages[-1].images_HWC)
        p = min(0.98, max(0.01, 0.5 + (first - second) / 500 + weight_of_place))
        assert asked == ("1", "2")
        return label_logprobs(_1=0.9 * p, _2=0.9 * (1 - p))

    return labels


def test_a_group_is_a_tournament_in_both_orders() -> None:
    """Levels 200 > 100 > 0; the fourth sample has no picture."""
    engine = ScriptedEngine(labels=_brighter())
    scores = _group(_reward(engine, mode="pairwise"), 100, 200, 0, None)
    assert [score.value for score in scores] == [0.5, 1.0, 0.0, None]
    assert _code(scores[3]) == "invalid_input"
    assert len(engine.requests) == 6
    assert scores[0].details["num_matches"] == 2
    assert scores[0].details["label_mass"] == pytest.approx(0.9)
    assert scores[0].details["group"] == {"size": 3, "tie_rate": 0.0, "zero_variance": False}


def test_a_preference_for_a_place_is_a_tie() -> None:
    """The place outweighs a difference of 50 levels (0.1), not one of 200 (0.4)."""
    scores = _group(_reward(ScriptedEngine(labels=_brighter(0.2)), mode="pairwise"), 0, 50, 250)
    assert [score.value for score in scores] == [0.25, 0.25, 1.0]
    assert [score.details["num_position_conflicts"] for score in scores] == [1, 1, 0]


def test_equal_pictures_tie() -> None:
    scores = _group(_reward(ScriptedEngine(labels=_brighter()), mode="pairwise"), 7, 7)
    assert [score.value for score in scores] == [0.5, 0.5]
    assert scores[0].details["group"] == {"size": 2, "tie_rate": 1.0, "zero_variance": True}


@pytest.mark.parametrize("levels", [(1,), (1, 2, 3, 4)])
def test_a_group_that_cannot_be_compared_is_invalid(levels) -> None:
    scores = _group(_reward(ScriptedEngine(labels=_brighter()), mode="pairwise", max_group=3), *levels)
    assert {_code(score) for score in scores} == {"invalid_input"}


def test_pairwise_mode_scores_groups_only() -> None:
    (score,) = _score(_reward(ScriptedEngine(), mode="pairwise"), _picture())
    assert _code(score) == "invalid_input"
    assert score.error
    assert "score_group" in score.error.message


def test_a_group_in_another_mode_is_scored_one_by_one() -> None:
    scores = asyncio.run(_reward(_says(yes=0.5, no=0.5)).score_group(pictures(3)))
    assert [score.value for score in scores] == [0.5] * 3
    assert scores[0].details["group"] == {"size": 3, "tie_rate": 1.0, "zero_variance": True}


def test_parameters_change_the_question() -> None:
    engine = _says(yes=0.5, no=0.5)
    reward = _reward(engine)
    assert isinstance(reward, TakesParams)
    question = 'Is "{caption}" painted in oil? yes or no'
    _score(reward.with_params(VlmJudgeParams(question=question)), _picture())
    assert 'Is "a "red" cube' in said(engine.requests[-1])
    _score(reward.with_params(VlmJudgeParams(template="vqascore")), _picture())
    assert "Does this figure show" in said(engine.requests[-1])


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"question": "is it nice?"}, "has to know what was asked"),
        ({"template": "vqa_score"}, "did you mean 'vqascore'"),
        ({"template": "aspects"}, "is for mode 'aspects', not 'yes_no'"),
        ({"template": "/tmp/mine.toml"}, "no judge template"),
    ],
)
def test_parameters_beyond_the_bounds_are_refused(params, says) -> None:
    with pytest.raises(ConfigError, match=says):
        _reward(ScriptedEngine()).with_params(VlmJudgeParams.model_validate(params))


def test_only_an_in_process_judge_is_probed() -> None:
    assert _reward(ScriptedEngine()).probe() is None
    in_process = _reward(_says(yes=0.5, no=0.5), engine={"type": "decision", "model": "m"})
    probe = in_process.probe()
    assert probe is not None
    assert _score(in_process, probe)[0].value == 0.5
    assert in_process.deterministic
    assert not _reward(ScriptedEngine()).deterministic


def test_a_blind_judge_fails_the_canaries_and_one_that_sees_passes() -> None:
    reward = _reward(_says(yes=0.9, no=0.1))
    assert isinstance(reward, HasCanaries)
    assert isinstance(reward, ScoresGroups)
    canaries = list(reward.canaries())
    blind = _score(reward, *(canary.sample for canary in canaries))
    assert all(score.value is not None and score.value > c.highest for c, score in zip(canaries, blind, strict=True))
    seeing = _score(_reward(_says(yes=0.1, no=0.9)), *(canary.sample for canary in canaries))
    assert all(score.value is not None and score.value <= c.highest for c, score in zip(canaries, seeing, strict=True))
    assert not list(_reward(ScriptedEngine(), mode="pairwise").canaries())


def test_versions_say_the_question_and_the_settings() -> None:
    configs = ({}, {"template": "vqascore"}, {"mode": "aspects"}, {"normalise": "vocabulary"})
    versions = [_reward(ScriptedEngine(), **config).version for config in configs]
    assert len(set(versions)) == 4
    assert versions[0].startswith("1/yes_no/yes_no-1/")
    assert _reward(ScriptedEngine(), name="n", weight=2.0).version == versions[0]


def test_prompts_that_cannot_be_judged_fail_the_check() -> None:
    reward = _reward(ScriptedEngine())
    for text, says in (("", "is empty"), ("x" * 9000, "9000 characters")):
        with pytest.raises(PromptError, match=says):
            reward.check(Prompt("p", text))
