"""The dashboard in a real browser: a long run opens at once, a new step appears, hostile text stays text, keys work."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.dashboard_server import dashboard_over
from benchmarks.recorded_run import (
    ACTORS,
    STEP_S,
    append_rows,
    made_up_groups,
    made_up_timeline,
    make_run,
    metrics_row,
    write_record,
)
from services.timeline import REWARDS

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (Debian: apt install chromium)")

ROOT = Path(__file__).parents[2]
STEPS = 10_000
LOAD_S = 2.0
UPDATE_S = 1.0
HOSTILE = (
    "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'><svg onload='window.hacked=1'>"
    "\u202ereversed\u2066\u0007 [a](javascript:alert(1)) &lt;b&gt;"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long run, two that go on, of which one is asynchronous and behind with its record, and one of hostile texts."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "long", STEPS, groups_of=range(1, STEPS + 1))
    make_run(folder / "live", 30, groups_of=range(1, 31), max_staleness=1)
    make_run(folder / "ahead", 3, groups_of=[1, 2], max_staleness=1)
    make_run(folder / "hostile<img src=x onerror=window.hacked=1>", 97, groups_of=[96, 97], prompt=HOSTILE)
    return folder


@pytest.fixture(scope="module")
def address(runs: Path) -> Generator[str]:
    with dashboard_over(runs) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser() -> Generator[Any]:
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Generator[Any]:
    """A page of a fresh visitor; anything it complains of fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    yield page
    context.close()
    assert complaints == []


def open_run(page: Any, address: str, name: str) -> None:
    page.goto(f"{address}/#/run/{name}")
    page.wait_for_selector("#curves figure[data-points]")
    page.wait_for_selector("#groups [data-step]")


def until(page: Any, script: str) -> None:
    """Wait for a script to come true; the page's own policy keeps Playwright from waiting inside of it."""
    deadline_s = time.monotonic() + 20
    while not page.evaluate(script):
        assert time.monotonic() < deadline_s, f"never came true: {script}"
        time.sleep(0.01)


def test_a_run_of_ten_thousand_steps_opens_at_once(page: Any, address: str) -> None:
    page.goto(f"{address}/")
    page.wait_for_selector("text=4 runs")
    loads: list[float] = []
    for _ in range(3):  # the best of three, as the tests share their machine
        page.goto("about:blank")
        started_s = time.perf_counter()
        page.goto(f"{address}/#/run/long")
        page.wait_for_selector("#curves figure[data-points]")
        until(page, "document.querySelector('#latest img')?.complete")
        loads.append(time.perf_counter() - started_s)
    assert min(loads) <= LOAD_S, loads
    assert page.inner_text("#step-now") == "10,000"
    chart = page.locator("#curves figure").first
    assert 100 < int(chart.get_attribute("data-points")) <= 500
    page.wait_for_selector("#groups .group")
    assert page.locator("#groups .group").count() == 3
    assert page.locator("#groups button.sample").count() == 24


def test_a_new_step_appears_within_a_second(page: Any, address: str, runs: Path) -> None:
    open_run(page, address, "live")
    page.wait_for_selector("#connection:has-text('Up to date')")
    waits: list[float] = []
    for step in (31, 32, 33):
        write_record(runs / "live", step, made_up_groups(step, prompt=f"prompt of step {step}"))
        append_rows(runs / "live", [metrics_row(step, 40)])
        written_s = time.perf_counter()
        until(page, f"document.getElementById('step-now').textContent === '{step}'")
        until(page, f"document.querySelector('#curves figure').dataset.last === '{step}'")
        waits.append(time.perf_counter() - written_s)
        page.wait_for_selector(f"#groups .group h3:has-text('prompt of step {step}')")
        page.wait_for_selector(f"#latest img[src*='/train/{step}/']")
    assert min(waits) <= UPDATE_S, waits


def test_curves_appear_with_their_first_numbers(page: Any, address: str, runs: Path) -> None:
    """A page that was opened before the run had any."""
    make_run(runs / "young", 3)
    (runs / "young" / "metrics.jsonl").write_text("")
    page.goto(f"{address}/#/run/young")
    page.wait_for_selector("#connection:has-text('Up to date')")
    assert page.locator("#curves figure").count() == 1
    assert "no step yet" in page.inner_text(".glance")
    append_rows(runs / "young", [metrics_row(step, 3) for step in (1, 2)])
    page.wait_for_selector(".glance:has-text('training reward, was')")
    until(page, "document.querySelectorAll('#curves figure').length > 5")
    append_rows(runs / "young", [{**metrics_row(3, 3), "guard/held_out": 0.5, "guard/tripped": 0.0}])
    page.wait_for_selector("#curves figure:has-text('Hacking guard')")
    assert page.locator("#curves figure").first.get_attribute("data-last") == "3"


