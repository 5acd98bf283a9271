"""Number formats of a run: which slots get a copy, and the pairs that are refused with their remedy."""

from __future__ import annotations

from typing import Any

import pytest

from raylign.config import parse_config
from raylign.errors import ConfigError
from rollout.explore import ExploreConfig
from services.config import RunConfig
from services.parity import FORMAT_GAPS
from services.precision_checks import low_precision_slots


def _config(algorithm: str = "nft", **rollout: Any) -> RunConfig:
    sampler = {"nft": "euler_ode", "flow_grpo": "flow_sde"}[algorithm]
    values = {"algorithm": {"type": algorithm}, "sampler": {"type": sampler}, "rollout": rollout}
    return parse_config(RunConfig, values, "the test")


def test_which_slots_compute_with_a_copy() -> None:
    drafts, pool = ExploreConfig(precision="nvfp4"), ExploreConfig(regenerate=False)
    assert low_precision_slots("fp32", None) == {}
    assert low_precision_slots("bf16", ExploreConfig()) == {}
    assert low_precision_slots("bf16", drafts) == {"draft": "nvfp4"}
    assert low_precision_slots("fp8", None) == {"rollout": "fp8"}
    assert low_precision_slots("mxfp4", pool) == {"rollout": "mxfp4"}, "there are no drafts without a second drawing"


def test_a_policy_ratio_needs_rollouts_in_the_training_precision_but_not_drafts() -> None:
    with pytest.raises(ConfigError, match=r"'flow_grpo' compares .* in fp8 .* rollout.explore.precision for cheap"):
        _config("flow_grpo", precision="fp8")
    assert _config("flow_grpo", precision="bf16", explore={"precision": "fp8"}).rollout.explore is not None
    assert _config("nft", precision="fp8").rollout.precision == "fp8"


def test_what_is_drawn_again_is_in_the_training_precision() -> None:
    with pytest.raises(ConfigError, match=r"explore.precision = 'nvfp4' and rollout.precision = 'bf16', or .*false"):
        _config(precision="nvfp4", explore={})
    assert _config(precision="nvfp4", explore={"regenerate": False}).rollout.precision == "nvfp4"


@pytest.mark.parametrize(("rollout", "draft"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_drafts_share_the_weights_so_they_share_their_format_or_are_packed(rollout: str, draft: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{draft}' must be rollout.precision, '{rollout}', or below bf16"):
        _config(precision=rollout, explore={"precision": draft})
    assert _config(precision=rollout, explore={"precision": rollout}).rollout.explore is not None


def test_a_format_that_the_cpu_cannot_compute_is_refused_when_the_configuration_is_read() -> None:
    with pytest.raises(ConfigError, match=r"require_native = true, but cpu has no units for nvfp4"):
        _config(explore={"precision": "nvfp4"}, quantizer={"require_native": True})
    with pytest.raises(ConfigError, match=r'backend = "torch" cannot compute fp8 on cpu'):
        _config(precision="fp8", quantizer={"backend": "torch"})
    # On a GPU its own machine decides, and where nothing is quantised nobody does.
    on_gpu = _config(explore={"precision": "nvfp4"}, quantizer={"require_native": True}, num_gpus=1)
    assert on_gpu.rollout.quantizer.require_native
    assert _config(quantizer={"require_native": True}).rollout.quantizer.require_native


def _packed(tuning: str = "full", **rollout: Any) -> RunConfig:
    values = {"model": {"type": "sd3", "tuning": tuning}, "learner": {"publish": "packed"}, "rollout": rollout}
    return parse_config(RunConfig, values, "the test")


def test_packed_weights_are_published_only_where_rollouts_compute_with_them_and_an_adapter_is_not_less() -> None:
    assert _packed(precision="nvfp4").learner.publish == "packed"
    assert _packed(precision="mxfp4", explore={"regenerate": False}).learner.publish == "packed"
    with pytest.raises(ConfigError, match=r"'packed' is for model.tuning = 'full': .* set learner.publish = 'whole'"):
        _packed("lora", precision="nvfp4")
    with pytest.raises(ConfigError, match=r"rollout.precision is 'bf16'; set one of these, or learner.publish"):
        _packed(precision="bf16")
    with pytest.raises(ConfigError, match=r"draws the chosen samples again with, in bf16; set learner.publish"):
        _packed(precision="bf16", explore={"precision": "nvfp4"})


def test_the_parity_gate_tolerates_what_the_rollouts_format_explains_and_ignores_the_drafts() -> None:
    assert _config(precision="mxfp4").parity_tolerance == FORMAT_GAPS["mxfp4"]
    assert _config(precision="mxfp4", parity_tolerance=0.01).parity_tolerance == 0.01
    assert _config(explore={"precision": "mxfp4"}).parity_tolerance == _config().parity_tolerance < 0.01
    assert FORMAT_GAPS["fp8"] < FORMAT_GAPS["nvfp4"] < FORMAT_GAPS["mxfp4"]
