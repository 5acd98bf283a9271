"""The configurations for published text models fit together, as far as can be told without the weights."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylign.assets import resolve
from raylign.config import Config
from raylign.errors import ConfigError
from raylign.models.dream import DreamConfig
from raylign.models.llada import LladaConfig
from raylign.models.text_policy import TextModelConfig
from raylign.samplers import make_token_sampler
from raylign.samplers.tokens import TokenSamplerConfig
from raylign.types import Prompt, RewardSample
from rewards import make_mix, make_reward
from rewards.math_answer import MathAnswerReward
from rollout.datasets import read_prompts
from services.assembly import evaluation_sampler
from services.config import RunConfig, load_run_config

CONFIGS = Path(__file__).parents[2] / "configs"


def load(name: str, **overrides: str) -> RunConfig:
    return load_run_config(str(CONFIGS / f"{name}.toml"), {key.replace("__", "."): v for key, v in overrides.items()})


def values(config: RunConfig, prompt: Prompt, text: str) -> dict[str, float | None]:
    """What each reward says of an answer."""
    found: dict[str, float | None] = {}
    for one in config.rewards:
        reward = make_reward(one)
        reward.load()
        try:
            (score,) = asyncio.run(reward.score([RewardSample("s", prompt, text=text)]))
        finally:
            if isinstance(reward, MathAnswerReward):
                reward.close()
        found[one.name] = score.value
    return found


@pytest.mark.parametrize(("name", "family"), [("llada_gsm8k", LladaConfig), ("dream_countdown", DreamConfig)])
def test_samplers_divide_the_canvas_in_rollouts_and_in_evaluation(name: str, family: type[Config]) -> None:
    config = load(name)
    assert type(config.model) is family
    assert isinstance(config.model, TextModelConfig)
    for sampler in (config.sampler, evaluation_sampler(config)):
        assert isinstance(sampler, TokenSamplerConfig)
        assert make_token_sampler(sampler, config.model.canvas_length).block_length == 32
    assert not config.model.trust_remote_code
    assert (config.rollout.precision, config.learner.precision) == ("bf16", "bf16")


def test_the_gsm8k_example_goes_on_to_eight_gpus_and_refuses_half_the_change() -> None:
    assert load("llada_gsm8k", rollout__num_actors="8", learner__num_ranks="8").learner.num_ranks == 8
    with pytest.raises(ConfigError, match="must be equal, got 8 and 1"):
        load("llada_gsm8k", rollout__num_actors="8")


def test_the_gsm8k_example_reads_the_published_columns_and_scores_the_number(tmp_path: Path) -> None:
    config = load("llada_gsm8k")
    row = {"question": "Tom has {6} bags of 7 nuts. How many nuts?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train.parquet")
    (prompt,) = read_prompts(tmp_path / "train.parquet", config.prompts.fields)
    assert prompt.text.startswith(row["question"])
    assert prompt.text.endswith("give the final number between <answer> and </answer>.")
    make_mix(config.rewards).check(prompt)
    tagged = "<reasoning>6 bags of 7</reasoning><answer>{}</answer>"
    assert values(config, prompt, tagged.format(42)) == {"math_answer": 1.0, "format_tags": 1.0}
    assert values(config, prompt, tagged.format(43)) == {"math_answer": 0.0, "format_tags": 1.0}


def test_the_countdown_example_reads_the_shipped_prompts_and_scores_the_expression() -> None:
    config = load("dream_countdown")
    mix = make_mix(config.rewards)
    for file in (config.prompts.train, config.prompts.heldout):
        assert file is not None
        for prompt in read_prompts(resolve(file), config.prompts.fields):
            mix.check(prompt)
            bare = f"make {prompt.metadata['target']} of {' '.join(map(str, prompt.metadata['numbers']))}"  # type: ignore[arg-type]
            assert f"that has the given value: {bare}.\n" in prompt.text
    prompt = Prompt("p", "", {"numbers": [7, 8, 2], "target": 22})
    answers = {"8 + 2 * 7": 1.0, "7 + 8 + 2": 0.1, "22": 0.0}
    found = {text: values(config, prompt, f"So <answer>{text}</answer>")["countdown"] for text in answers}
    assert found == answers
