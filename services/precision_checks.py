"""Which rollouts and drafts compute in which number format, and what is refused when a configuration is read.

Formats below bf16 are for ranking: noise drawn again in the training precision, or samples of an algorithm that asks
nothing of how they were drawn. Nothing that enters a policy ratio may come from them.
"""

from __future__ import annotations

from typing import Literal

from raylign.errors import ConfigError
from raylign.precision import Format, RolloutPrecision
from raylign.precision.config import QuantizerConfig
from raylign.precision.quantizer import make_quantizer
from raylign.types import Needs
from rollout.drawn import Slot
from rollout.explore import ExploreConfig


def low_precision_slots(precision: RolloutPrecision, explore: ExploreConfig | None) -> dict[Slot, Format]:
    """The slots that compute with a low-precision copy of the network, and its format. Evaluations never do."""
    wanted: dict[Slot, RolloutPrecision] = {"rollout": precision}
    if explore is not None and explore.regenerate:
        wanted["draft"] = explore.precision or precision
    return {slot: one for slot, one in wanted.items() if one != "fp32" and one != "bf16"}


def check_precision(
    precision: RolloutPrecision,
    explore: ExploreConfig | None,
    quantizer: QuantizerConfig,
    needs: Needs,
    algorithm: str,
    on_gpu: bool,
) -> None:
    """Raise ConfigError, with the remedy, for formats that cannot go together or that this device cannot compute.

    What a GPU can compute is only known on its own machine: rollout actors check it when they start.
    """
    slots = low_precision_slots(precision, explore)
    if "rollout" in slots and Needs.LOGPROBS in needs:
        raise ConfigError(
            f"algorithm {algorithm!r} compares the rollouts' log-probs with the learner's, and in {precision} they are "
            "another policy's; set rollout.precision = 'bf16' or 'fp32', and rollout.explore.precision for cheap drafts"
        )
    if explore is not None:
        _check_drafts(precision, explore)
    if not on_gpu:
        for format_name in slots.values():
            make_quantizer(format_name, quantizer, "cpu")


def check_packed_publication(
    tuning: Literal["lora", "full"], precision: RolloutPrecision, explore: ExploreConfig | None
) -> None:
    """Raise ConfigError where `learner.publish = "packed"` has nothing to pack, or nothing to save."""
    if tuning == "lora":
        raise ConfigError(
            "learner.publish = 'packed' is for model.tuning = 'full': with a LoRA the adapter travels, which is less "
            "than packed weights; set learner.publish = 'whole'"
        )
    if precision not in ("fp32", "bf16"):
        return
    if explore is not None and explore.regenerate:
        raise ConfigError(
            f"learner.publish = 'packed' leaves out the weights that rollout.explore draws the chosen samples again "
            f"with, in {precision}; set learner.publish = 'whole' or 'delta'"
        )
    raise ConfigError(
        f"learner.publish = 'packed' sends what rollouts compute with in 'fp8', 'nvfp4' or 'mxfp4', and "
        f"rollout.precision is {precision!r}; set one of these, or learner.publish = 'whole' or 'delta'"
    )


def _check_drafts(precision: RolloutPrecision, explore: ExploreConfig) -> None:
    wanted = explore.precision or precision
    if not explore.regenerate:
        if wanted != precision:
            raise ConfigError(
                f"with rollout.explore.regenerate = false the pool is drawn as rollouts are, in {precision}, so "
                f"explore.precision = {wanted!r} has no use; set rollout.precision instead, or remove it"
            )
        return
    if precision not in ("fp32", "bf16"):
        raise ConfigError(
            f"rollout.explore draws the chosen samples again in the training precision, but rollout.precision is "
            f"{precision!r}; set rollout.explore.precision = {precision!r} and rollout.precision = 'bf16', or "
            "rollout.explore.regenerate = false to train on the drafts themselves"
        )
    if wanted in ("fp32", "bf16") and wanted != precision:
        raise ConfigError(
            f"drafts share their weights with rollouts, so rollout.explore.precision = {wanted!r} must be "
            f"rollout.precision, {precision!r}, or below bf16: 'fp8', 'nvfp4' or 'mxfp4'"
        )
