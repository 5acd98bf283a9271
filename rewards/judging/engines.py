"""The engines a judge can ask. A row here makes one available to every reward that judges."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rewards.judging.decision_engine import DecisionEngine, DecisionEngineConfig
from rewards.judging.engine import JudgeEngine
from rewards.judging.openai_engine import OpenAIEngine, OpenAIEngineConfig

EngineUnion = Annotated[OpenAIEngineConfig | DecisionEngineConfig, Field(discriminator="type")]
ENGINES = {
    OpenAIEngineConfig: OpenAIEngine,
    DecisionEngineConfig: DecisionEngine,
}


def make_engine(config: OpenAIEngineConfig | DecisionEngineConfig) -> JudgeEngine:
    """The engine a configuration describes; nothing is loaded or asked yet. Raises ConfigError."""
    return ENGINES[type(config)](config)  # type: ignore[arg-type]  # the table pairs them


__all__ = ["ENGINES", "DecisionEngineConfig", "EngineUnion", "OpenAIEngineConfig", "make_engine"]
