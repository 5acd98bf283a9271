"""The configurations for published picture models take a learner step on a tiny model of their family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from learner.learner import Learner
from learner.parallel import RankGroup
from raylign.errors import ConfigError, NumericsError
from raylign.models.adapters import LoraSettings
from raylign.types import Prompt, RolloutGroup
from rollout.engine import chunk_requests, join_parts
from rollout.prompts import GroupTask
from services.assembly import build_engine, build_learner
from services.config import RunConfig, load_run_config
from services.parity import parity_gap
from tests.tiny_image_families import TINY_FAMILIES
from tests.tiny_models import breakdown, train_step

CONFIGS = Path(__file__).parents[2] / "configs"
EXAMPLES = pytest.mark.parametrize("name", ["flux_flow_grpo", "sana_nft", "sd15_ddpo"])


# Fifty steps of a tiny model take as long as eight of them are telling.
SHORTER = {"sd15_ddpo": {"sampler__num_steps": "8"}}


def load(name: str, **overrides: str) -> RunConfig:
    return load_run_config(str(CONFIGS / f"{name}.toml"), {key.replace("__", "."): v for key, v in overrides.items()})


def tiny(name: str) -> RunConfig:
    """The example on the CPU, two groups of two pictures, with everything else as it ships."""
    config = load(
        name,
        placement="in_process",
        group_size="2",
        groups_per_step="2",
        rollout__chunk_size="2",
        rollout__num_actors="1",
        rollout__num_gpus="0",
        learner__micro_batch_size="2",
        learner__num_ranks="1",
        learner__num_gpus_per_rank="0",
        **SHORTER.get(name, {}),
    )
    small = TINY_FAMILIES[type(config.model)].config()
    sizes = ("path", "height", "width", "max_sequence_length")
    changes = {key: getattr(small, key) for key in sizes if hasattr(small, key)}
    return config.model_copy(
        update={"model": config.model.model_copy(update={**changes, "lora": LoraSettings(rank=2, alpha=4)})}
    )


def drawn(config: RunConfig, learner: Learner) -> list[RolloutGroup]:
    engine = build_engine(config)
    engine.pull(learner.publish(0))
    parts: dict[int, list[Any]] = {}
    tasks = [GroupTask(Prompt(f"p{index}", f"a cat {index}"), 0, index) for index in range(config.groups_per_step)]
    for request in chunk_requests(tasks, config.group_size, config.chunk_size):
        for part in engine.generate(request):
            parts.setdefault(part.sequence, []).append(part)
    return [join_parts(parts[sequence]).with_rewards([breakdown(0.8), breakdown(0.9)]) for sequence in sorted(parts)]


@EXAMPLES
def test_an_example_takes_a_step_with_a_tiny_model_of_its_family(name: str) -> None:
    config = tiny(name)
    threads = torch.get_num_threads()
    learner = build_learner(config, RankGroup.single())
    before = {key: p.detach().clone() for key, p in learner.policy.trainable_parameters().items()}
    results = train_step(learner, drawn(config, learner), 1)
    torch.set_num_threads(threads)
    assert len(results) == config.learner.updates_per_step
    assert all(result.finite for result in results)
    after = learner.policy.trainable_parameters()
    assert any(not torch.equal(before[key], after[key]) for key in before)


@EXAMPLES
def test_the_parity_gate_passes_an_examples_tiny_model_and_stops_another_adapter(name: str) -> None:
    config = tiny(name)
    threads = torch.get_num_threads()
    learner, engine = build_learner(config, RankGroup.single()), build_engine(config)
    torch.set_num_threads(threads)
    with torch.no_grad():
        for parameter in learner.policy.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    engine.pull(learner.publish(1, "current"))
    probe = engine.probe("a cat 7")
    answer = learner.predict(probe.state, probe.sigma_B, probe.conditioning, "current")
    assert parity_gap(probe, answer, config.parity_tolerance) < 0.02
    engine.pull(build_learner(config, RankGroup.single()).publish(2))
    torch.set_num_threads(threads)
    with pytest.raises(NumericsError, match="parity gate at version 2"):
        parity_gap(engine.probe("a cat 7"), answer, config.parity_tolerance)


@EXAMPLES
def test_an_example_is_cut_by_whole_groups_and_precise_where_it_must_be(name: str) -> None:
    config = load(name)
    assert config.group_size % config.chunk_size == 0
    assert config.rollout.latents == "fp32"
    assert (config.rollout.precision, config.learner.precision) == ("bf16", "bf16")
    assert [reward.only_eval for reward in config.rewards] == [False, True]


def test_the_sana_example_goes_on_to_eight_gpus_and_refuses_half_the_change() -> None:
    assert load("sana_nft", rollout__num_actors="8", learner__num_ranks="8").learner.num_ranks == 8
    with pytest.raises(ConfigError, match="must be equal, got 8 and 1"):
        load("sana_nft", rollout__num_actors="8")


def test_the_flux_example_runs_on_other_numbers_of_gpus_and_refuses_shares_that_cut_chunks() -> None:
    assert load("flux_flow_grpo", rollout__num_actors="2", learner__num_ranks="2").learner.num_ranks == 2
    with pytest.raises(ConfigError, match="do not divide into"):
        load("flux_flow_grpo", learner__num_ranks="5")
