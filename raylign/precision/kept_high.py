"""Which linear layers stay in high precision when a network is quantised: a table by model family, or the user's own.

What is never quantised is not in the table: attention's own products, norms, convolutions, VAE and text encoders.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from raylign.errors import ConfigError
from raylign.precision.config import QuantizerConfig

_SHOWN_NAMES = 4


@dataclass(frozen=True, slots=True)
class KeptHigh:
    """Layers whose full name matches a pattern, or that are no wider than `min_features` on either side."""

    patterns: tuple[str, ...]
    min_features: int = 0


# Sol-RL (configs/sol_rl) skips by name and by size, max(in, out) <= min_dim, which is meant for its own models:
# SANA-1.6B 2240, SD3.5-L 2432, FLUX 1000. Here a width that it singles out is written as a name, so that smaller models
# of the family, the tiny ones included, are treated alike. Beyond Sol-RL, the linear layers of adaptive norms and the
# last projection stay high everywhere: they work on one vector per sample or on a few channels, and cost nothing.
KEPT_HIGH: dict[str, KeptHigh] = {
    # In effect the feed-forward layers of the image stream: all of SD3.5-L's attention is 2432 wide.
    "sd3": KeptHigh(("*embed*", "*norm*", "*attn*", "*ff_context*", "proj_out")),
    "flux": KeptHigh(("*embed*", "*norm*", "proj_out")),
    # The feed-forward layers are convolutions. With 2240 only the text's keys and values would be left, as one layer.
    "sana": KeptHigh(("*embed*", "caption_projection*", "*attn1.to_[qkv]", "proj_out")),
    # No published setting: as FLUX.
    "sd15": KeptHigh(("*emb*",)),
    "sdxl": KeptHigh(("*emb*",)),
    # The output layer by the native network's name and by the checkpoint code's; a mixture's router, where it has one.
    "llada": KeptHigh(("*lm_head", "*transformer.ff_out", "*.mlp.gate")),
    "dream": KeptHigh(("*lm_head", "*.mlp.gate")),
    "tiny_text": KeptHigh(("*lm_head",)),
}


def layers_to_quantise(linears: Mapping[str, tuple[int, int]], family: str, config: QuantizerConfig) -> tuple[str, ...]:
    """The names in `linears`, which maps every linear layer to (in features, out features), that are not kept high.

    `config` replaces the patterns or the size of the family's row. Raises ConfigError for a pattern of `config` that
    matches no layer, or when no layer is left.
    """
    row = KEPT_HIGH[family]
    patterns = row.patterns if config.keep_high is None else config.keep_high
    min_features = row.min_features if config.min_features is None else config.min_features
    for pattern in config.keep_high or ():
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ConfigError(
                f"rollout.quantizer.keep_high: {pattern!r} matches none of the {len(linears)} linear layers; names are "
                f"matched whole, such as {_near(pattern, linears)}; mend or remove the pattern"
            )
    named = [name for name in linears if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    chosen = tuple(name for name in named if max(linears[name]) > min_features)
    if not chosen:
        widest = max((max(sizes) for sizes in linears.values()), default=0)
        raise ConfigError(
            f"every one of the {len(linears)} linear layers stays in high precision, by patterns {list(patterns)} or "
            f"because it is no wider than min_features = {min_features} (the widest is {widest}); change "
            "rollout.quantizer.keep_high or min_features, or set the precision to 'bf16'"
        )
    return chosen


def _near(pattern: str, names: Mapping[str, tuple[int, int]]) -> str:
    """A few names close to a pattern, blocks of one kind shown once."""
    kinds = {re.sub(r"\.\d+\.", ".*.", name): name for name in reversed(list(names))}
    bare = pattern.strip("*")
    near = difflib.get_close_matches(bare, kinds, _SHOWN_NAMES, cutoff=0.0)
    inside = [kind for kind in kinds if bare and bare.lower() in kind.lower()]
    return ", ".join(repr(kind) for kind in dict.fromkeys([*inside, *near][:_SHOWN_NAMES]))