def test_the_pieces_of_a_step_lie_where_its_record_says(page: Any, address: str) -> None:
    open_run(page, address, "live")
    page.locator("#group-step").fill("12")
    page.keyboard.press("Enter")
    page.wait_for_selector("#gantt[data-step='12']")
    lanes = page.locator("#gantt .lane:not(.axis)")
    assert [lanes.nth(place).locator("> span").first.inner_text() for place in range(lanes.count())] == [
        "Rollout actor 1",
        "Rollout actor 2",
        "Rewards",
        "Learner and loop",
    ]
    assert lanes.nth(0).locator("> span").first.get_attribute("title") == ACTORS[0]
    drawn = page.evaluate(
        "[...document.querySelectorAll('#gantt .lane:not(.axis)')].flatMap((lane) => {"
        " const room = lane.querySelector('.tracks').getBoundingClientRect();"
        " const share = (pixels) => (pixels - room.left) / room.width;"
        " return [...lane.querySelectorAll('.piece')].map((piece) => { const box = piece.getBoundingClientRect();"
        " return [lane.firstChild.title, piece.className.match(/p-(\\w+)/)[1], share(box.left), share(box.right),"
        " box.top - room.top, piece.classList.contains('later')]; }); })"
    )
    # The axis goes from a second before the step, when its first chunk was begun, to its end.
    found = {(who, phase, round(left, 2)): (right, top, later) for who, phase, left, right, top, later in drawn}
    span = 1.0 + STEP_S
    told: list[Any] = [*made_up_timeline(12)["work"], [ACTORS[0], "sample", STEP_S - 1.0, 1.0]]
    assert len(drawn) == len(told)
    for place, (who, phase, start, seconds) in enumerate(told):
        right, _, later = found[who, phase, round((1.0 + start) / span, 2)]
        assert right == pytest.approx((1.0 + start + seconds) / span, abs=0.005)
        assert later == (place == len(told) - 1), "what was drawn for step 13 is pale"
    # Two calls at once lie below each other, one after the other beside each other.
    first, second, third = (found[REWARDS, "score", round((1.0 + at) / span, 2)][1] for at in (1.3, 1.35, 2.35))
    assert first < second == third
    assert page.locator("#gantt .before").count() == 4, "a line marks where the step began"
    told_aloud = page.get_by_role(
        "img", name=re.compile("Rollout actor 2: generate 2.00 s, decode 0.30 s, .*idle 54 %")
    )
    assert told_aloud.count() == 1
    page.locator("#gantt summary").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(f"#gantt tbody tr:nth-child({len(told)})")
    assert page.locator("#gantt tbody tr").count() == len(told)
    assert page.locator("#gantt tbody tr").first.inner_text().split("\t") == [
        "Rollout actor 1: generate", "−1 s", "2.00 s", "12",
    ]  # fmt: skip


def test_idle_time_is_told_as_soon_as_the_steps_drawn_meanwhile_are_recorded(
    page: Any, address: str, runs: Path
) -> None:
    open_run(page, address, "ahead")
    page.wait_for_selector("#gantt[data-step='2'] :text('Idle time is not known')")
    assert page.locator("#gantt .lane", has_text="idle").count() == 0
    page.get_by_role("checkbox", name="newest").uncheck()
    page.wait_for_selector("#connection:has-text('Up to date')")
    write_record(runs / "ahead", 3, made_up_groups(3))
    page.wait_for_selector("#gantt[data-step='2'] :text('idle 54 %')")
    assert page.locator("#gantt :text('Idle time is not known')").count() == 0


def test_hostile_text_stays_text(page: Any, address: str) -> None:
    page.goto(f"{address}/")
    page.locator("a", has_text="hostile<img").click()
    page.wait_for_selector("#groups .group")
    prompt = page.locator("#groups .group h3").first.inner_text()
    assert prompt.startswith("<script>window.hacked=1</script><img src=x")
    assert "U+202E" in prompt
    assert "U+2066" in prompt
    assert "\u202e" not in prompt
    page.locator("#groups button.sample").first.click()
    assert "<svg onload=" in page.inner_text("dialog")
    page.wait_for_selector("#failures td:has-text('timeout')")
    for inside in ("main", "dialog"):
        assert (
            page.locator(f"{inside} script, {inside} [onerror], {inside} [onload], {inside} [href^=javascript]").count()
            == 0
        )
    assert page.evaluate("window.hacked === undefined")


