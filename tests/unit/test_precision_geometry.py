"""benchmarks/precision_geometry.py: bounds and rankings by hand, what it counts, and the program on a CPU."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import pytest
import torch

from benchmarks.image_geometry import Bench
from benchmarks.precision_geometry import (
    POOL,
    Product,
    Rate,
    agreement,
    make_low,
    measure,
    parse_options,
    products_of,
    read_outs,
    roofline,
)

TINY = "--device cpu --size small --pixels 16 --batch 2 --steps 4 --pools 1 --repeats 1 --rank 2".split()


def options(*more: str) -> argparse.Namespace:
    return parse_options([*TINY, *more])


def test_the_bounds_are_the_products_times_and_all_else_at_the_base_rate() -> None:
    wide, narrow = Product(100, 10, 50), Product(100, 50, 10)
    # 100 000 operations each. In 1 ms and 3 ms, three products (two wide) take 5 ms: 60 operations per microsecond.
    rates = {wide: Rate(1e-3, 5e-4, 1e-4), narrow: Rate(3e-3, 1e-3, 3e-4)}
    found = roofline(Counter({wide: 2, narrow: 1}), rates, call_flops=900_000, batch=4, steps=10)
    assert found["share_of_flops"] == pytest.approx(1 / 3)
    assert found["flops_per_s"] == pytest.approx(300_000 / 5e-3)
    assert found["fp8_flops_per_s"] == pytest.approx(300_000 / 2e-3)
    assert found["quantise_s"] == pytest.approx(5e-4)
    # The other 600 000 operations take 10 ms: a call lasts 15 ms at least, and 12 ms with FP8.
    assert found["images_per_s"] == pytest.approx(4 / 0.150)
    assert found["fp8_images_per_s"] == pytest.approx(4 / 0.120)
    assert found["products_speedup"] == pytest.approx(2.5)
    assert found["speedup"] == pytest.approx(1.25)
    assert [(shape["tokens"], shape["in"], shape["out"], shape["per_call"]) for shape in found["shapes"]] == [
        (100, 10, 50, 2),
        (100, 50, 10, 1),
    ]


def _latents(seed: int, num_pools: int = 1) -> torch.Tensor:
    return torch.randn(num_pools * POOL, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def test_drafts_that_end_where_full_quality_does_rank_alike_and_opposite_ones_do_not() -> None:
    start, moved = _latents(0, 2), _latents(1, 2)
    same = agreement(start, start + moved, start + moved)
    assert same["error"] == 0
    assert same["final"] == same["moved"] == {"kendall": 1.0, "recall_at_12": 1.0}
    back = agreement(start, start - moved, start + moved)
    assert back["error"] == pytest.approx(2.0)
    assert back["moved"]["kendall"] == pytest.approx(-1.0, abs=0.01), "but for ties by rounding"
    assert back["moved"]["recall_at_12"] == pytest.approx(0.0, abs=0.01)
    assert back["final"]["kendall"] > -0.5, "the first noise is common to both"


def test_a_draft_of_pure_first_noise_flatters_the_final_read_out_only() -> None:
    start, moved = _latents(0, 4), 0.1 * _latents(1, 4)
    found = agreement(start, start + 0.1 * _latents(2, 4), start + moved)
    assert found["final"]["kendall"] > 0.85
    assert abs(found["moved"]["kendall"]) < 0.15
    assert found["error"] == pytest.approx(2**0.5, rel=0.05)


def test_read_outs_are_fixed_linear_and_of_the_size_of_the_latents_values() -> None:
    one, other = _latents(0), _latents(1)
    assert torch.equal(read_outs(one), read_outs(one))
    assert torch.allclose(read_outs(one + other), read_outs(one) + read_outs(other), atol=1e-6)
    assert 0.7 < read_outs(_latents(0, 4)).std().item() < 1.3


def test_what_is_multiplied_is_what_would_be_quantised() -> None:
    bench = Bench("small", argparse.Namespace(**{**vars(options()), "size": 16}))
    policy = bench.policy(adapter=False)
    names = list(make_low(bench, policy, "fp8").shadow.layers)
    products, flops = products_of(bench, policy, names)
    # Two pictures of 16 x 16 pixels, 8 x 8 latents, 4 x 4 patches; the image stream's feed-forward of both blocks.
    assert products == {Product(2 * 16, 32, 128): 2, Product(2 * 16, 128, 32): 2}
    assert len(names) == 4
    assert sum(product.flops * count for product, count in products.items()) == 4 * 2 * 32 * 32 * 128 < flops


def test_the_program_measures_a_tiny_model() -> None:
    found = measure(options())["geometries"]["small"]
    assert list(found) == ["rollout, 16 x 16", "fold", "memory", "ranks, 16 x 16"]
    rollout = found["rollout, 16 x 16"]
    eager, bound = rollout["eager"], rollout["roofline"]
    for prefix in ("", "fp8_"):
        check_seconds(eager[f"{prefix}seconds"])
        assert eager[f"{prefix}images_per_s"] == pytest.approx(2 / eager[f"{prefix}seconds"]["median"])
        assert eager[f"{prefix}of_roofline"] == pytest.approx(
            eager[f"{prefix}images_per_s"] / bound[f"{prefix}images_per_s"]
        )
    assert eager["speedup"] == pytest.approx(eager["fp8_images_per_s"] / eager["images_per_s"])
    assert rollout["fp8"].startswith("fp8, emulated, so not faster")
    fold = found["fold"]
    # Rank 2 on queries, keys, values and output of both streams, 32 wide, in two blocks; the last has no text output.
    assert fold["adapter_bytes"] == (2 * 8 - 1) * 2 * 32 * 2 * 4
    for row in (fold["verify_s"], fold["load_s"], *fold["requantise_s"].values()):
        check_seconds(row)
    memory = found["memory"]
    assert memory["network"]["bytes"] == 2 * memory["network"]["parameters"]
    # 4 layers of 32 x 128 values. FP8: a scale for each of 2 (128 + 32) rows; NVFP4: one more fp32 for each layer.
    assert {name: memory[name]["bytes"] for name in ("fp8", "nvfp4", "mxfp4")} == {
        "fp8": 16384 + 4 * 320,
        "nvfp4": 16384 * 9 // 16 + 4 * 4,
        "mxfp4": 16384 * 17 // 32,
    }
    drafts = found["ranks, 16 x 16"]["drafts"]
    assert list(drafts) == ["bf16, 4 steps", "fp8, 4 steps", "nvfp4, 4 steps"]
    # As many steps in the same precision are the same pictures.
    alike = {"kendall": 1.0, "recall_at_12": 1.0}
    assert drafts["bf16, 4 steps"] == {"error": 0.0, "final": alike, "moved": alike}
    assert 0 < drafts["fp8, 4 steps"]["error"] < 0.1
    assert 0 < drafts["nvfp4, 4 steps"]["error"] < 0.1


def check_seconds(row: dict[str, Any]) -> None:
    assert 0 < row["min"] <= row["median"] <= row["max"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "published sizes take gigabytes"),
        ([*TINY, "--pools", "0"], "--batch, --repeats, --pools and --rank must be at least 1"),
        ([*TINY, "--steps", "3"], "--steps must be at least 4, the fewest draft steps, got 3"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_options(arguments)
    assert message in capsys.readouterr().err
