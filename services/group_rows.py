"""Groups as plain rows for the record: what people are shown of a prompt, its siblings, their scores and credit. Pure.

Prompts, answers and what judges wrote come from outside and are kept as they are, shortened; whoever shows them escapes
them. Numbers that are not finite are null.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylign.types import JsonValue, RewardScore, Rollout, RolloutGroup, RolloutStatus, TokenTrajectory, WeightVersion
from services.frontier import budget_of

if TYPE_CHECKING:
    import numpy as np

MAX_TEXT = 4000
"""Characters kept of a prompt, an answer, or one of a judge's."""
MAX_DETAILS = 40
"""Entries kept of one list or table of a score's details."""
_MAX_DEPTH = 4
_LOSSLESS_PIXELS = 96 * 96
_QUALITY = 82

Credit = Sequence[Sequence[float | None]]


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows, and the encoded pictures that they point into."""

    groups: list[dict[str, Any]]
    pictures: bytes


class PictureBook:
    """Pictures, encoded and laid end to end."""

    def __init__(self, largest_side: int) -> None:
        self._largest_side = largest_side
        self._parts: list[bytes] = []
        self._length = 0

    def add(self, image_HWC: np.ndarray) -> list[int]:
        """Where the picture lies: offset, length, width, height as it was drawn."""
        data = encode_picture(image_HWC, self._largest_side)
        place = [self._length, len(data), int(image_HWC.shape[1]), int(image_HWC.shape[0])]
        self._parts.append(data)
        self._length += len(data)
        return place

    def bytes(self) -> bytes:
        return b"".join(self._parts)


def pack_groups(
    groups: Sequence[RolloutGroup], credit: Credit | None, newest: WeightVersion | None, largest_side: int
) -> Packed:
    """Groups as rows. `credit` is each sibling's, None where nothing was credited (held-out groups).

    `newest` is the version that the step trained from: ages count from it; None where nothing has an age.
    """
    book = PictureBook(largest_side)
    rows: list[dict[str, Any]] = []
    for place, group in enumerate(groups):
        advantages = credit[place] if credit is not None else [None] * group.group_size
        samples = [_sample(group, row, advantages[row], newest, book) for row in range(group.group_size)]
        rows.append(
            {
                "prompt": {"id": short(group.prompt.id), "text": short(group.prompt.text)},
                "metadata": plain(group.prompt.metadata),
                "visit": group.visit,
                "sequence": group.sequence,
                "seconds": plain(group.seconds),
                "samples": samples,
                **_drafts(group, book),
            }
        )
    return Packed(rows, book.bytes())


def failure_rows(step: int, kind: str, groups: Sequence[RolloutGroup], most: int) -> list[dict[str, Any]]:
    """The samples without a reward, by what failed; at most so many, one of each kind first."""
    found: list[dict[str, Any]] = []
    for group in groups:
        for row, rollout in enumerate(group.rollouts):
            if rollout.status is not RolloutStatus.OK:
                told = {"step": step, "record": kind, "prompt": short(group.prompt.text, 300), **cause_of(rollout)}
                text = None if group.texts is None else short(group.texts[row], 300)
                found.append({**told, "key": list(rollout.key), "sample": rollout.key.sample_index, "text": text})
    seen: set[tuple[str, str]] = set()
    first: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for one in found:
        name = (str(one["kind"]), str(one["reward"]))
        (others if name in seen else first).append(one)
        seen.add(name)
    return (first + others)[:most]


def cause_of(rollout: Rollout) -> dict[str, Any]:
    """What failed of a sample: the kind (a wire status, or the phase), which reward, and its words."""
    if rollout.status is RolloutStatus.GENERATION_FAILED or rollout.reward is None:
        return {"kind": str(rollout.status), "reward": "", "message": ""}
    for score in rollout.reward.scores:
        if score.error is not None:
            return {"kind": score.error.code, "reward": score.name, "message": short(score.error.message, 600)}
    failure = rollout.reward.failure
    kind, message = (failure.code, failure.message) if failure else (str(rollout.status), "")
    return {"kind": kind, "reward": "", "message": short(message, 600)}


def short(text: str, most: int = MAX_TEXT) -> str:
    """The text, cut with a sign that it was. Lone surrogates, which no file takes, are replaced."""
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return clean if len(clean) <= most else f"{clean[:most]} … ({len(clean) - most:,} more characters)"


def plain(value: Any, depth: int = 0) -> JsonValue:
    """A value of details or metadata as bounded JSON."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return short(value)
    if depth >= _MAX_DEPTH:
        return "…"
    if isinstance(value, Mapping):
        return {short(str(name), 200): plain(one, depth + 1) for name, one in list(value.items())[:MAX_DETAILS]}
    if isinstance(value, (list, tuple)):
        return [plain(one, depth + 1) for one in value[:MAX_DETAILS]]
    return short(str(value))


