"""Weight snapshots: what goes in comes out, and nothing torn, foreign or misshapen gets through."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from raylign.errors import WeightError
from raylign.weights import (
    WeightSnapshot,
    check_contents,
    in_threads,
    make_snapshot,
    verify_snapshot,
    view_snapshot,
    weights_sha256,
)

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.weight": torch.linspace(-1, 1, 4).to(torch.bfloat16),
    "c.half": torch.tensor([0.5, 2.0], dtype=torch.float16),
    "d.scalar": torch.tensor(3.0),
    "e.last": torch.full((2, 2), 7.0),
    "f.codes": torch.tensor([0, 7, 255], dtype=torch.uint8),
    "g.scales": torch.tensor([0.5, 448.0, -0.0]).to(torch.float8_e4m3fn),
    "h.empty": torch.zeros(0, 3),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


def snapshot(**changes: torch.Tensor) -> WeightSnapshot:
    return make_snapshot({**TENSORS, **changes}, version=4, kind="full")


def test_every_dtype_comes_back_bit_for_bit() -> None:
    tensors = verify_snapshot(snapshot(), SHAPES)
    assert sorted(tensors) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].tolist() == tensor.tolist()


def test_a_snapshot_is_a_copy_both_ways() -> None:
    source = torch.zeros(3)
    made = make_snapshot({"w": source}, 1, "full")
    source.fill_(5.0)
    loaded = verify_snapshot(made, {"w": (3,)})["w"]
    loaded.fill_(6.0)
    assert verify_snapshot(made, {"w": (3,)})["w"].tolist() == [0.0, 0.0, 0.0]


def test_a_view_that_is_not_contiguous_is_published_by_value() -> None:
    made = make_snapshot({"w": TENSORS["b.weight"].T}, 1, "full")
    assert torch.equal(verify_snapshot(made, {"w": (3, 2)})["w"], TENSORS["b.weight"].T)


def test_size_counts_what_travels() -> None:
    assert snapshot().num_bytes == (6 + 1 + 4) * 4 + 4 * 2 + 2 * 2 + 3 + 3


def test_the_hash_tells_contents_names_shapes_and_dtypes_but_not_version_or_order() -> None:
    same = make_snapshot(dict(reversed(TENSORS.items())), version=9, kind="full")
    assert same.sha256 == snapshot().sha256
    renamed = {("z" if name == "e.last" else name): tensor for name, tensor in TENSORS.items()}
    others = [
        snapshot(**{"d.scalar": torch.tensor(3.5)}),
        snapshot(**{"e.last": torch.full((4,), 7.0)}),
        snapshot(**{"d.scalar": torch.tensor(3.0, dtype=torch.bfloat16)}),
        make_snapshot(renamed, 4, "full"),
    ]
    hashes = {snapshot().sha256, *(other.sha256 for other in others)}
    assert len(hashes) == 5
    assert weights_sha256(tuple(reversed(snapshot().entries))) == snapshot().sha256


def test_a_dtype_without_wire_form_is_refused() -> None:
    with pytest.raises(WeightError, match=r"w is torch\.float64; a snapshot holds float32"):
        make_snapshot({"w": torch.zeros(2, dtype=torch.float64)}, 1, "full")


def test_a_missing_tensor_is_named() -> None:
    with pytest.raises(WeightError, match=r"snapshot 4 lacks x\.weight"):
        verify_snapshot(snapshot(), {**SHAPES, "x.weight": (1,)})


def test_a_foreign_tensor_is_named() -> None:
    with pytest.raises(WeightError, match=r"snapshot 4 has extra, which"):
        verify_snapshot(snapshot(extra=torch.zeros(1)), SHAPES)


def test_a_misshapen_tensor_is_named() -> None:
    with pytest.raises(WeightError, match=r"b\.weight must be \(3, 2\), got \(2, 3\)"):
        verify_snapshot(snapshot(), {**SHAPES, "b.weight": (3, 2)})


def test_one_changed_byte_is_found() -> None:
    torn = snapshot()
    torn.arrays["float32"].view("uint8")[-1] ^= 1
    with pytest.raises(WeightError, match=r"e\.last is torn"):
        verify_snapshot(torn, SHAPES)


def test_an_array_cut_short_is_found() -> None:
    made = snapshot()
    cut = replace(made, arrays={**made.arrays, "float32": made.arrays["float32"][:-1]})
    with pytest.raises(WeightError, match=r"e\.last is torn"):
        verify_snapshot(cut, SHAPES)


def test_a_lost_array_is_found() -> None:
    made = snapshot()
    lost = replace(made, arrays={name: array for name, array in made.arrays.items() if name != "float16"})
    with pytest.raises(WeightError, match=r"c\.half is torn"):
        verify_snapshot(lost, SHAPES)


def test_an_index_that_does_not_fit_its_hash_is_refused() -> None:
    made = snapshot()
    with pytest.raises(WeightError, match=r"index that does not fit"):
        verify_snapshot(replace(made, sha256="0" * 64), SHAPES)


def test_an_index_with_a_changed_hash_does_not_fit_either() -> None:
    made = snapshot()
    first = replace(made.entries[0], sha256="0" * 64)
    with pytest.raises(WeightError, match=r"index that does not fit"):
        check_contents(replace(made, entries=(first, *made.entries[1:])))


def test_a_view_lies_in_the_snapshots_memory_and_takes_memory_that_is_read_only() -> None:
    made = snapshot()
    for array in made.arrays.values():
        array.setflags(write=False)
    views = view_snapshot(made, SHAPES)
    assert views["b.weight"].data_ptr() == made.arrays["float32"].ctypes.data
    for name, tensor in TENSORS.items():
        assert views[name].dtype == tensor.dtype
        assert views[name].tolist() == tensor.tolist()
    loaded = verify_snapshot(made, SHAPES)["b.weight"].fill_(9.0)
    assert loaded.sum() == 54
    assert torch.equal(views["b.weight"], TENSORS["b.weight"])


def test_the_bits_of_a_nan_travel_as_they_are() -> None:
    bits = torch.tensor([0x7FC01234, -4194001, 0x7F800001], dtype=torch.int32)
    made = make_snapshot({"w": bits.view(torch.float32)}, 1, "full")
    assert torch.equal(verify_snapshot(made, {"w": (3,)})["w"].view(torch.int32), bits)


def test_a_large_snapshot_is_hashed_in_threads_as_a_small_one_is_without() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"w{n:02}": torch.randn(100 * (n + 1), 100, generator=generator) for n in range(12)}
    made = make_snapshot(tensors, 1, "full")
    assert made.num_bytes > 1 << 20
    for entry in made.entries:
        alone = make_snapshot({entry.name: tensors[entry.name]}, 1, "full").entries[0]
        assert (alone.sha256, alone.shape) == (entry.sha256, entry.shape)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    torn = replace(made, arrays={"float32": made.arrays["float32"].copy()})
    torn.arrays["float32"][made.entries[7].offset] += 1
    torn.arrays["float32"][made.entries[9].offset] += 1
    with pytest.raises(WeightError, match="w07 is torn"):
        verify_snapshot(torn, shapes)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in verify_snapshot(made, shapes).items())


@pytest.mark.parametrize("num_bytes", [0, 1 << 30])
def test_work_in_threads_keeps_its_order_and_its_errors(num_bytes: int) -> None:
    assert in_threads(lambda n: n * n, range(9), num_bytes) == [n * n for n in range(9)]
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda n: 1 // n, [1, 0], num_bytes)
