"""FLUX.1: its time shift, its tokens, what its network is told, and directories it cannot use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from raylign.errors import ModelError
from raylign.models import check_model, load_policy
from raylign.models.flow_scheduler import resolution_schedule
from raylign.models.flux import pack, token_places, unpack
from raylign.models.schedule import even_flow_sigmas
from tests.tiny_image_families import flux_config, flux_folder, load_with_diffusers

DEV = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "shift": 3.0}


def with_scheduler(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


def diffusers_levels(config: dict[str, Any], num_steps: int, num_tokens: int) -> torch.Tensor:
    """What FluxPipeline has its scheduler do."""
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(config)
    known = scheduler.config
    lengths = known.base_image_seq_len, known.max_image_seq_len
    mu = calculate_shift(num_tokens, *lengths, known.base_shift, known.max_shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    return scheduler.sigmas


@pytest.mark.parametrize("changes", [{}, {"time_shift_type": "linear"}, {"use_dynamic_shifting": False}])
@pytest.mark.parametrize("num_steps", [1, 6, 28])
@pytest.mark.parametrize("num_tokens", [256, 1024, 4096])
def test_levels_are_the_schedulers(tmp_path: Path, changes: dict[str, Any], num_steps: int, num_tokens: int) -> None:
    config = DEV | changes
    schedule = resolution_schedule(with_scheduler(tmp_path, config), num_tokens)
    theirs = diffusers_levels(config, num_steps, num_tokens)
    torch.testing.assert_close(schedule.levels(num_steps), theirs, rtol=0, atol=1e-6)


def test_a_shift_of_the_users_replaces_the_sizes(tmp_path: Path) -> None:
    # 1024 tokens, 512 x 512 pixels: mu = .5 + .65 * 768 / 3840 = .63, s = e^.63 = 1.8776; t = .5 goes to s / (1 + s).
    schedule = resolution_schedule(with_scheduler(tmp_path, DEV), 1024)
    assert schedule.shift == pytest.approx(1.8776, abs=1e-4)
    assert schedule.levels(2).tolist() == pytest.approx([1.0, 0.6525, 0.0], abs=1e-4)
    assert schedule.levels(4, 3.0).tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert torch.equal(schedule.levels(4, 3.0), even_flow_sigmas(4, 3.0))


def test_tokens_are_those_of_the_pipeline() -> None:
    from diffusers import FluxPipeline

    latents = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).reshape(2, 3, 4, 6)
    tokens = pack(latents)
    assert torch.equal(tokens, FluxPipeline._pack_latents(latents, 2, 3, 4, 6))  # type: ignore[attr-defined]
    assert torch.equal(unpack(tokens, 4, 6), latents)
    # The second token holds rows 0 and 1 of columns 2 and 3: channel 0 first, and there row by row.
    assert tokens[0, 1, :4].tolist() == [2, 3, 8, 9]
    assert token_places(4, 6).tolist() == [[0, row, column] for row in range(2) for column in range(3)]


def asked(path: Path, guidance: float | None = None) -> dict[str, Any]:
    """What a policy's network is called with."""
    policy: Any = load_policy(flux_config("full", path=str(path), guidance=guidance), "rollout")
    calls: list[dict[str, Any]] = []
    policy.network.register_forward_pre_hook(lambda _, __, told: calls.append(told), with_kwargs=True)
    with torch.no_grad():
        told = policy.encode("a cat", False).repeat(2)
        policy.predict(torch.zeros(2, *policy.latent_shape), torch.tensor([0.70037, 0.3]), told)
    return calls[0]


def test_the_network_is_told_sigma_as_a_float_and_its_guidance() -> None:
    call = asked(flux_folder())
    assert call["timestep"].dtype == torch.float32
    assert call["timestep"].tolist() == pytest.approx([0.70037, 0.3])
    assert call["guidance"].tolist() == [3.5, 3.5]
    assert asked(flux_folder(), 1.25)["guidance"].tolist() == [1.25, 1.25]
    assert asked(flux_folder(guidance_embeds=False))["guidance"] is None
    assert call["hidden_states"].shape == (2, 4 * 6, 16)
    assert not call["txt_ids"].any()


def test_guidance_is_refused_where_the_network_takes_none() -> None:
    config = flux_config(path=str(flux_folder(guidance_embeds=False)), guidance=3.5)
    with pytest.raises(ModelError, match=r"model\.guidance = 3\.5, but this network takes no guidance"):
        check_model(config)
    check_model(flux_config(guidance=3.5))


def test_the_prompt_is_told_to_both_encoders_and_padded_to_its_length() -> None:
    policy = load_policy(flux_config(max_sequence_length=12), "rollout")
    pipeline = load_with_diffusers(flux_folder())
    for text, told in (("cat 7", policy.encode("cat 7", True)), ("", policy.encode("cat 7", True).need_negative())):
        with torch.no_grad():
            embeds, pooled, _ = pipeline.encode_prompt(text, max_sequence_length=12)
        assert torch.equal(told.prompt_embeds_PLD, embeds)
        assert torch.equal(told.need_pooled(), pooled)
        assert told.prompt_embeds_PLD.shape[1] == 12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler"}, "is drawn with a FlowMatchEulerDiscreteScheduler"),
        ({"shift_terminal": 0.02}, "sets shift_terminal"),
        ({"use_karras_sigmas": True}, "sets use_karras_sigmas"),
        ({"invert_sigmas": True}, "sets invert_sigmas"),
    ],
)
def test_a_scheduler_it_cannot_follow_is_refused_before_anything_is_loaded(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(flux_folder(), folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=message):
        check_model(flux_config(path=str(folder)))


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"])
def test_a_directory_with_something_missing_is_refused(tmp_path: Path, component: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(flux_folder(), folder)
    shutil.rmtree(folder / component)
    with pytest.raises(ModelError, match=f"lacks its component folder {component}/"):
        check_model(flux_config(path=str(folder)))
