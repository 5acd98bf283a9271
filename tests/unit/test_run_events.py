"""Rows through a Redis stream: what is in it, a reader that is pushed to, a Redis that goes and comes. It is real."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from benchmarks.recorded_run import append_rows, make_run, metrics_row
from raylign.config import parse_config
from raylign.errors import ConfigError
from services.dashboard.events import Watch, stream
from services.dashboard.redis_rows import RowStream, read_row
from services.dashboard.runs import RunsFolder
from services.run_events import KEEP_S, MAX_ENTRIES, EventsConfig, EventSink, stream_of
from services.tracking_sinks import run_identity
from tests.documents import ROOT, blocks_of
from tests.redis_server import RedisServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    running = RedisServer(tmp_path)
    yield running
    running.kill()


def _run(folder: Path, server: RedisServer) -> tuple[Path, EventSink, list[str]]:
    """A run of three steps that writes its rows to the server, its sink, and what the sink tells."""
    path, told = folder / "live", list[str]()
    make_run(path, 3, tracking={"events": {"url": server.url, "url_env": "RAYLIGN_NO_SUCH_VARIABLE"}})
    config = EventsConfig(url=server.url, url_env="RAYLIGN_NO_SUCH_VARIABLE")
    return path, EventSink(config, run_identity(path, "events"), told.append), told


def test_a_row_is_an_entry_of_its_finite_numbers(server: RedisServer) -> None:
    sink = EventSink(EventsConfig(url=server.url), "one", pytest.fail)
    sink.log(1, {"loss": 0.5, "loss/kl": math.nan})
    sink.close()
    client: Any = redis.Redis.from_url(server.url, decode_responses=True)
    entries = [fields for _, fields in client.xrange(stream_of("one"))]
    assert [sorted(fields) for fields in entries] == [["row"], ["end"]]
    assert json.loads(entries[0]["row"]) == {"step": 1, "loss": 0.5}
    assert 0 < client.ttl(stream_of("one")) <= KEEP_S
    client.close()


def test_the_stream_does_not_grow_without_end(server: RedisServer) -> None:
    sink = EventSink(EventsConfig(url=server.url), "long", pytest.fail)
    for step in range(MAX_ENTRIES + 1000):
        sink.log(step, {"loss": 1.0})
    client: Any = redis.Redis.from_url(server.url)
    assert MAX_ENTRIES <= client.xlen(stream_of("long")) < MAX_ENTRIES + 500
    client.close()
    sink.close()


def test_a_redis_that_goes_and_comes_back_is_told_of_once_each(server: RedisServer) -> None:
    told, now = list[str](), [0.0]
    sink = EventSink(EventsConfig(url=server.url), "two", told.append, lambda: now[0])
    sink.log(1, {"loss": 1.0})
    server.kill()
    for step in (2, 3):
        now[0] += 100.0
        sink.log(step, {"loss": 1.0})
    server.start()
    sink.log(4, {"loss": 1.0})  # too soon: it is left alone for a while
    now[0] += 100.0
    sink.log(5, {"loss": 1.0})
    client: Any = redis.Redis.from_url(server.url, decode_responses=True)
    rows = [json.loads(fields["row"])["step"] for _, fields in client.xrange(stream_of("two"))]
    client.close()
    sink.close()
    assert rows == [5]  # this Redis keeps nothing over a restart
    assert [line.rpartition(" is ")[2].split()[0] for line in told] == ["away", "back"]


def test_rows_are_pushed_to_a_reader(tmp_path: Path, server: RedisServer) -> None:
    """The row is in no file, so nothing but the stream can have brought it."""
    path, sink, told = _run(tmp_path, server)

    async def main() -> dict[str, Any]:
        source = await RowStream.opened(path)
        assert source is not None
        await source.close()
        events = stream(RunsFolder(tmp_path).run("live"), 3)
        assert await anext(events) == b"retry: 1000\n\n"
        following = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(sink.log, 4, {"loss": 0.25})
        event = (await asyncio.wait_for(following, 10)).decode()
        await events.aclose()
        name, data = event.split("\n")[:2]
        assert name == "event: rows"
        return json.loads(data.removeprefix("data: "))

    assert asyncio.run(main())["rows"] == [{"step": 4, "loss": 0.25}]
    sink.close()
    assert told == []


def test_a_reader_outlives_redis_by_the_folder(tmp_path: Path, server: RedisServer) -> None:
    path, sink, _ = _run(tmp_path, server)

    async def main() -> list[int]:
        events = stream(RunsFolder(tmp_path).run("live"), 3)
        await anext(events)
        following = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.3)
        server.kill()
        append_rows(path, [metrics_row(4, 5)])
        event = (await asyncio.wait_for(following, 10)).decode()
        await events.aclose()
        return [row["step"] for row in json.loads(event.split("data: ")[1])["rows"]]

    assert asyncio.run(main()) == [4]
    sink.close()


def test_rows_after_a_gap_come_from_the_folder_in_order(tmp_path: Path) -> None:
    make_run(tmp_path / "live", 3)
    watch = Watch(RunsFolder(tmp_path).run("live"), 3)
    watch.changes()
    assert watch.pushed([{"step": 6, "loss": 1.0}]) == []
    append_rows(tmp_path / "live", [metrics_row(step, 6) for step in (4, 5, 6)])
    ((name, data),) = watch.changes()
    assert (name, [row["step"] for row in data["rows"]]) == ("rows", [4, 5, 6])
    ((_, data),) = watch.pushed([{"step": 5, "loss": 9.0}, {"step": 6, "eval/mean": 0.5}, {"step": 7, "loss": 1.0}])
    assert data["rows"] == [{"step": 6, "eval/mean": 0.5}, {"step": 7, "loss": 1.0}]


def test_a_run_without_a_stream_has_none(tmp_path: Path) -> None:
    make_run(tmp_path / "plain", 1)
    assert asyncio.run(RowStream.opened(tmp_path / "plain")) is None


@pytest.mark.parametrize("text", [None, "", "[1]", "{}", '{"step": "1"}', '{"step": 1.5}', "<script>"])
def test_what_is_no_row_is_left_out(text: str | None) -> None:
    assert read_row(text) is None


def test_only_finite_numbers_of_a_row_are_read() -> None:
    assert read_row('{"step": 1, "a": NaN, "b": "x", "c": 2, "d": [1]}') == {"step": 1, "c": 2}


def test_an_address_that_is_no_redis_is_refused() -> None:
    with pytest.raises(ConfigError, match="an address such as redis://127"):
        parse_config(EventsConfig, {"url": "http://host/0"}, "test")


def test_the_documented_program_follows_a_run_to_its_end(
    tmp_path: Path, server: RedisServer, capsys: pytest.CaptureFixture[str]
) -> None:
    path, sink, _ = _run(tmp_path, server)
    sink.log(1, {"reward/mean": 0.5})
    sink.log(2, {"loss": 1.0})
    sink.close()
    (block,) = (one for one in blocks_of(ROOT / "docs" / "tracking.md") if "def follow" in one.text)
    names: dict[str, Any] = {}
    exec(compile(block.text, "docs/tracking.md", "exec"), names)  # noqa: S102  # the documentation's own program
    names["follow"](path, server.url)
    assert capsys.readouterr().out == "1 0.5\n2 None\n"
