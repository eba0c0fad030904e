"""A proxy on loopback that breaks a stated share of the HTTP requests passing through it, in ways that networks and busy stores do."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = ("busy", "bare", "reset", "cut_upload", "lost", "cut", "short", "slow", "stall")
"""busy: 503 with the store's XML. bare: 503 without a body. reset: the connection is reset before anything is forwarded.
cut_upload: the server gets half of the request, then both sides are closed. lost: the server does it, the answer never arrives.
cut: half of the answer's body, then closed. short: half of the body under headers that say so. slow: the answer trickles.
stall: silence."""

_XML = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>'
_PIECE = 1 << 16
_TRICKLE = (16, 0.05)
"""Pieces of a slow answer's body, and seconds between them."""


@dataclass(frozen=True)
class Fault:
    """One way to fail, on a share of the requests of some methods, at most `limit` times."""

    kind: str
    share: float = 1.0
    methods: tuple[str, ...] = ("GET", "HEAD", "PUT", "POST", "DELETE")
    limit: int | None = None
    target: str = ""
    """Only requests whose target has this in it."""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"Fault.kind is {self.kind!r}: choose one of {', '.join(KINDS)}")


class FaultProxy:
    """Forwards what comes to `port` to `upstream`, both on 127.0.0.1; within a `with` block.

    `counts` has (method, kind) -> faults so far; kind "passed" for requests left alone. One request per connection, so that
    the order of events on one does not depend on another. `faults` may be replaced while it runs. `delay`: seconds before a request
    goes on, as to a store that is not next door.
    """

    def __init__(self, upstream: int, faults: Sequence[Fault] = (), seed: int = 0, delay: float = 0.0):
        self.upstream, self.faults, self.delay = upstream, tuple(faults), delay
        self.counts: Counter[tuple[str, str]] = Counter()
        self._random = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def injected(self, *kinds: str) -> int:
        """Faults so far, of these kinds or of all."""
        return sum(count for (_, kind), count in self.counts.items() if kind != "passed" and (not kinds or kind in kinds))

    async def _close(self) -> None:
        self._server.close()
        for task in (tasks := list(self._tasks)):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _choose(self, method: str, target: str) -> str:
        for fault in self.faults:
            left = fault.limit is None or self.counts[method, fault.kind] < fault.limit
            if method in fault.methods and fault.target in target and left and self._random.random() < fault.share:
                return fault.kind
        return "passed"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)  # the event loop itself does not keep it from the garbage collector
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, _ = head.split(b" ", 2)
            kind = self._choose(method := method.decode(), target.decode())
            self.counts[method, kind] += 1
            await asyncio.sleep(self.delay)
            if kind == "reset":
                # Lingering for no time makes the close a reset.
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif kind in ("busy", "bare"):
                await self._refuse(head, reader, writer, b"" if kind == "bare" or method == "HEAD" else _XML)
            elif kind == "stall":
                await asyncio.sleep(3600)
            else:
                await self._forward(kind, head, reader, writer)
        writer.close()

    async def _refuse(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: bytes) -> None:
        if b"\r\nexpect: 100-continue" not in head.lower():
            await _body(head, reader)  # a client that is still sending would take the close for a reset
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))
        await writer.drain()

    async def _forward(self, kind: str, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.upstream, limit=1 << 20)
        first, rest = head.split(b"\r\n", 1)
        # The signature does not cover this header; it makes the answer end with the connection.
        server_writer.write(first + b"\r\nConnection: close\r\n" + b"".join(_without(rest, b"connection")))
        answer = asyncio.create_task(self._answer(kind, server_reader, writer))
        upload = asyncio.create_task(_pump(reader, server_writer, _length(head) // 2 if kind == "cut_upload" else None))
        try:
            await (upload if kind == "cut_upload" else answer)
        finally:
            upload.cancel()
            answer.cancel()
            await asyncio.gather(upload, answer, return_exceptions=True)
            server_writer.close()

    async def _answer(self, kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        while head.startswith(b"HTTP/1.1 100"):
            writer.write(head)
            head = await reader.readuntil(b"\r\n\r\n")
        if kind == "lost":
            return
        half = _length(head) // 2
        if kind == "short":
            status, rest = head.split(b"\r\n", 1)
            head = status + b"\r\nContent-Length: %d\r\n" % half + b"".join(_without(rest, b"content-length"))
        writer.write(head)
        if kind == "slow":
            pieces, pause = _TRICKLE
            while data := await reader.read(max(1, _length(head) // pieces)):
                writer.write(data)
                await asyncio.sleep(pause)
        else:
            await _pump(reader, writer, half if kind in ("cut", "short") else None)
        await writer.drain()


def _without(headers: bytes, name: bytes) -> list[bytes]:
    return [line for line in headers.splitlines(keepends=True) if not line.lower().startswith(name + b":")]


def _length(head: bytes) -> int:
    lines = [line for line in head.splitlines() if line.lower().startswith(b"content-length:")]
    return int(lines[0].split(b":")[1]) if lines else 0


async def _body(head: bytes, reader: asyncio.StreamReader) -> None:
    left = _length(head)
    while left and (data := await reader.read(min(_PIECE, left))):
        left -= len(data)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int | None) -> None:
    while limit != 0 and (data := await reader.read(_PIECE if limit is None else min(_PIECE, limit))):
        writer.write(data)
        await writer.drain()
        limit = None if limit is None else limit - len(data)
