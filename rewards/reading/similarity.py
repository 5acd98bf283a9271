"""How alike two texts are, as the OCR reward sees it. Pure functions on strings; the engine is elsewhere.

`flow_grpo_similarity` is bug-compatible with flow_grpo/ocr.py (also in DiffusionNFT and AWM), so that published
curves can be compared: a target that occurs anywhere in the recognised text scores 1, however much else there is.
`clean_similarity` closes that door: surplus text costs as much as missing text.
"""

from __future__ import annotations

import re
import unicodedata

_CURLY = str.maketrans({"“": '"', "”": '"', "„": '"', "‟": '"'})


def quoted_target(text: str, curly: bool) -> str | None:
    """What stands between the first pair of double quotes, or None without a pair.

    `curly` accepts typographic quotes like straight ones; flow_grpo does not.
    """
    found = re.search(r'"([^"]*)"', text.translate(_CURLY) if curly else text)
    return found.group(1) if found else None


def normalise_flow_grpo(text: str) -> str:
    """Lower case without U+0020; other white space stays."""
    return text.replace(" ", "").lower()


def normalise_clean(text: str) -> str:
    """NFKC, case folded, without white space, punctuation and control characters."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(c for c in folded if not c.isspace() and unicodedata.category(c)[0] not in "PZC")


def flow_grpo_similarity(target: str, recognised: str) -> float:
    """1 - min(d, len t) / len t with d = 0 if t occurs in r, else the edit distance: in [0, 1].

    Raises ValueError for a target that is empty after normalising.
    """
    t, r = normalise_flow_grpo(target), normalise_flow_grpo(recognised)
    if not t:
        raise ValueError(f"target {target!r} is empty without its spaces")
    distance = 0 if t in r else edit_distance(t, r)
    return 1.0 - min(distance, len(t)) / len(t)


def clean_similarity(target: str, recognised: str) -> float:
    """1 - d / max(len r, len t) with the edit distance d: in [0, 1], and 1 only for equal normalised texts.

    Raises ValueError for a target that is empty after normalising.
    """
    t, r = normalise_clean(target), normalise_clean(recognised)
    if not t:
        raise ValueError(f"target {target!r} is empty without white space and punctuation")
    return 1.0 - edit_distance(t, r) / max(len(t), len(r))


def exact(target: str, recognised: str) -> bool:
    """Whether the cleanly normalised texts are equal and not empty, whatever mode scores them."""
    t = normalise_clean(target)
    return bool(t) and t == normalise_clean(recognised)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions cost 1. O(len a * len b)."""
    row = list(range(len(b) + 1))
    for i, char_a in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, char_b in enumerate(b, start=1):
            substituted = previous + (char_a != char_b)
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, substituted)
    return row[-1]
