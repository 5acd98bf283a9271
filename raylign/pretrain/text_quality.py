"""How good a tiny text model is: exact answers on held-out prompts against calls of the network, and its README."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raylign.keys import generator
from raylign.pretrain.text_model import TextModel
from raylign.pretrain.text_tasks import Example, Split, distinct_examples, is_right, is_sorted
from raylign.samplers import make_token_sampler
from raylign.samplers.entropy_bounded import EntropyBoundedConfig
from raylign.samplers.low_confidence import LowConfidenceConfig
from raylign.samplers.tokens import TokenSampler

GAMMAS = (0.1, 0.5, 1.5)
"""Entropy budgets of the frontier."""


@dataclass(frozen=True, slots=True)
class Point:
    """One way of decoding: share of exact answers, of exact or descending ones, and mean calls per answer."""

    decoding: str
    exact: float
    either: float
    calls: float


@dataclass(frozen=True, slots=True)
class Quality:
    """One task, on `num_prompts` held-out prompts, one answer each at temperature 1; the first point is one by one."""

    num_prompts: int
    points: tuple[Point, ...]

    def headline(self) -> dict[str, float]:
        """The figures of decoding one token per call."""
        return {"exact": self.points[0].exact, "either": self.points[0].either}


def quality(model: TextModel, task: str, num_prompts: int, seed: int, split: Split = "heldout") -> Quality:
    """Measures a model on the first prompts of a task's prompt file."""
    instances = distinct_examples(task, split, num_prompts, "prompts")
    length = model.settings.max_canvas_length
    one_by_one = make_token_sampler(LowConfidenceConfig(), length)
    bounded = make_token_sampler(EntropyBoundedConfig(), length)
    points = [measure(model, instances, one_by_one, None, "one token per call", seed)]
    points += [measure(model, instances, bounded, gamma, f"entropy-bounded, gamma {gamma}", seed) for gamma in GAMMAS]
    return Quality(len(instances), tuple(points))


def measure(
    model: TextModel,
    instances: list[Example],
    sampler: TokenSampler,
    gamma: float | None,
    decoding: str,
    seed: int,
) -> Point:
    """One answer to each instance."""
    prompts = model.encode_prompts([instance.prompt for instance in instances])
    responses, calls_B = model.answer(prompts, sampler, generator("text_quality", seed), gamma)
    pairs = list(zip(instances, responses, strict=True))
    exact = sum(is_right(instance, response) for instance, response in pairs)
    either = sum(is_sorted(instance, response) or is_right(instance, response) for instance, response in pairs)
    return Point(decoding, exact / len(pairs), either / len(pairs), calls_B.float().mean().item())


def readme(config: Mapping[str, Any], measured: Mapping[str, Quality]) -> str:
    """What lies beside the weights: what the model is, how it was made, how good it is."""
    name = config["name"]
    made = ", ".join(f"{key} {config[key]}" for key in ("num_steps", "batch_size", "lr", "seed"))
    rows = [
        f"| {task} | {point.decoding} | {point.exact:.3f} | {point.either:.3f} | {point.calls:.2f} |"
        for task, found in measured.items()
        for point in found.points
    ]
    counts = ", ".join(f"{found.num_prompts} of {task}" for task, found in measured.items())
    return "\n".join(
        [
            f"# {name}: a tiny masked diffusion language model",
            "",
            f"Made by `raylign pretrain {name} --out DIR` ({made})",
            "on one thread and without a download. What it was taught and what is held out: `docs/text_tasks.md`.",
            "`TASK_train.jsonl` and `TASK_heldout.jsonl` are prompts with what rewards read.",
            "",
            f"Measured at temperature 1, one answer to each held-out prompt ({counts}); *either* counts sorts in",
            "descending order too, *calls* are calls of the network per answer:",
            "",
            "| task | decoding | exact | either | calls |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
