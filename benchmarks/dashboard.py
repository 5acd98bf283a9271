"""What the dashboard costs: opening a long run in a browser, a new row on the screen, and the record beside the loop.

    python benchmarks/dashboard.py --steps 10000 --json dashboard.json

Prints JSON:
- `load_s`: from asking for the page until curves and the newest group's pictures are painted, for a server that has not
  read the run yet (`cold`) and one that has (`warm`); Chromium, `--repeats` times each.
- `update_s`: from the end of writing a line of metrics.jsonl until the page shows its step.
- `record`: milliseconds that the loop waits to hand a step's groups over, and that the writer takes, per step.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from dashboard_server import dashboard_over
from measuring import publish, spread
from recorded_run import append_rows, made_up_groups, make_run, metrics_row

from learner.algorithms.nft import NftConfig
from services.record import GroupRecorder, RecordConfig

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Make the run, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--hardware", default="unnamed", help="what it ran on, for the report")
    parser.add_argument("--json", type=Path, help="also write the report here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "runs"
        make_run(runs / "long", options.steps, groups_of=range(1, options.steps + 1))
        found = {"steps": options.steps, "samples_per_step": 24}
        found |= in_browser(runs, options.steps, options.repeats, options.updates)
        found["record"] = {f"{side}px": record_cost(Path(folder) / f"record{side}", side) for side in (32, 512)}
    publish(__file__, options, found)


def in_browser(runs: Path, steps: int, repeats: int, updates: int) -> dict[str, Any]:
    """Seconds until a page is there, and until a new line is on it."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("no `chromium` on PATH; install Debian's package")
    loads: dict[str, list[float]] = {"cold": [], "warm": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(repeats):
            with dashboard_over(runs, output=subprocess.DEVNULL) as (address, _):
                for kind in ("cold", "warm"):
                    page = browser.new_context().new_page()
                    started_s = time.perf_counter()
                    page.goto(f"{address}/#/run/long")
                    page.wait_for_selector("#curves figure[data-points]")
                    until(page, "document.querySelector('#latest img')?.complete")
                    loads[kind].append(time.perf_counter() - started_s)
                    page.context.close()
        waits: list[float] = []
        with dashboard_over(runs, output=subprocess.DEVNULL) as (address, _):
            page = browser.new_page()
            page.goto(f"{address}/#/run/long")
            page.wait_for_selector("#latest img")
            for step in range(steps + 1, steps + updates + 1):
                time.sleep(0.7)
                append_rows(runs / "long", [metrics_row(step, steps)])
                written_s = time.perf_counter()
                until(page, f"document.getElementById('step-now').textContent === '{step:,}'")
                waits.append(time.perf_counter() - written_s)
        browser.close()
    return {"load_s": {kind: spread(some) for kind, some in loads.items()}, "update_s": spread(waits)}


def until(page: Any, script: str) -> None:
    """Wait for a script to come true; the page's policy keeps Playwright from waiting inside of it."""
    while not page.evaluate(script):
        time.sleep(0.005)


def record_cost(run: Path, side: int, steps: int = 30) -> dict[str, Any]:
    """Of steps of 3 groups of 8 pictures, one every 100 ms."""
    run.mkdir()
    recorder = GroupRecorder(RecordConfig(), NftConfig(), run, None)
    steps_of_groups = [made_up_groups(step, side=side) for step in range(1, steps + 1)]
    waits: list[float] = []
    for step, groups in enumerate(steps_of_groups, start=1):
        started_s = time.perf_counter()
        recorder.take("train", step, groups)
        waits.append(1e3 * (time.perf_counter() - started_s))
        time.sleep(0.1)
    recorder.close()
    alone: list[float] = []
    for groups in steps_of_groups[:8]:
        started_s = time.perf_counter()
        recorder = GroupRecorder(RecordConfig(), NftConfig(), run, None)
        recorder.take("train", 1, groups)
        recorder.close()
        alone.append(1e3 * (time.perf_counter() - started_s))
    size = sum(path.stat().st_size for path in (run / "groups").iterdir())
    return {"loop_waits_ms": spread(waits), "writer_ms": spread(alone), "bytes_per_step": size}


if __name__ == "__main__":
    main()
