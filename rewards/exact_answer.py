"""The exact-answer reward: is the response the prompt's `answer`, token for token?

exact: 1 or 0. share: the fraction of positions that agree, over the longer of the two, so that nothing is gained by
writing less or more. repeated: likewise the fraction of positions that hold the right answer's first word or
character, which is wrong on purpose. Positions are words where the right answer has several of them, else characters.
White space around and between words does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from raylign.errors import PromptError
from raylign.types import Prompt, RewardSample, RewardScore
from rewards.base import Modality, RewardConfig
from rewards.text.answers import AnswerIn, find_answer
from rewards.text.rule import Verdict, score_texts, verdict

Mode = Literal["exact", "share", "repeated"]
RULE_VERSION = "1"


class ExactAnswerConfig(RewardConfig):
    """Whether the response is the right answer, letter for letter."""

    type: Literal["exact_answer"] = "exact_answer"
    mode: Mode = "exact"
    """exact: 1 or 0. share: the fraction of positions that are right. repeated: wrong on purpose, it pays for the first
    one over and over, to show what a guard against reward hacking sees."""
    answer_in: AnswerIn = "text"
    """text: the whole response. tag: the last `<answer>` block."""


class ExactAnswerReward:
    """Compares the response with the prompt's `answer`, or with the sample's reference when it has none."""

    modality: Modality = "text"
    range: tuple[float, float] | None = (0.0, 1.0)
    higher_is_better = True
    deterministic = True
    uses_seed = False
    fingerprint = ""
    metadata_keys: Mapping[str, str] = {"answer": "the right answer: a text or a whole number"}

    def __init__(self, config: ExactAnswerConfig) -> None:
        self.name = config.name
        self._mode: Mode = config.mode
        self._answer_in: AnswerIn = config.answer_in
        self.version = f"{RULE_VERSION}/{config.mode}/{config.answer_in}"

    def load(self) -> None:
        """Nothing to build."""

    def probe(self) -> RewardSample:
        return RewardSample("probe", Prompt("probe", "", {"answer": "42"}), text="<answer>42</answer>")

    def check(self, prompt: Prompt) -> None:
        read_answer(prompt, None)

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        return await score_texts(self, samples, self._judge)

    def _judge(self, sample: RewardSample, text: str) -> Verdict:
        return judge(read_answer(sample.prompt, sample.reference), text, self._mode, self._answer_in)


def read_answer(prompt: Prompt, reference: str | None) -> str:
    """The right answer. Raises PromptError."""
    given = prompt.metadata.get("answer", reference)
    if isinstance(given, bool) or not isinstance(given, str | int) or not str(given).strip():
        raise PromptError(
            f"prompt {prompt.id!r} has metadata.answer {str(given)[:80]!r}; exact_answer needs a text that is not "
            "blank, or a whole number"
        )
    return str(given)


def judge(right: str, text: str, mode: Mode = "exact", answer_in: AnswerIn = "text") -> Verdict:
    """Agreement of the answer in `text` with the right one, in [0, 1]; `exact` in the details whatever the mode."""
    answer = find_answer(text, answer_in)
    if answer is None:
        return verdict(0.0, None, "no_answer", exact=False)
    wanted, given = right.split(), answer.split()
    if len(wanted) == 1:
        wanted, given = list(wanted[0]), list("".join(given))
    exact = wanted == given
    if mode == "repeated":
        wanted = wanted[:1] * len(wanted)
    num_right = sum(one == other for one, other in zip(wanted, given, strict=False))
    value = float(exact) if mode == "exact" else num_right / max(len(wanted), len(given))
    return verdict(value, answer, "correct" if exact else "different", exact=exact)
