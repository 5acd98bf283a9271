"""benchmarks/image_geometry.py: models of the published sizes, counts that fit together, and the program on a CPU."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from benchmarks.image_geometry import GEOMETRIES, Bench, count_flops, empty, measure, parse_options

TINY = "--device cpu --geometry small --size 16 --batch 2 --steps 2 --levels 1 --micro-batch 1".split()


def options(*more: str) -> argparse.Namespace:
    return parse_options([*TINY, "--modes", "eager", "--precision", "fp32", "--rank", "1", "--repeats", "1", *more])


@pytest.mark.parametrize(
    ("name", "billions"),
    # Model cards: 2.5B (its position table included), 1.6B and 12B.
    [("sd3.5-medium", 2.470), ("sana-1.6b", 1.604), ("flux.1", 11.901)],
)
def test_networks_have_the_published_numbers_of_parameters(name: str, billions: float) -> None:
    published = GEOMETRIES[name]
    network = empty(published.architecture.form.network_class, published.network)
    stored = sum(tensor.numel() for tensor in network.state_dict().values())
    assert stored == pytest.approx(billions * 1e9, rel=5e-4)


@pytest.mark.parametrize(
    ("name", "shape"), [("sd3.5-medium", (16, 64, 64)), ("sana-1.6b", (32, 16, 16)), ("flux.1", (16, 64, 64))]
)
def test_latents_have_the_published_sizes_at_512(name: str, shape: tuple[int, int, int]) -> None:
    found = Bench(name, options("--size", "512"))
    assert found.geometry.latent_shape == shape
    assert found.conditioning.prompt_embeds_PLD.shape[0] == 1


def test_a_product_counts_twice_its_three_sizes() -> None:
    left, right = torch.ones(3, 5), torch.ones(5, 7)
    assert count_flops(lambda: left @ right) == 2 * 3 * 5 * 7
    query = torch.ones(1, 2, 11, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert count_flops(lambda: attention(query, query, query)) == 2 * (2 * 2 * 11 * 11 * 4)


def test_the_program_measures_a_tiny_model() -> None:
    found = measure(options())["geometries"]["small"]
    call, rollout, train = (found[f"{part}, eager"] for part in ("call", "rollout", "train"))
    assert rollout["flops"] == 2 * call["flops"]
    # For each of 2 pictures at 1 level: the old policy and the reference forward, the current one forward, again for
    # its backward, and backward to the inputs of frozen matrices: 5 calls of one picture, and the adapter's own part.
    assert train["flops"] / (2 * call["flops"] / 2) == pytest.approx(5, abs=0.5)
    for row in (call, rollout, rollout["decode"], train):
        check_row(row, found["measured_flops_per_s"])
    assert rollout["images_per_s"] == pytest.approx(2 / rollout["seconds"]["median"])
    assert rollout["images_per_s_decoded"] < rollout["images_per_s"]
    assert train["seconds_per_trained_level"] == pytest.approx(train["seconds"]["median"] / 2)
    # Rank 1 on queries, keys, values and output of both streams, 32 wide, in two blocks; the last has no text output.
    assert train["trained_parameters"] == (2 * 8 - 1) * 2 * 32


def check_row(row: dict[str, Any], rate: float) -> None:
    assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
    assert row["flops_per_s"] == pytest.approx(row["flops"] / row["seconds"]["median"])
    assert row["of_measured_rate"] == pytest.approx(row["flops_per_s"] / rate)
    assert row["peak_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu", "--geometry", "flux.1"], "published sizes take gigabytes"),
        ([*TINY, "--batch", "1"], "--batch must be at least 2"),
        ([*TINY, "--levels", "3"], "--levels 3 must be at most --steps 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_options(arguments)
    assert message in capsys.readouterr().err
