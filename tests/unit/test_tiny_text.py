"""The tiny text model: its tokenizer, its position features, and that it is the same for the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raylign.errors import ModelError
from raylign.models import load_policy
from raylign.models.tiny_text import (
    PositionFeatures,
    TinyTextConfig,
    TinyTextSettings,
    make_tiny_text,
    make_tokenizer,
    save_tiny_text,
    settings_for,
)
from raylign.models.tokens import finite_logits

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def settings(**changes: object) -> TinyTextSettings:
    values = {**SIZES, "max_prompt_length": 20, "max_canvas_length": 18, **changes}
    return settings_for(make_tokenizer(("sort", "sorted"), "0123456789+-"), **values)


def test_words_are_tokens_and_everything_else_is_spelt() -> None:
    tokenizer = make_tokenizer(("sort", "sorted"), "0123456789+-o")
    ids = tokenizer("sort 12+3 sorted so?")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["sort", "1", "2", "+", "3", "sorted", "<unk>", "o", "<unk>"]
    assert tokenizer.decode(tokenizer("1 2+3")["input_ids"]) == "12+3"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 1, 2)


def test_a_network_is_its_seeds() -> None:
    torch.manual_seed(0)
    first = make_tiny_text(settings(), 3).state_dict()
    torch.manual_seed(1)
    second, other = make_tiny_text(settings(), 3).state_dict(), make_tiny_text(settings(), 4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_place_is_told_from_the_prompts_start_or_the_canvass() -> None:
    features = PositionFeatures(settings())
    one_hot_per_row(features.index)
    # two rows of [prompt of 3, the second padded by 1][canvas of 2]
    position = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]])
    places = features(position, torch.arange(-3, 2))[..., 0]
    assert places.tolist() == [[18, 19, 20, 0, 1], [18, 18, 19, 0, 1]]


def test_a_grids_cells_are_told_by_row_column_and_box_in_prompt_and_canvas() -> None:
    features = PositionFeatures(settings(grid=4))
    for table in (features.index, features.row, features.column, features.box):
        assert table is not None
        torch.nn.init.zeros_(table.weight)
    found: dict[str, list[int]] = {}
    offset = torch.arange(-17, 18)  # one word and 16 cells in the prompt, 16 cells and 2 more in the canvas
    for name in ("row", "column", "box"):
        table = getattr(features, name)
        one_hot_per_row(table)
        found[name] = features(torch.arange(35)[None], offset)[0, :, 0].int().tolist()
        torch.nn.init.zeros_(table.weight)
    rows = [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    columns = [0, 1, 2, 3] * 4
    boxes = [0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2
    outside = 4
    assert found["row"] == [outside, *rows, *rows, outside, outside]
    assert found["column"] == [outside, *columns, *columns, outside, outside]
    assert found["box"] == [outside, *boxes, *boxes, outside, outside]


def one_hot_per_row(table: torch.nn.Embedding) -> None:
    """Each row of a table says its own number."""
    with torch.no_grad():
        table.weight.copy_(torch.arange(table.num_embeddings)[:, None].expand_as(table.weight))


@pytest.mark.parametrize(
    "changes",
    [{"rope_theta": None}, {"position_features": False}, {"grid": 4}],
    ids=["learned only", "rotary only", "grid"],
)
def test_every_kind_of_position_loads_and_tells_places_apart(changes: dict[str, object], tmp_path: Path) -> None:
    chosen = settings(**changes)
    save_tiny_text(tmp_path, chosen, make_tiny_text(chosen, 0), make_tokenizer(("sort", "sorted"), "0123456789+-"))
    policy = load_policy(TinyTextConfig(path=str(tmp_path), canvas_length=5, max_prompt_length=6), "rollout")
    canvas = torch.full((1, 5), policy.vocabulary.mask_id)
    with torch.no_grad():
        logits = finite_logits(policy.predict(canvas, policy.encode("sort 31")))[0]
        swapped = finite_logits(policy.predict(canvas, policy.encode("sort 13")))[0]
    assert (logits - swapped).abs().max() > 1e-4, "the order of the prompt is seen"
    assert (logits[0] - logits[1]).abs().max() > 1e-4, "two masked places differ"


def test_without_any_positions_places_look_alike() -> None:
    network = make_tiny_text(settings(rope_theta=None, position_features=False), 0)
    ids = torch.tensor([[4, 5, 6, 2, 2]])
    with torch.no_grad():
        hidden = network(ids, torch.ones_like(ids, dtype=torch.bool), 3)[0]
    torch.testing.assert_close(hidden[3], hidden[4])


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hidden_size must be a multiple of 2"):
        settings(hidden_size=18)
    chosen = settings()
    with pytest.raises(ModelError, match="the tokenizer has 5 tokens, the model 18"):
        save_tiny_text(tmp_path, chosen, make_tiny_text(chosen, 0), make_tokenizer((), "0"))
