"""The HTTP listener on its own: it answers, drains, and refuses a taken port."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import httpx2
import pytest
from fastapi import FastAPI, Request

from raylign.errors import ClusterError
from services.reward_door import BoundedHeads, HttpDoor, check_free


class Slow:
    """An application whose only answer waits for `gate`."""

    def __init__(self) -> None:
        self.gate, self.entered = asyncio.Event(), asyncio.Event()
        self.app = FastAPI()

        @self.app.post("/")
        async def answer(body: dict[str, int]) -> dict[str, int]:
            self.entered.set()
            await self.gate.wait()
            return body

        @self.app.get("/broken")
        async def broken() -> None:
            raise ValueError("secret detail")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _with_door(
    use: Callable[[Slow, HttpDoor, str], Awaitable[None]], protocol: type[BoundedHeads] = BoundedHeads
) -> None:
    async def main() -> None:
        slow, port = Slow(), _free_port()
        door = await HttpDoor.open(slow.app, "127.0.0.1", port, drain_timeout_s=5.0, protocol=protocol)
        try:
            await use(slow, door, f"http://127.0.0.1:{port}")
        finally:
            slow.gate.set()
            await door.close()

    asyncio.run(main())


def test_a_door_that_closes_answers_what_is_inside() -> None:
    async def use(slow: Slow, door: HttpDoor, url: str) -> None:
        async with httpx2.AsyncClient() as client:
            inside = asyncio.create_task(client.post(url, json={"a": 1}))
            await slow.entered.wait()
            closing = asyncio.create_task(door.close())
            await asyncio.sleep(0.3)
            door.check()
            slow.gate.set()
            assert (await inside).json() == {"a": 1}
            await closing
        with pytest.raises(RuntimeError, match="has ended"):
            door.check()
        async with httpx2.AsyncClient() as client:
            with pytest.raises(httpx2.ConnectError):
                await client.post(url, json={"a": 1})

    _with_door(use)


async def _write(writer: asyncio.StreamWriter, line: bytes, times: int) -> None:
    for _ in range(times):
        writer.write(line)
        await writer.drain()


@pytest.mark.parametrize("line", [b"X: " + b"a" * 1000 + b"\r\n", b"a" * 1000])
def test_headers_without_end_are_hung_up_on(line: bytes) -> None:
    async def use(slow: Slow, door: HttpDoor, url: str) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\nY: ")
        with pytest.raises(ConnectionError):
            await _write(writer, line, times=2**14)
        assert not slow.entered.is_set()
        writer.close()
        async with httpx2.AsyncClient() as client:  # others come in, with headers of an ordinary length
            assert (await client.get(f"{url}/nothing", headers={"X": "a" * 2**15})).status_code == 404

    _with_door(use)


class Impatient(BoundedHeads):
    head_timeout_s = 0.1


def test_headers_that_do_not_come_are_not_waited_for() -> None:
    async def use(slow: Slow, door: HttpDoor, url: str) -> None:
        for begun in (b"", b"POST / HTTP/1.1\r\nHost"):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            writer.write(begun)
            assert await asyncio.wait_for(reader.read(), 5.0) == b""
            writer.close()
        slow.gate.set()
        async with httpx2.AsyncClient() as client:
            for _ in range(2):  # the second comes on the connection of the first, after its timer
                assert (await client.post(url, json={"a": 1})).json() == {"a": 1}
                await asyncio.sleep(0.15)

    _with_door(use, Impatient)


def test_nobody_names_his_own_address() -> None:
    app, seen = FastAPI(), []

    @app.get("/")
    async def who(request: Request) -> None:
        seen.append(request.client.host if request.client else "")

    async def main() -> None:
        port = _free_port()
        door = await HttpDoor.open(app, "127.0.0.1", port, drain_timeout_s=1.0)
        async with httpx2.AsyncClient() as client:
            await client.get(f"http://127.0.0.1:{port}/", headers={"X-Forwarded-For": "10.9.8.7"})
        await door.close()

    asyncio.run(main())
    assert seen == ["127.0.0.1"]


def test_a_bug_is_a_500_without_its_text() -> None:
    async def use(slow: Slow, door: HttpDoor, url: str) -> None:
        async with httpx2.AsyncClient() as client:
            for _ in range(2):
                answer = await client.get(f"{url}/broken")
                assert (answer.status_code, answer.text) == (500, "Internal Server Error")

    _with_door(use)


def test_a_taken_port_is_an_error_after_a_while() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
        with pytest.raises(ClusterError, match="is the port taken"):
            check_free("127.0.0.1", port)
        with pytest.raises(ClusterError, match=rf"cannot listen at 127\.0\.0\.1:{port}: .*another service\.port"):
            asyncio.run(HttpDoor.open(FastAPI(), "127.0.0.1", port, drain_timeout_s=1.0, bind_timeout_s=0.2))


def test_a_port_that_becomes_free_is_taken() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = int(taken.getsockname()[1])
            opening = asyncio.create_task(HttpDoor.open(Slow().app, "127.0.0.1", port, drain_timeout_s=1.0))
            await asyncio.sleep(0.15)
        door = await opening
        async with httpx2.AsyncClient() as client:
            assert (await client.get(f"http://127.0.0.1:{port}/nothing")).status_code == 404
        await door.close()

    asyncio.run(main())
