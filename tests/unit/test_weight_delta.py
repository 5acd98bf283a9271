"""Deltas of weights: the whole comes out bit for bit, or nothing does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from raylign.errors import WeightError
from raylign.weight_delta import apply_delta, make_delta, worthwhile_delta
from raylign.weights import WeightSnapshot, make_snapshot, view_snapshot

BITS = {torch.float32: np.uint32, torch.bfloat16: np.uint16, torch.float16: np.uint16, torch.float8_e4m3fn: np.uint8}


def keyed(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(dtype: torch.dtype = torch.float32, size: int = 70_000) -> dict[str, torch.Tensor]:
    """More than a block of 2^16, and a small one beside it."""
    generator = keyed()
    return {
        "large": (torch.randn(size, generator=generator) * 0.03).to(dtype),
        "small": torch.randn(3, 5, generator=generator).to(dtype),
    }


def after_adamw(tensors: Mapping[str, torch.Tensor], lr: float, seed: int = 1) -> dict[str, torch.Tensor]:
    """One more AdamW step, of fp32 masters; rounded to the tensors' dtype."""
    generator = keyed(seed)
    masters = {name: torch.nn.Parameter(tensor.to(torch.float32, copy=True)) for name, tensor in tensors.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=lr)
    for master in masters.values():
        master.grad = torch.randn(master.shape, generator=generator)
    optimizer.step()
    return {name: master.detach().to(tensors[name].dtype) for name, master in masters.items()}


def full(tensors: Mapping[str, torch.Tensor], version: int) -> WeightSnapshot:
    return make_snapshot(tensors, version, "full")


def same(one: WeightSnapshot, other: WeightSnapshot) -> bool:
    """Whether two snapshots are equal in everything that can be told apart."""
    index = (one.version, one.kind, one.entries, one.sha256, one.lora_scale, one.base)
    return (
        index == (other.version, other.kind, other.entries, other.sha256, other.lora_scale, other.base)
        and one.arrays.keys() == other.arrays.keys()
        and all(one.arrays[dtype].tobytes() == other.arrays[dtype].tobytes() for dtype in one.arrays)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_comes_out_is_the_whole_snapshot_and_what_travels_is_less(dtype: torch.dtype) -> None:
    before = weights(dtype)
    base, new = full(before, 3), full(after_adamw(before, 1e-5), 4)
    delta = make_delta(base, new)
    assert delta.kind == "delta"
    assert (delta.version, delta.sha256) == (new.version, new.sha256)
    assert same(apply_delta(base, delta), new)
    assert delta.num_bytes < 0.6 * new.num_bytes
    assert base.sha256 == full(before, 3).sha256


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(sorted(BITS, key=str)), length=st.integers(1, 40))
def test_any_bits_become_any_other_bits(data: st.DataObject, dtype: torch.dtype, length: int) -> None:
    """Whatever the numbers mean: NaN, infinities, signs, subnormals."""
    bits = npst.arrays(BITS[dtype], length)
    old, new = (
        full({"w": torch.from_numpy(data.draw(bits).view(np.uint8).copy()).view(dtype)}, version) for version in (1, 2)
    )
    assert same(apply_delta(old, make_delta(old, new)), new)


def test_dtypes_are_mixed_in_one_delta() -> None:
    before = {str(dtype): tensor for dtype in BITS for tensor in [weights(dtype, 100)["large"]]}
    before["packed"] = torch.arange(40, dtype=torch.uint8)
    after = {name: tensor.clone() for name, tensor in before.items()}
    after["packed"][7] = 255
    after["torch.float16"][3] = -0.0
    base, new = full(before, 1), full(after, 2)
    assert same(apply_delta(base, make_delta(base, new)), new)


def test_a_nans_payload_is_kept() -> None:
    payload = torch.tensor([0x7FC01234, -4194001], dtype=torch.int32).view(torch.float32)
    base, new = full({"w": torch.zeros(2)}, 1), full({"w": payload}, 2)
    out = view_snapshot(apply_delta(base, make_delta(base, new)), {"w": (2,)})["w"]
    assert out.view(torch.int32).tolist() == payload.view(torch.int32).tolist()


def test_what_did_not_change_takes_no_bytes_but_its_lengths() -> None:
    before = weights()
    delta = make_delta(full(before, 1), full(before, 2))
    assert delta.arrays["float32"].size == 0
    assert apply_delta(full(before, 1), delta).version == 2


def test_an_adapter_stays_an_adapter_with_its_new_scale() -> None:
    tensors = weights(size=10)
    base, new = make_snapshot(tensors, 1, "adapter", 2.0), make_snapshot(tensors, 2, "adapter", 0.5)
    out = apply_delta(base, make_delta(base, new))
    assert (out.kind, out.lora_scale) == ("adapter", 0.5)


def test_a_chain_of_deltas_ends_where_the_learner_is() -> None:
    tensors = weights(torch.bfloat16, 500)
    learner = held = full(tensors, 0)
    for version in range(1, 21):
        tensors = after_adamw(tensors, 1e-3, version)
        new = full(tensors, version)
        held = apply_delta(held, make_delta(learner, new))
        learner = new
    assert same(held, learner)


