"""The judges' pages: their examples parse and every configuration key is in them."""

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from rewards import RewardConfig, RewardUnion
from rewards.judging.r3_judge import R3Config
from rewards.judging.rubrics import Rubric
from rewards.vlm_judge import VlmJudgeConfig

DOCS = Path(__file__).parents[2] / "docs" / "rewards"
PAGES = [("r3", R3Config), ("vlm_judge", VlmJudgeConfig)]


@pytest.mark.parametrize(("name", "cls"), PAGES)
def test_examples_parse(name: str, cls: type[RewardConfig]) -> None:
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    tables = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)]
    rewards = [reward for table in tables for reward in table.get("rewards", [])]
    assert rewards
    for reward in rewards:
        assert isinstance(TypeAdapter[RewardConfig](RewardUnion).validate_python(reward), cls)
    for rubric in (table for table in tables if "rewards" not in table):
        assert Rubric.model_validate(rubric).modes


@pytest.mark.parametrize(("name", "cls"), PAGES)
def test_every_key_is_explained_and_no_other(name: str, cls: type[RewardConfig]) -> None:
    table = (DOCS / f"{name}.md").read_text(encoding="utf-8").split("## Configuration")[1].split("Parameters")[0]
    keys = {
        key for line in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE) for key in line.strip("`").split("`, `")
    }
    assert keys == set(cls.model_fields) - set(RewardConfig.model_fields) - {"type"}
