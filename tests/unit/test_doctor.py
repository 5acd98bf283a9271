"""`raylign doctor`: every finding has a remedy, and only what stops a run fails."""

from __future__ import annotations

import importlib.metadata
import io
import json
import resource
import socket
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console

from services import doctor
from services.doctor import Check, Status, diagnose, print_checks


def test_a_diagnosis_is_quick_complete_and_says_what_to_do(tmp_path: Path) -> None:
    began = time.perf_counter()
    checks = diagnose(constraints=tmp_path / "none.txt")
    assert time.perf_counter() - began < 5 * 3, "seconds on a quiet machine, a few times that on a busy one"
    names = [check.name for check in checks]
    assert names[:5] == ["Python", "packages", "torch", "GPUs", "driver"]
    assert names[5:8] == ["format fp8", "format nvfp4", "format mxfp4"]
    assert len(names) == len(set(names)) == 20
    assert all(check.found for check in checks)
    assert all(check.remedy for check in checks if check.status is not Status.OK)


def _printed(checks: list[Check], width: int = 100) -> tuple[int, str]:
    stream = io.StringIO()
    code = print_checks(checks, Console(file=stream, width=width))
    return code, stream.getvalue()


def test_the_exit_code_is_1_only_for_a_failure() -> None:
    ok, warn = Check("a", Status.OK, "fine", "unused"), Check("b", Status.WARN, "so so", "improve [it]")
    fail = Check("c", Status.FAIL, "broken", "repair it")
    code, text = _printed([ok, warn])
    assert code == 0
    assert "ready to train, 1 warning(s)" in text
    assert "improve [it]" in text, "brackets are no markup"
    assert "unused" not in text
    code, text = _printed([ok, warn, fail])
    assert code == 1
    assert "1 problem(s)" in text
    assert "repair it" in text


def test_packages_are_compared_with_the_pins(tmp_path: Path) -> None:
    pins = tmp_path / "constraints.txt"
    installed = importlib.metadata.version("numpy")
    torch = importlib.metadata.version("torch").split("+")[0]
    pins.write_text(f"# comment\nnumpy=={installed}\ntorch=={torch}\nnot-installed-here==1.0\n")
    assert doctor.check_packages(pins) == Check("packages", Status.OK, "as pinned in constraints.txt")
    pins.write_text("numpy==0.0.1\nray[default]==0.1 ; python_version > '3'\n")
    check = doctor.check_packages(pins)
    assert check.status is Status.WARN
    assert f"numpy {installed} (pinned 0.0.1)" in check.found
    assert "(pinned 0.1)" in check.found
    assert "make env" in check.remedy


def test_a_missing_shipped_model_is_a_failure(tmp_path: Path) -> None:
    assert doctor.check_model(tmp_path).status is Status.FAIL
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "model.safetensors").write_bytes(bytes(2_000_000))
    check = doctor.check_model(tmp_path)
    assert (check.status, check.found) == (Status.OK, f"{tmp_path.name}, 2.0 MB in 1 file(s)")


def test_a_folder_that_cannot_hold_shared_memory(tmp_path: Path) -> None:
    check = doctor.check_shared_memory(tmp_path / "missing")
    assert check.status is Status.WARN
    assert doctor.check_shared_memory(tmp_path).found.endswith(str(tmp_path))


class _Memory(NamedTuple):
    available: int
    total: int


def test_little_memory_is_told_in_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, status in ((1, Status.FAIL), (4, Status.WARN), (20, Status.OK)):
        found = _Memory(free * 1024**3, 24 * 1024**3)
        monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda found=found: found)
        assert doctor.check_memory().status is status
        assert doctor.check_memory().found == f"{free}.0 of 24.0 GiB free"


def test_ports_that_cannot_be_bound_are_a_failure() -> None:
    check = doctor.check_ports("203.0.113.1")
    assert check.status is Status.FAIL
    assert "203.0.113.1" in check.found


def test_the_ocr_models_are_in_the_wheel() -> None:
    assert doctor.check_ocr().status is Status.OK


def test_a_format_is_native_only_where_every_gpu_has_its_units() -> None:
    hopper, blackwell = (9, 0), (10, 0)
    emulated = doctor.check_format("nvfp4", [hopper, hopper])
    assert emulated.status is Status.OK
    assert emulated.found == "emulated, so never faster than bf16: its units need a Blackwell GPU"
    assert doctor.check_format("fp8", []).found.startswith("emulated, so never faster")
    assert doctor.check_format("fp8", [hopper, blackwell]).found == "native on every GPU (backend torch)"
    mixed = doctor.check_format("nvfp4", [hopper, blackwell])
    assert mixed.status is Status.WARN
    assert mixed.found.startswith("native on 1 of 2 GPUs (backend torch), emulated on the others")
    assert "require_native" in mixed.remedy


def test_a_driver_that_does_not_fit_torch_stops_a_run(tmp_path: Path) -> None:
    none = tmp_path / "none"
    assert doctor.check_driver(none, None, False).status is Status.OK, "the CPU build needs none"
    assert doctor.check_driver(none, "12.8", False).status is Status.WARN
    told = tmp_path / "version"
    told.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n")
    old = doctor.check_driver(told, "12.8", False)
    assert old.status is Status.FAIL
    assert "535.104.05" in old.found
    assert "12.8" in old.remedy
    assert doctor.check_driver(told, "12.8", True) == Check("driver", Status.OK, "NVIDIA 535.104.05, torch's CUDA 12.8")


def test_few_open_files_are_told_with_the_command_that_raises_them() -> None:
    assert doctor.check_open_files(65536).status is Status.OK
    assert doctor.check_open_files(resource.RLIM_INFINITY).status is Status.OK
    assert doctor.check_open_files(1024).status is Status.WARN
    few = doctor.check_open_files(256)
    assert few.status is Status.FAIL
    assert "ulimit -n" in few.remedy


def test_the_disk_of_a_run_directory_that_is_not_there_yet_is_measured_and_left_clean(tmp_path: Path) -> None:
    check = doctor.check_disk_speed(tmp_path / "runs" / "new", 2**20)
    assert check.status is not Status.FAIL
    assert f"MB/s written and synced in {tmp_path}" in check.found
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert doctor.is_taken(port)
        check = doctor.check_known_ports({port: "a test"})
        assert f"in use: {port} (a test)" in check.found
    assert not doctor.is_taken(port)
    assert doctor.check_known_ports({port: "a test"}).found == f"{port} are free"


def test_findings_for_programs() -> None:
    checks = [Check("a", Status.OK, "fine", "unused"), Check("c", Status.FAIL, "broken", "repair it")]
    found = doctor.checks_as_json(checks)
    assert json.loads(json.dumps(found)) == {
        "ok": False,
        "checks": [
            {"name": "a", "status": "ok", "found": "fine", "remedy": ""},
            {"name": "c", "status": "fail", "found": "broken", "remedy": "repair it"},
        ],
    }
    assert doctor.checks_as_json(checks[:1])["ok"]