def test_everything_is_reached_and_worked_by_keys(page: Any, address: str) -> None:
    open_run(page, address, "live")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    seen: set[str] = set()
    for _ in range(120):
        page.keyboard.press("Tab")
        found = page.evaluate(
            "(() => { const e = document.activeElement; return [e.tagName.toLowerCase(),"
            " e.getAttribute('aria-label') ?? e.textContent ?? '', getComputedStyle(e).outlineStyle]; })()"
        )
        assert found[2] != "none", f"focus cannot be seen on {found[:2]}"
        seen.add(found[0])
        if found[1].startswith("Sample 0"):
            break
    assert {"a", "svg", "summary", "select", "button", "input"} <= seen
    page.keyboard.press("Enter")
    assert page.locator("dialog[open] h2").inner_text().startswith("Sample 0 of step")
    page.keyboard.press("ArrowRight")
    assert page.locator("dialog[open] h2").inner_text().startswith("Sample 1 of step")
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Sample 0")
    chart = page.locator("#curves svg.chart").first
    chart.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    told = page.locator("#curves .readout").first.inner_text()
    assert re.match(r"step \d+: training 0\.\d+ \(.* to .*\)", told), told
    page.keyboard.press("Enter")
    chosen = re.match(r"step (\d+)", told)
    assert chosen is not None
    page.wait_for_selector(f"#groups [data-step='{chosen[1]}']")


def test_a_screen_reader_finds_its_way(page: Any, address: str) -> None:
    open_run(page, address, "live")
    assert page.locator("html[lang=en]").count() == 1
    assert page.locator("h1").count() == 1
    for role in ("main", "banner"):
        assert page.get_by_role(role).count() == 1
    names = [page.locator("section").nth(place).get_attribute("aria-label") for place in range(6)]
    assert names[:4] == ["Curves", "Groups", "Timing", "Failures"]
    label = page.locator("#curves svg.chart").first.get_attribute("aria-label")
    assert "training: from" in label
    page.locator("#curves details summary").first.click()
    page.wait_for_selector("#curves figure table tbody tr:nth-child(6)")
    unnamed = page.evaluate(
        "[...document.querySelectorAll('button, a[href], input, select')].filter((e) => !(e.getAttribute('aria-label')"
        " ?? e.textContent).trim() && !(e.labels?.length)).map((e) => e.outerHTML)"
    )
    assert unnamed == []
    assert page.evaluate("[...document.images].every((image) => image.hasAttribute('alt'))")


@pytest.mark.parametrize("view", ["/#/", "/#/run/live", "/#/run/long", "/#/compare/live/long"])
def test_a_phone_needs_no_sideways_scrolling(browser: Any, address: str, view: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, color_scheme="dark")
    page = context.new_page()
    page.goto(f"{address}{view}")
    page.wait_for_selector("main h1")
    page.wait_for_load_state("networkidle" if "run/" not in view else "load")
    if "run/" in view:
        page.wait_for_selector("#groups .group")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 19, 22)", "dark as asked for"
    context.close()


def test_two_runs_are_chosen_and_compared(page: Any, address: str) -> None:
    page.goto(f"{address}/")
    for name in ("live", "long"):
        page.get_by_role("checkbox", name=f"Compare {name}").check()
    page.get_by_role("link", name="Compare the two").click()
    page.wait_for_selector("h1:has-text('Compare two runs')")
    assert page.locator("figure .legend").first.inner_text().strip() == "A live"
    assert page.locator("td code", has_text="num_steps").count() == 1


def test_a_visitor_from_elsewhere_logs_in(browser: Any, runs: Path, tmp_path: Path) -> None:
    token = "a token of some length"
    (tmp_path / "token").write_text(token)
    context = browser.new_context()
    options = ("--host", "0.0.0.0", "--token-file", str(tmp_path / "token"))
    with dashboard_over(runs / "live", *options) as (address, _):
        page = context.new_page()
        page.goto(f"{address}/")
        page.get_by_label("Token").fill("wrong, and long enough")
        page.get_by_role("button", name="Log in").click()
        page.wait_for_selector("text=That is not the token.")
        page.get_by_label("Token").fill(token)
        page.keyboard.press("Enter")
        page.wait_for_selector("text=1 run")
        assert token not in page.url
        (cookie,) = context.cookies()
        assert cookie["httpOnly"]
        assert cookie["sameSite"] == "Strict"
        assert token not in json.dumps(context.storage_state())
    context.close()
