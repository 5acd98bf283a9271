"""What stands between a judge and the text it judges: that text is written by the policy, and wants a high score.

Control tokens and headers of our own prompts are taken out before templating, so that a candidate cannot end its
section and begin another. Texts that say nothing are told apart before the judge is asked, because bare openers and
punctuation are known to earn good marks (One Token to Fool LLM-as-a-Judge, arXiv 2507.08794).
"""

from __future__ import annotations

import re
import unicodedata

_CONTROL_TOKENS = re.compile(
    r"<[|\uFF5C][^<>\n]{1,60}?[|\uFF5C]>"  # as <|im_start|>, <|vision_pad|>; DeepSeek has full-width bars
    r"|</?(?:think|thinking|s|bos|eos|image|video|tool_call|tool_response|start_of_turn|end_of_turn|start_of_image)>"
    r"|</?candidate(?:_[12])?>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|IMG|IMG_BREAK|IMG_END)\]"
    r"|<</?SYS>>",
    re.IGNORECASE,
)
"""Qwen, Llama, Mistral, Gemma and DeepSeek chat markup, thinking tags, and our own delimiters."""
_SECTION_HEADERS = re.compile(
    r"^[^\S\n]*#{1,6}[^\S\n]*"
    r"(?:TASK|INPUT(?: \([^)\n]*\))?|RESPONSE(?: [12])?|EVALUATION RUBRIC|OUTPUT FORMAT|EVALUATION"
    r"|INSTRUCTION|RESPONSE FORMAT|ASSISTANT [AB]|YOUR RESPONSE)"
    r"[^\S\n]*:?[^\S\n]*$",
    re.IGNORECASE | re.MULTILINE,
)
_KEPT_CONTROLS = "\n\t\u200c\u200d"
"""Line break, tab, and the two joiners that Persian, Hindi and emoji are spelt with."""
_LINE_BREAKS = re.compile("\r\n?|[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_OPENERS = frozenset(
    """answer|final answer|the answer is|solution|the solution is|explanation|reasoning|analysis|thought|thoughts
    |thought process|chain of thought|lets think|lets think step by step|lets solve this problem step by step
    |let me think|let me think step by step|let me solve this|step 1|step by step|assistant|response
    |respuesta|antwort|lösung|réponse|解|解答|答案|かいせつ|解説""".replace("\n    ", "").split("|")
)


def sanitise(text: str) -> str:
    """The text without chat markup, without the headers of our prompts and without control characters.

    What goes is replaced by a space, so that the rest cannot close up into a new token.
    """
    text = _LINE_BREAKS.sub("\n", text)
    text = "".join(c for c in text if c in _KEPT_CONTROLS or unicodedata.category(c) not in ("Cc", "Cf"))
    return _SECTION_HEADERS.sub(" ", _CONTROL_TOKENS.sub(" ", text))


def hollow(text: str) -> str | None:
    """Why a text says nothing ("empty", "symbols only", "opener only"), or None if it may say something."""
    text = sanitise(text).strip()
    if not text:
        return "empty"
    words = "".join(c if c.isalnum() or c.isspace() else "" for c in text.casefold()).split()
    if not words:
        return "symbols only"
    return "opener only" if " ".join(words) in _OPENERS else None


def delimit(text: str, tag: str = "candidate") -> str:
    """Sanitised text between tags that it cannot hold itself."""
    return f"<{tag}>\n{text}\n</{tag}>"
