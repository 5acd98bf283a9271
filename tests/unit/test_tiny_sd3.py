"""The tiny SD3 pipeline: built from nothing, and the trained one that is shipped."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import raylign
from raylign.models.tiny_sd3 import TinySD3Config, build_tiny_sd3
from raylign.pretrain import glyph_pictures as pictures
from raylign.pretrain.flow_training import encode_tokens, tokenize
from raylign.pretrain.glyphs import GlyphsConfig, GlyphsStage, pretrain
from raylign.pretrain.null_tokens import train_with_null_tokens
from raylign.pretrain.shards import ShardedBackward

GLYPHS = Path(raylign.__file__).parent / "assets" / "glyphs"
SMALL = TinySD3Config(num_layers=2, num_heads=2, head_dim=16, text_dim=32)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(seed: int = 0, config: TinySD3Config = SMALL):
    return build_tiny_sd3(pictures.TEMPLATE_WORDS, pictures.CHARACTERS, seed, config)


def load(directory: Path):
    from diffusers import StableDiffusion3Pipeline

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipe = StableDiffusion3Pipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def shipped():
    return load(GLYPHS)


def states_of(pipe, prompts: list[str], num_null: int):
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(
            prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=num_null
        )
    assert states is not None
    assert pooled is not None
    return states, pooled


def test_the_seed_decides_the_weights() -> None:
    one, same, other = (build(seed).text_encoder.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build()
    assert torch.equal(torch.rand(3), expected)


def test_a_new_transformer_is_the_zero_function() -> None:
    pipe = build()
    states, pooled = states_of(pipe, ["a red sign"], 1)
    with torch.no_grad():
        velocity = pipe.transformer(
            hidden_states=torch.randn(1, SMALL.latent_channels, 6, 20),
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=torch.tensor([500.0]),
        ).sample
    assert torch.count_nonzero(velocity) == 0


@pytest.mark.parametrize("target", ["HAT", "ONION", "40732", "SINGS"])
def test_targets_are_spelt_and_template_words_are_whole(target: str) -> None:
    tokenizer = build().tokenizer
    for template in range(len(pictures.TEMPLATES)):
        prompt = pictures.prompt_for(target, "orange", template)
        tokens = tokenizer.tokenize(prompt)
        quotes = [i for i, token in enumerate(tokens) if token.startswith('"')]
        spelt = [token.removesuffix("</w>") for token in tokens[quotes[0] + 1 : quotes[1]]]
        assert spelt == list(target.lower())
        assert "orange" in tokens
        assert len(tokenizer(prompt).input_ids) <= TinySD3Config().max_prompt_tokens


def test_training_encodes_prompts_as_the_pipeline_does() -> None:
    pipe, prompts = build(), ['a red sign that says "KITE"', "", "a very long sentence that does not fit at all"]
    states, pooled = states_of(pipe, prompts, 1)
    with torch.no_grad():
        ours, ours_pooled = encode_tokens(pipe, tokenize(pipe, prompts))
    assert torch.equal(ours, states)
    assert torch.equal(ours_pooled, pooled)


@pytest.mark.parametrize("num_null", [1, 7, 256])
def test_one_counted_null_token_stands_for_many(num_null: int, shipped) -> None:
    prompts = ['a red sign that says "KITE"', 'the number "407" on a grey wall']
    noise = torch.randn(2, shipped.transformer.config.in_channels, 6, 20, generator=torch.Generator().manual_seed(0))
    args = {"hidden_states": noise, "timestep": torch.tensor([900.0, 300.0]), "return_dict": False}

    def velocity(count: int) -> torch.Tensor:
        states, pooled = states_of(shipped, prompts, count)
        with torch.no_grad():
            return shipped.transformer(**args, encoder_hidden_states=states, pooled_projections=pooled)[0]

    expected = velocity(num_null)
    with train_with_null_tokens(shipped.transformer, num_null) as set_num_null_tokens:
        for processor in shipped.transformer.attn_processors.values():
            set_num_null_tokens(torch.Generator().manual_seed(0))
            processor.num_null_tokens = float(num_null)
        assert torch.allclose(velocity(1), expected, atol=2e-4)
    assert torch.equal(velocity(num_null), expected)  # the stock processor is back


def test_sharded_gradients_are_those_of_the_whole_batch() -> None:
    layer, unused = torch.nn.Linear(3, 1), torch.nn.Parameter(torch.ones(2))
    parameters = [*layer.parameters(), unused]
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    backward = ShardedBackward(parameters, num_shards=2)
    loss = backward(lambda shard: layer(x.chunk(2)[shard]).square().mean())
    whole = layer(x).square().mean()
    expected = torch.autograd.grad(whole, list(layer.parameters()))
    assert loss == pytest.approx(whole.item(), rel=1e-6)
    for parameter, gradient in zip(parameters, (*expected, torch.zeros(2)), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradient)


def test_pretraining_is_reproducible_reports_progress_and_saves_a_pipeline(tmp_path: Path) -> None:
    stage = GlyphsStage(name="only", num_steps=3, lr=1e-3, lr_end=1e-4, warmup_steps=2, flawed_share=0.5)
    config = GlyphsConfig(batch_size=4, vae_steps=2, model=SMALL, stages=(stage,))
    seen: list[tuple[str, int, int]] = []
    first = pretrain(tmp_path / "one", config, lambda name, step, total, _: seen.append((name, step, total)))
    second = pretrain(tmp_path / "two", config)
    assert seen == [("vae", 1, 2), ("vae", 2, 2), ("only", 1, 3), ("only", 3, 3)]
    assert first["only_loss"] == second["only_loss"]
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "one" / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()
    assert load(tmp_path / "one").transformer.dtype == torch.float32
    assert len((tmp_path / "one" / "prompts_heldout.txt").read_text().splitlines()) == 64


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="num_step"):
        GlyphsStage(name="x", num_step=3, lr=1e-3, lr_end=1e-3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="frozen"):
        GlyphsConfig().seed = 3  # type: ignore[misc]


def test_shipped_directory_is_small_and_holds_no_pickle() -> None:
    files = [path for path in GLYPHS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
    assert "torch_dtype" not in json.loads((GLYPHS / "transformer" / "config.json").read_text())


def test_shipped_pipeline_draws_a_picture_of_the_asked_size(shipped) -> None:
    picture = shipped(
        'a red sign that says "KITE"',
        num_inference_steps=6,
        guidance_scale=1.0,
        height=pictures.HEIGHT,
        width=pictures.WIDTH,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert picture.size == (pictures.WIDTH, pictures.HEIGHT)
    assert np.asarray(picture).std() > 5


def test_shipped_pipeline_uses_the_asked_colour(shipped) -> None:
    """The median pixel is paper, and red paper is redder than blue paper in every one of eight pictures."""

    def paper(colour: str) -> np.ndarray:
        output = shipped(
            [f'a {colour} sign that says "{target}"' for target in ("OAK", "TREE", "407", "ZEBRA")],
            num_inference_steps=6,
            guidance_scale=1.0,
            height=pictures.HEIGHT,
            width=pictures.WIDTH,
            max_sequence_length=1,
            output_type="np",
            generator=torch.Generator().manual_seed(1),
        ).images
        return np.median(output, axis=(1, 2))

    red, blue = paper("red"), paper("blue")
    assert ((red[:, 0] - red[:, 2]) > (blue[:, 0] - blue[:, 2])).mean() >= 0.75


def test_shipped_vae_latents_have_unit_scale_and_come_back(shipped) -> None:
    clean = np.stack([pictures.render_clean(t, c) for t, c in (("KITE", "red"), ("407", "blue"), ("ZEBRA", "grey"))])
    images = torch.from_numpy(clean).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = shipped.vae.encode(images).latents
        back = shipped.vae.decode(latents).sample
    scaled = (latents - shipped.vae.config.shift_factor) * shipped.vae.config.scaling_factor
    assert 0.5 < scaled.std().item() < 2.0
    assert (back - images).square().mean().item() < 0.03