def encode_picture(image_HWC: np.ndarray, largest_side: int) -> bytes:
    """WebP: small pictures without loss, large ones scaled down and with some."""
    from PIL import Image

    picture = Image.fromarray(image_HWC)
    if max(picture.size) > largest_side:
        picture.thumbnail((largest_side, largest_side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    lossless = picture.width * picture.height <= _LOSSLESS_PIXELS
    picture.save(file, "WEBP", lossless=lossless, quality=40 if lossless else _QUALITY, method=0 if lossless else 2)
    return file.getvalue()


def _sample(
    group: RolloutGroup, row: int, advantage: float | None, newest: WeightVersion | None, book: PictureBook
) -> dict[str, Any]:
    rollout, reward = group.rollouts[row], group.rollouts[row].reward
    sample: dict[str, Any] = {
        "index": rollout.key.sample_index,
        "key": list(rollout.key),
        "status": str(rollout.status),
        "versions": [rollout.min_version, rollout.max_version],
        "age": None if newest is None else newest - rollout.min_version,
        "total": reward.total if reward is not None else None,
        "advantage": advantage,
        "scores": [] if reward is None else _scores(reward.scores, reward.weights),
    }
    if rollout.status is not RolloutStatus.OK:
        sample["failure"] = cause_of(rollout)
    if group.images_GHWC is not None:
        sample["picture"] = book.add(group.images_GHWC[row])
    if group.texts is not None:
        sample["text"] = short(group.texts[row])
    if isinstance(group.trajectory, TokenTrajectory):
        sample["nfe"] = int(group.trajectory.nfe_G[row])
        budgets = group.trajectory.log_gamma_G
        sample["gamma"] = None if budgets is None else plain(budget_of(float(budgets[row])))
    return sample


def _scores(scores: Sequence[RewardScore], weights: Sequence[float]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for place, score in enumerate(scores):
        row: dict[str, Any] = {"name": score.name, "value": score.value, "seconds": round(score.seconds, 4)}
        row["weight"] = weights[place] if place < len(weights) else None
        if score.error is not None:
            row["error"] = {"code": score.error.code, "message": short(score.error.message)}
        if score.details:
            row["details"] = plain(score.details)
        rows.append(row | {"version": score.version, "cache": score.cache})
    return rows


def _drafts(group: RolloutGroup, book: PictureBook) -> dict[str, Any]:
    """What was drafted and which of it was chosen, where siblings come from drafts."""
    seen = group.exploration
    if seen is None:
        return {}
    chosen = {rollout.key.sample_index for rollout in group.rollouts}
    drafts: list[dict[str, Any]] = []
    for place, (index, total) in enumerate(zip(seen.indices, seen.totals, strict=True)):
        draft: dict[str, Any] = {"index": index, "total": total, "chosen": index in chosen}
        if seen.images_NHWC is not None:
            draft["picture"] = book.add(seen.images_NHWC[place])
        drafts.append(draft)
    return {"drafts": drafts, "redrawn": seen.redrawn}
