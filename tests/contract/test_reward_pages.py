"""A page for every row of the REWARDS table: its formula and range, each key, an example that parses."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from rewards import REWARDS, RewardConfig, RewardUnion

ROOT = Path(__file__).parents[2]
CONFIGS = {str(config.model_fields["type"].default): config for config in REWARDS}


def _page(name: str) -> str:
    return (ROOT / "docs" / "rewards" / f"{name}.md").read_text(encoding="utf-8")


def test_every_reward_has_a_page_and_no_page_is_left_over() -> None:
    assert {path.stem for path in (ROOT / "docs" / "rewards").glob("*.md")} == set(CONFIGS)


def test_the_table_of_rewards_lists_every_one() -> None:
    table = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    listed = re.findall(r"\[`(\w+)`\]\(rewards/(\w+)\.md\)", table)
    assert {name for name, _ in listed} == set(CONFIGS)
    assert all(name == page for name, page in listed)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_page_names_every_key_and_says_the_range(name: str) -> None:
    page = _page(name)
    own = CONFIGS[name].model_fields.keys() - RewardConfig.model_fields.keys() - {"type"}
    assert [key for key in own if not re.search(rf"`{key}[`.]", page)] == []
    assert re.search(r"\brange\b|\bunbounded\b", page, flags=re.IGNORECASE)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_pages_examples_are_configurations(name: str) -> None:
    tables = [tomllib.loads(block) for block in re.findall(r"```toml\n(.*?)```", _page(name), flags=re.DOTALL)]
    rewards = [reward for table in tables for reward in table.get("rewards", [])]
    assert rewards
    for reward in rewards:
        assert TypeAdapter[RewardConfig](RewardUnion).validate_python(reward).model_dump()["type"] == name


@pytest.mark.parametrize("name", CONFIGS)
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", _page(name))
    assert [link for link in links if not (ROOT / "docs" / "rewards" / link).exists()] == []
