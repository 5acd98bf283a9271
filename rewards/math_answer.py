"""The math reward: does the completion's final answer equal the right one?

verify: 1 or 0 by Math-Verify (github.com/huggingface/Math-Verify), gold first. One answer is chosen before it is
called, because it merges several boxes into one set: the last `\\boxed{}`, else the last `<answer>` block. An answer
that is no final answer (over 512 characters, towers of powers, huge exponents or factorials) is 0 without a look.
A comparison that does not end in time is an error and no number.

gsm8k: the published sum for GSM8K (diffu-grpo/reward_func.py of dllm-reasoning/d1): 2 if the text behind the last
`<answer>` equals the gold literally, 0.5 if it is all digits, and the three form rewards of `format_tags` (0.5 each at
most). With a gold of "42" and a perfect form that is 4; text without an end tag can go below 0.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Literal

from pydantic import Field

from raylign.errors import ConfigError, PromptError
from raylign.types import Prompt, RewardSample, RewardScore
from rewards.base import Modality, RewardConfig
from rewards.format_tags import d1_parts
from rewards.isolation.worker_pool import WorkerDiedError, WorkerPool, WorkerTimeoutError
from rewards.text.answers import after_last_tag, last_answer, last_boxed
from rewards.text.rule import NoVerdict, Verdict, score_texts, shown, verdict

logger = logging.getLogger(__name__)

RULE_VERSION = "2"
MAX_CHARS = 512
MAX_EXPONENT_DEPTH = 2
"""e^{x^{2}} is that deep."""
_GATES = {
    # 9^{9^9}, 9**9**9, 2^(3^{4…: a power of numbers in an exponent
    "power_tower": re.compile(r"(?:\^|\*\*)[\s{(]*\d+[\s})]*(?:\^|\*\*)"),
    "huge_exponent": re.compile(r"(?:\^|\*\*)[\s{(]*-?[\s{(]*\d{5,}"),
    "huge_factorial": re.compile(r"\d{5,}[\s})]*!|![\s})]*!"),
}
"""What is no final answer, by name."""


class MathAnswerConfig(RewardConfig):
    """Whether the final answer to a mathematical problem is right."""

    type: Literal["math_answer"] = "math_answer"
    mode: Literal["verify", "gsm8k"] = "verify"
    """verify: 1 or 0 by Math-Verify. gsm8k: the published sum of correctness and form, for comparison."""
    num_workers: int = Field(default=2, ge=1, le=64)
    """verify: processes that compare; each takes about 100 MB."""
    timeout_s: float = Field(default=5.0, gt=0, le=60)
    """verify: a comparison that takes longer is an error."""


class MathAnswerReward:
    """Compares with the prompt's `answer`, or with the sample's reference when it has none."""

    modality: Modality = "text"
    higher_is_better = True
    deterministic = True
    uses_seed = False
    fingerprint = ""
    metadata_keys: Mapping[str, str] = {
        "answer": "the right answer: a number, LaTeX, or a worked solution that ends in \\boxed{} or in `#### 42`"
    }

    def __init__(self, config: MathAnswerConfig) -> None:
        """Raises ConfigError when mode = "verify" and Math-Verify is not installed."""
        self.name = config.name
        self._mode = config.mode
        self._timeout_s = config.timeout_s
        self.range: tuple[float, float] | None = (0.0, 1.0) if config.mode == "verify" else None
        self.version = f"{RULE_VERSION}/{config.mode}"
        if config.mode == "verify":
            self.version += f"/math-verify-{_math_verify_version()}"
        self._threads = ThreadPoolExecutor(config.num_workers, thread_name_prefix=f"{config.name}-math")
        # -P: the worker's own folder, with this package's modules in it, must not come before the library's.
        command = [sys.executable, "-P", str(Path(__file__).parent / "isolation" / "math_worker.py")]
        self._pool = WorkerPool(command, config.num_workers)

    def load(self) -> None:
        if self._mode == "verify":
            self._pool.warm()

    def probe(self) -> RewardSample:
        return RewardSample("probe", Prompt("probe", "", {"answer": "1/2"}), text="\\boxed{0.5}")

    def check(self, prompt: Prompt) -> None:
        self._gold(prompt, None)

    def close(self) -> None:
        """End the worker processes; also happens when the reward is dropped."""
        self._pool.close()

    async def score(self, samples: Sequence[RewardSample]) -> list[RewardScore]:
        if self._mode == "gsm8k":
            return await score_texts(self, samples, self._judge_gsm8k)
        return await score_texts(self, samples, self._judge_verify, self._threads)

    def _judge_gsm8k(self, sample: RewardSample, text: str) -> Verdict:
        parts = gsm8k_parts(self._gold(sample.prompt, sample.reference), text)
        return Verdict(
            sum(parts.values()), {"answer": shown(after_last_tag(text)), "exact": parts["correct"] > 0, **parts}
        )

    def _judge_verify(self, sample: RewardSample, text: str) -> Verdict | NoVerdict:
        gold, answer = self._gold(sample.prompt, sample.reference), final_answer(text)
        if answer is None:
            return verdict(0.0, None, "no_answer", exact=False)
        if answer == gold:
            return verdict(1.0, answer, "identical", exact=True)
        refused = refusal(answer)
        if refused is not None:
            return verdict(0.0, answer, refused, exact=False)
        try:
            found = self._pool.call({"gold": gold, "answer": answer}, self._timeout_s)
        except WorkerTimeoutError:
            return NoVerdict("timeout", f"the answers could not be compared within {self._timeout_s} s")
        except WorkerDiedError:
            logger.exception("reward %r: a math worker died on sample %r", self.name, sample.id)
            return NoVerdict("model_error", "the answers could not be compared; see the scorer's log for this sample")
        if not found["gold_readable"]:
            return NoVerdict("invalid_input", "metadata.answer is no mathematical expression and no literal match")
        if not found["answer_readable"]:
            return verdict(0.0, answer, "unreadable", exact=False)
        correct = bool(found["correct"])
        return verdict(float(correct), answer, "equal" if correct else "different", exact=correct)

    def _gold(self, prompt: Prompt, reference: str | None) -> str:
        """The right answer. Raises PromptError."""
        given = prompt.metadata.get("answer", reference)
        if isinstance(given, bool) or not isinstance(given, str | int | float):
            raise PromptError(
                f"prompt {prompt.id!r} has metadata.answer {str(given)[:80]!r}; it must be a text or number"
            )
        gold = gold_answer(str(given))
        refused = refusal(gold) if self._mode == "verify" else None
        if not gold or refused is not None:
            raise PromptError(
                f"prompt {prompt.id!r} has metadata.answer {gold[:80]!r}, which is no final answer "
                f"({refused or 'empty'}); give a number, LaTeX, or a solution that ends in \\boxed{{}} or #### 42"
            )
        return gold


def final_answer(text: str) -> str | None:
    """The content of the last box, else the last `<answer>` block without dollar signs around it; None without."""
    boxed = last_boxed(text)
    answer = boxed if boxed is not None else last_answer(text)
    return None if answer is None else _bare(answer)


def gold_answer(given: str) -> str:
    """The final answer of a gold: of a worked solution, what follows `####`, or its last box."""
    if "####" in given:
        return given.rpartition("####")[2].strip()
    boxed = last_boxed(given)
    return _bare(boxed if boxed is not None else given)


def refusal(answer: str) -> str | None:
    """Why a text is no final answer, by name; None if it may be one."""
    if len(answer) > MAX_CHARS:
        return "too_long"
    if exponent_depth(answer) > MAX_EXPONENT_DEPTH:
        return "deep_exponent"
    return next((name for name, pattern in _GATES.items() if pattern.search(answer)), None)


def exponent_depth(answer: str) -> int:
    """How many bracketed exponents are open at once at most."""
    deepest = 0
    brackets: list[bool] = []
    exponent = False
    for piece in re.findall(r"\^|\*\*|[{(})]|[^\s^*{(})]+|\*", answer):
        if piece in ("{", "("):
            brackets.append(exponent)
            deepest = max(deepest, sum(brackets))
        elif piece in ("}", ")") and brackets:
            brackets.pop()
        exponent = piece in ("^", "**")
    return deepest


def gsm8k_parts(gold: str, text: str) -> dict[str, float]:
    """The published parts by name: correct, integer, strict, soft, xml."""
    answer = after_last_tag(text)
    return {"correct": 2.0 * (answer == gold), "integer": 0.5 * answer.isdigit(), **d1_parts(text)}


def _bare(answer: str) -> str:
    """Without white space and dollar signs around it."""
    return answer.strip().strip("$").strip()


def _math_verify_version() -> str:
    try:
        return metadata.version("math-verify")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            "reward 'math_answer' needs Math-Verify, which is not installed; pip install math-verify"
        ) from None
