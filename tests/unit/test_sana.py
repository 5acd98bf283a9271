"""SANA: its two schedulers, what its network is told, the instruction before a prompt, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from raylign.errors import ModelError
from raylign.models import check_model, load_policy
from raylign.models.base import Conditioning, join_conditioning
from raylign.models.flow_scheduler import euler_or_solver_schedule
from raylign.models.schedule import flow_sigmas, initial_scale, solver_flow_sigmas
from tests.tiny_image_families import load_with_diffusers, sana_config, sana_folder

# torch's own arrays, which diffusers' solver turns into NumPy's, do not know NumPy 2's `copy`.
NUMPY_2 = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def scheduler_of(folder: Path) -> Any:
    return load_with_diffusers(folder).scheduler


@NUMPY_2
@pytest.mark.parametrize("solver", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 20, 40])
def test_levels_are_those_of_the_directorys_scheduler(solver: bool, num_steps: int) -> None:
    scheduler = scheduler_of(sana_folder(solver))
    scheduler.set_timesteps(num_steps)
    schedule = euler_or_solver_schedule(sana_folder(solver))
    torch.testing.assert_close(schedule.levels(num_steps), scheduler.sigmas, rtol=0, atol=1e-6)


def test_the_solvers_levels_by_hand() -> None:
    # 1 - 1/1000 = .999 is the first before the shift; at shift 3 it is 2.997 / 2.998.
    assert solver_flow_sigmas(2, 1.0).tolist() == pytest.approx([0.999, 0.4995, 0.0], abs=1e-7)
    assert float(solver_flow_sigmas(2, 3.0)[0]) == pytest.approx(2.997 / 2.998, abs=1e-7)
    # |(1 - t, t)| at t = .999: noise is scaled to what the first level holds.
    assert initial_scale(solver_flow_sigmas(2, 1.0)) == pytest.approx((0.999**2 + 0.001**2) ** 0.5)


def test_a_shift_of_the_users_replaces_the_schedulers() -> None:
    assert torch.equal(euler_or_solver_schedule(sana_folder()).levels(5, 1.0), flow_sigmas(5, 1.0))
    assert torch.equal(euler_or_solver_schedule(sana_folder(True)).levels(5, 1.0), solver_flow_sigmas(5, 1.0))


def test_the_network_is_told_scaled_time_as_a_float_and_which_tokens_count() -> None:
    policy: Any = load_policy(sana_config("full"), "rollout")
    calls: list[dict[str, Any]] = []
    policy.network.register_forward_pre_hook(lambda _, __, told: calls.append(told), with_kwargs=True)
    told = policy.encode("cat 7", False)
    with torch.no_grad():
        policy.predict(torch.zeros(2, *policy.latent_shape), torch.tensor([0.70037, 0.3]), told.repeat(2))
    assert calls[0]["timestep"].tolist() == pytest.approx([350.185, 150.0])  # the tiny model's timestep_scale is .5
    assert torch.equal(calls[0]["encoder_attention_mask"], told.repeat(2).mask_PL)
    assert told.pooled_PD is None


def velocity(policy: Any, told: Conditioning) -> torch.Tensor:
    state = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return policy.predict(state, torch.tensor([0.6]), told)


def test_padding_says_nothing() -> None:
    policy = load_policy(sana_config("full"), "rollout")
    told = policy.encode("cat", False)
    assert told.mask_PL is not None
    padding = told.mask_PL == 0
    assert padding.any()
    assert not padding.all()
    changed = torch.where(padding[..., None], 7.0, told.prompt_embeds_PLD)
    same = velocity(policy, Conditioning(changed, mask_PL=told.mask_PL))
    torch.testing.assert_close(same, velocity(policy, told), rtol=0, atol=1e-6)
    heard = velocity(policy, Conditioning(changed, mask_PL=torch.ones_like(told.mask_PL)))
    assert not torch.allclose(heard, velocity(policy, told), atol=1e-3)


def test_masks_of_prompts_and_of_their_negatives_stay_with_their_rows() -> None:
    policy = load_policy(sana_config("full"), "rollout")
    short, long = policy.encode("cat", True), policy.encode("1 2 3 4 5 6", True)
    both = join_conditioning([short, long])
    assert both.mask_PL is not None
    assert both.mask_PL.sum(1).tolist() != [0, 0]
    assert torch.equal(both.rows(slice(1, 2)).mask_PL, long.mask_PL)  # type: ignore[arg-type]  # SANA has masks
    assert both.need_negative().mask_PL is not None


@pytest.mark.parametrize("instructed", [True, False])
def test_the_instruction_is_the_pipelines_own(instructed: bool) -> None:
    import inspect

    from diffusers import SanaPipeline

    default = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    assert default[-1].startswith("User Prompt")
    policy = load_policy(sana_config(complex_human_instruction=instructed), "rollout")
    told = policy.encode("cat 7", True)
    with torch.no_grad():
        embeds, mask, negative, negative_mask = load_with_diffusers(sana_folder()).encode_prompt(
            "cat 7", max_sequence_length=8, complex_human_instruction=default if instructed else None
        )
    assert torch.equal(told.prompt_embeds_PLD, embeds)
    assert torch.equal(told.need_negative().prompt_embeds_PLD, negative)
    assert told.mask_PL is not None
    assert torch.equal(told.mask_PL, mask)
    assert torch.equal(told.need_negative().mask_PL, negative_mask)  # type: ignore[arg-type]  # SANA has masks


def test_the_instruction_changes_what_is_told() -> None:
    told, untold = (
        load_policy(sana_config(complex_human_instruction=chosen), "rollout").encode("cat 7", True)
        for chosen in (True, False)
    )
    assert not torch.equal(told.prompt_embeds_PLD, untold.prompt_embeds_PLD)
    assert torch.equal(told.need_negative().prompt_embeds_PLD, untold.need_negative().prompt_embeds_PLD)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": False}, "use_flow_sigmas = False; a flow model needs"),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}, "'epsilon'; a flow model needs"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "sets use_dynamic_shifting"),
        ("scheduler/scheduler_config.json", {"use_lu_lambdas": True}, "sets use_lu_lambdas"),
        ("scheduler/scheduler_config.json", {"_class_name": "SCMScheduler"}, "is a SCMScheduler"),
        ("transformer/config.json", {"guidance_embeds": True}, "embeds guidance, as SANA-Sprint does"),
    ],
)
def test_what_it_cannot_follow_is_refused_before_anything_is_loaded(
    tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sana_folder(solver=True), folder)
    check_model(sana_config(path=str(folder)))
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=message):
        check_model(sana_config(path=str(folder)))
