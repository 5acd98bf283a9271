"""What Stable Diffusion 1.5 and XL have of their own: components left out, sizes that are told, precision, steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from raylign.errors import ConfigError, ModelError
from raylign.models import check_model, load_policy
from raylign.models.image_policy import ImagePolicy, load_image
from raylign.models.sdxl import SDXL
from raylign.models.stable_diffusion import STABLE_DIFFUSION
from raylign.samplers import make_sampler
from raylign.samplers.euler_ode import EulerOdeConfig
from raylign.samplers.gddim import GddimConfig
from tests.tiny_stable_diffusion import sd15_config, sd15_folder, sdxl_config, sdxl_folder


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def velocity(policy: Any, sigma: float = 0.5) -> torch.Tensor:
    state = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return policy.predict(state, torch.tensor([sigma]), policy.encode("glow", False))


def test_a_safety_checker_is_neither_needed_nor_loaded(tmp_path: Path) -> None:
    folder = copy(sd15_folder(), tmp_path)
    # As the published directory names it; its folder may be left out of a download.
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    config = sd15_config(path=str(folder))
    check_model(config)
    assert torch.equal(velocity(load_policy(config, "rollout")), velocity(load_policy(sd15_config(), "rollout")))


def test_sdxl_is_told_the_size_and_the_crop() -> None:
    plain = velocity(load_policy(sdxl_config(), "rollout"))
    same = velocity(load_policy(sdxl_config(original_size=(16, 16)), "rollout"))
    assert torch.equal(plain, same)
    for key, value in (("original_size", (16, 32)), ("original_size", (32, 16)), ("crop", (0, 4)), ("crop", (4, 0))):
        told = sdxl_config().model_copy(update={key: value})
        assert not torch.equal(plain, velocity(load_policy(told, "rollout")))


@pytest.mark.parametrize("zeros", [True, False])
def test_sdxls_negative_is_zero_where_the_model_was_trained_so(zeros: bool, tmp_path: Path) -> None:
    folder = copy(sdxl_folder(), tmp_path)
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=zeros)
    policy = load_policy(sdxl_config(path=str(folder)), "rollout")
    negative = policy.encode("glow", True).need_negative()
    empty = policy.encode("", False)
    assert bool((negative.prompt_embeds_PLD == 0).all()) == zeros
    assert bool((negative.need_pooled() == 0).all()) == zeros
    assert torch.equal(negative.prompt_embeds_PLD, empty.prompt_embeds_PLD) == (not zeros)


def test_sdxls_decoder_stays_in_single_precision() -> None:
    def formats(policy: ImagePolicy) -> tuple[torch.dtype, torch.dtype]:
        return policy.network.dtype, policy._pipeline.vae.dtype  # type: ignore[union-attr]  # a rollout policy has one

    assert formats(load_image(SDXL, sdxl_config(), "rollout", precision="bf16")) == (torch.bfloat16, torch.float32)
    found = formats(load_image(STABLE_DIFFUSION, sd15_config(), "rollout", precision="bf16"))
    assert found == (torch.bfloat16, torch.bfloat16)


def test_every_step_of_ddpos_chain_has_a_density() -> None:
    schedule = load_policy(sd15_config(), "learner").schedule
    sampler = make_sampler(GddimConfig(num_steps=50, eta=1.0), schedule)
    assert sampler.stochastic_S == (True,) * 50


def test_what_a_model_with_levels_of_its_own_cannot_do_is_refused_before_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shift is for flow models"):
        make_sampler(EulerOdeConfig(shift=3.0), load_policy(sd15_config(), "learner").schedule)
    folder = copy(sd15_folder(), tmp_path)
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(ModelError, match="prediction_type 'sample' is not one of"):
        check_model(sd15_config(path=str(folder)))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_prediction_is_read_from_the_scheduler(prediction_type: str, tmp_path: Path) -> None:
    folder = copy(sd15_folder(), tmp_path)
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type=prediction_type)
    found = velocity(load_policy(sd15_config(path=str(folder)), "rollout"))
    published = velocity(load_policy(sd15_config(), "rollout"))
    assert torch.equal(found, published) == (prediction_type == "epsilon")