def test_deltas_out_of_order_are_refused_with_both_versions() -> None:
    first = weights(size=10)
    second, third = after_adamw(first, 1e-3), after_adamw(first, 2e-3)
    one, two, three = full(first, 1), full(second, 2), full(third, 3)
    later = make_delta(two, three)
    with pytest.raises(WeightError, match=r"snapshot 3 is what changed since 2 .*the one held is 1 .*pull 3 whole"):
        apply_delta(one, later)
    assert same(apply_delta(apply_delta(one, make_delta(one, two)), later), three)


def test_a_foreign_base_of_the_same_version_is_refused() -> None:
    ours, theirs = full(weights(size=10), 1), full(after_adamw(weights(size=10), 1e-3), 1)
    delta = make_delta(ours, full(weights(size=10), 2))
    with pytest.raises(WeightError, match=rf"since 1 \({ours.sha256[:8]}\), .* held is 1 \({theirs.sha256[:8]}\)"):
        apply_delta(theirs, delta)


def test_an_actor_that_holds_nothing_is_told_to_pull_the_whole() -> None:
    base = full(weights(size=10), 1)
    with pytest.raises(WeightError, match=r"since 1 .*none is held; pull 2 whole"):
        apply_delta(None, make_delta(base, full(weights(size=10), 2)))


def test_a_delta_that_was_applied_before_changes_nothing() -> None:
    base, new = full(weights(size=10), 1), full(after_adamw(weights(size=10), 1e-3), 2)
    delta = make_delta(base, new)
    held = apply_delta(base, delta)
    assert apply_delta(held, delta) is held


def test_a_whole_snapshot_is_not_applied_and_a_delta_is_not_loaded() -> None:
    whole = full(weights(size=10), 1)
    delta = make_delta(whole, full(weights(size=10), 2))
    with pytest.raises(WeightError, match="snapshot 1 is whole"):
        apply_delta(None, whole)
    with pytest.raises(WeightError, match=r"2 is what changed since 1; apply it"):
        view_snapshot(delta, {"large": (10,), "small": (3, 5)})


def test_no_delta_lies_between_other_tensors_or_deltas() -> None:
    base, new = full(weights(size=10), 1), full(weights(size=10), 2)
    with pytest.raises(WeightError, match="1 and 2 do not hold the same tensors; publish 2 whole"):
        make_delta(base, full(weights(size=11), 2))
    with pytest.raises(WeightError, match="do not hold the same tensors"):
        make_delta(make_snapshot(weights(size=10), 1, "adapter"), new)
    with pytest.raises(WeightError, match="snapshot 2 is a delta"):
        make_delta(make_delta(base, new), new)


def test_a_torn_byte_anywhere_in_a_delta_is_found() -> None:
    before = weights(size=2000)
    base = full(before, 1)
    delta = make_delta(base, full(after_adamw(before, 1e-3), 2))
    num_bytes = delta.arrays["float32"].size
    for place in [0, num_bytes // 3, num_bytes // 2, num_bytes - 1]:
        payload = delta.arrays["float32"].copy()
        payload[place] ^= 1
        with pytest.raises(WeightError, match=r"snapshot 2.* torn"):
            apply_delta(base, replace(delta, arrays={**delta.arrays, "float32": payload}))


@pytest.mark.parametrize(
    "change",
    [
        {"float32": np.zeros(5, np.uint8)},
        {"float32.lengths": np.zeros(0, np.int64)},
        {"float32.lengths": np.array([-1, 1, 0, 0], np.int64)},
        {"float32.lengths": np.array([0, 0, 0, 2**40], np.int64)},
    ],
)
def test_lengths_that_do_not_add_up_are_refused(change: dict[str, np.ndarray]) -> None:
    before = weights(size=100)
    base = full(before, 1)
    delta = make_delta(base, full(after_adamw(before, 1e-3), 2))
    with pytest.raises(WeightError, match="cannot be unpacked"):
        apply_delta(base, replace(delta, arrays={**delta.arrays, **change}))
    lost = {name: array for name, array in delta.arrays.items() if name not in change}
    with pytest.raises(WeightError, match="cannot be unpacked"):
        apply_delta(base, replace(delta, arrays=lost))


def test_a_base_that_was_changed_in_place_is_found_by_the_results_hash() -> None:
    before = weights(size=100)
    base, new = full(before, 1), full(after_adamw(before, 1e-3), 2)
    delta = make_delta(base, new)
    bent = replace(base, arrays={"float32": base.arrays["float32"] * np.float32(1.5)})
    with pytest.raises(WeightError, match="large is torn"):
        apply_delta(bent, delta)


def test_a_result_shares_no_memory_with_its_base() -> None:
    base, new = full(weights(size=10), 1), full(weights(size=10), 2)
    out = apply_delta(base, make_delta(base, new))
    assert not np.shares_memory(out.arrays["float32"], base.arrays["float32"])


def test_only_a_delta_that_saves_much_is_worth_it() -> None:
    before = weights(torch.bfloat16)
    base = full(before, 1)
    assert worthwhile_delta(base, full(after_adamw(before, 1e-5), 2)) is not None
    noise = {name: torch.randn(t.shape, generator=keyed(9)).to(t.dtype) for name, t in before.items()}
    assert worthwhile_delta(base, full(noise, 2)) is None
