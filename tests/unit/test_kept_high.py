"""Which layers stay high: the table's rows, a user's own patterns and sizes, and what is refused."""

from __future__ import annotations

import pytest

from raylign.errors import ConfigError
from raylign.models import MODEL_FAMILIES
from raylign.precision.config import QuantizerConfig
from raylign.precision.kept_high import KEPT_HIGH, layers_to_quantise

FLUX = {
    "x_embedder": (64, 3072),
    "time_text_embed.timestep_embedder.linear_1": (256, 3072),
    "transformer_blocks.0.norm1.linear": (3072, 18432),
    "transformer_blocks.0.attn.to_q": (3072, 3072),
    "transformer_blocks.0.attn.norm_added_q": (128, 128),
    "transformer_blocks.1.attn.to_q": (3072, 3072),
    "transformer_blocks.0.ff.net.0.proj": (3072, 12288),
    "single_transformer_blocks.0.proj_out": (15360, 3072),
    "norm_out.linear": (3072, 6144),
    "proj_out": (3072, 64),
}


def test_every_model_family_has_a_row() -> None:
    assert set(KEPT_HIGH) == {config.model_fields["type"].default for config in MODEL_FAMILIES}


def test_flux_keeps_embedders_norms_and_the_last_projection() -> None:
    assert layers_to_quantise(FLUX, "flux", QuantizerConfig()) == (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.attn.to_q",
        "transformer_blocks.0.ff.net.0.proj",
        "single_transformer_blocks.0.proj_out",
    )


def test_sd3_quantises_the_feed_forward_layers_of_the_image_stream_alone() -> None:
    linears: dict[str, tuple[int, int]] = dict.fromkeys(
        ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff_context.net.2", "transformer_blocks.0.ff.net.2"),
        (1536, 1536),
    )
    assert layers_to_quantise(linears, "sd3", QuantizerConfig()) == ("transformer_blocks.0.ff.net.2",)


@pytest.mark.parametrize("prefix", ["", "remote."])
def test_a_language_model_keeps_its_output_layer_whoever_wrote_the_network(prefix: str) -> None:
    linears = {
        f"{prefix}model.transformer.blocks.0.ff_out": (12288, 4096),
        f"{prefix}model.transformer.ff_out": (4096, 126464),
        "lm_head": (4096, 126464),
    }
    assert layers_to_quantise(linears, "llada", QuantizerConfig()) == (f"{prefix}model.transformer.blocks.0.ff_out",)


def test_a_users_patterns_and_size_take_the_place_of_the_families() -> None:
    mine = QuantizerConfig(keep_high=("*attn*", "proj_out"), min_features=3072)
    # Sol-RL's sense of the size: what is no wider than it on either side stays.
    assert layers_to_quantise(FLUX, "flux", mine) == (
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.ff.net.0.proj",
        "single_transformer_blocks.0.proj_out",
        "norm_out.linear",
    )
    everything = QuantizerConfig(keep_high=())
    assert layers_to_quantise(FLUX, "flux", everything) == tuple(FLUX)


def test_a_pattern_that_matches_nothing_is_refused_with_names_that_are_near() -> None:
    with pytest.raises(
        ConfigError,
        match=r"'atn\.to_q' matches none of the 10 linear layers.*"
        r"transformer_blocks\.\*\.attn\.to_q.*mend or remove",
    ):
        layers_to_quantise(FLUX, "flux", QuantizerConfig(keep_high=("proj_out", "atn.to_q")))
    with pytest.raises(ConfigError, match=r"names are matched whole, such as .*'x_embedder'"):
        layers_to_quantise(FLUX, "flux", QuantizerConfig(keep_high=("embedder",)))


@pytest.mark.parametrize("mine", [QuantizerConfig(keep_high=("*",)), QuantizerConfig(min_features=20000)])
def test_nothing_left_to_quantise_is_refused(mine: QuantizerConfig) -> None:
    with pytest.raises(ConfigError, match=r"every one of the 10 .* \(the widest is 18432\).*min_features"):
        layers_to_quantise(FLUX, "flux", mine)
