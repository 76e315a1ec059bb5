"""An S3 server that fails or is far away: moto's server behind a proxy that refuses, stalls, cuts, falsifies and drops, or delays.

with store(folder, faults=True) as seen: ...      # the environment points to it; seen() = how often each fault was served
with store(folder, far=True): ...

Which request fails how depends on its path and on how often it came, so every run meets the same faults. The first two requests for a file
fail, each in another way, and later ones work. Other bytes are served of files whose sha256 is known, for nothing else could tell.

While `refuse` says so, a share of all requests gets 503 instead, as drawn from a seed; `written` counts by path the files that the store
took.

A store that is far away takes 30 ms to answer and sends 80 MB/s on a connection, as the first prototypes were measured. It answers
from the proxy's memory what it was asked before, so that moto, slower than any store, is not what is measured.
"""

import argparse
import asyncio
import json
import os
import random
import secrets
import subprocess
import sys
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import services
from aiohttp import ClientSession, DummyCookieJar, web

READS = ("slow down", "stall", "cut", "other bytes", "drop", "short")
WRITES = ("slow down", "drop")
FAILS = 2  # requests for each file
LATENCY_S, BYTES_PER_S, PIECE = 0.03, 80e6, 1 << 20
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}
SLOW_DOWN = "<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class Proxy:
    """Handles one request after the other as the plan says."""

    def __init__(self, upstream: str, faults: bool, far: bool) -> None:
        self.upstream, self.faults, self.far = upstream, faults, far
        self.known: dict[tuple[str, str], tuple[int, dict[str, str], bytes]] = {}
        self.requests: Counter[tuple[str, str]] = Counter()
        self.served: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.share, self.random = 0.0, random.Random(0)

    def fault(self, request: web.Request) -> str | None:
        """What happens to this request."""
        if not self.faults or request.method not in ("GET", "PUT") or "list-type" in request.query_string or request.path.count("/") < 2:
            return None
        kinds: tuple[str, ...] = WRITES if request.method == "PUT" else READS
        if not request.path.endswith((".tar", ".idx")):
            kinds = tuple(kind for kind in kinds if kind not in ("other bytes", "short"))
        came = self.requests[request.method, request.path]
        self.requests[request.method, request.path] += 1
        return kinds[(zlib.crc32(request.path.encode()) + came) % len(kinds)] if came < FAILS else None

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/served":
            return web.json_response(self.served)
        if request.path == "/written":
            return web.json_response(self.written)
        if request.path == "/refuse":
            self.share = float(request.query["share"])
            return web.Response()
        body = await request.read()
        if self.far:
            await asyncio.sleep(LATENCY_S)
        fault = "slow down" if self.random.random() < self.share else self.fault(request)
        self.served[fault or "nothing"] += 1
        if fault == "slow down":
            return web.Response(status=503, text=SLOW_DOWN, content_type="application/xml")
        if fault == "drop":
            return self.dropped(request)
        status, headers, data = await self.answer(request, body)
        if request.method == "PUT" and status == 200:
            self.written[request.path] += 1
        if fault == "other bytes":
            data = data[:-600] + bytes(byte ^ 1 for byte in data[-600:])
        if fault == "short":
            data = data[: len(data) // 2]
        if fault not in ("stall", "cut") and not (self.far and len(data) > PIECE):
            return web.Response(status=status, headers=headers, body=data)
        response = web.StreamResponse(status=status, headers=headers | {"Content-Length": str(len(data))})
        await response.prepare(request)
        if fault is None:
            started = time.monotonic()
            for at in range(0, len(data), PIECE):
                await response.write(data[at : at + PIECE])
                await asyncio.sleep(started + (at + PIECE) / BYTES_PER_S - time.monotonic())
            return response
        await response.write(data[: len(data) // 2])
        if fault == "cut":
            return self.dropped(request)
        await asyncio.sleep(3600)
        return response

    async def answer(self, request: web.Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of moto's answer."""
        asked = request.raw_path, request.headers.get("Range", "")
        if request.method == "GET" and asked in self.known:
            return self.known[asked]
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
        session: ClientSession = request.app["session"]
        async with session.request(request.method, self.upstream + request.raw_path, headers=headers, data=body) as reply:
            data = await reply.read()
        passed = {name: value for name, value in reply.headers.items() if name.lower() not in _HOP}
        if request.method == "HEAD":
            passed["Content-Length"] = reply.headers.get("Content-Length", "0")
        if self.far and request.method == "GET":
            self.known[asked] = reply.status, passed, data
        return reply.status, passed, data

    @staticmethod
    def dropped(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()


def serve() -> None:
    """The proxy's process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--far", action="store_true")
    options = parser.parse_args()
    proxy = Proxy(options.upstream, options.faults, options.far)

    async def session(app: web.Application) -> None:
        app["session"] = ClientSession(auto_decompress=False, cookie_jar=DummyCookieJar())

    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", proxy.handle)
    app.on_startup.append(session)
    web.run_app(app, host="127.0.0.1", port=options.port, print=None, access_log=None)


def proxied(port: int, upstream: str, *words: str) -> list[str]:
    """The command of a proxy before the store at `upstream`."""
    return [sys.executable, __file__, "--port", str(port), "--upstream", upstream, *words]


def refuse(proxy: str, share: float) -> None:
    """From now on the proxy answers that share of all requests with 503."""
    urllib.request.urlopen(f"{proxy}/refuse?share={share}", timeout=30).close()


def written(proxy: str) -> dict[str, int]:
    """How often each file was written, by its path with the bucket."""
    with urllib.request.urlopen(f"{proxy}/written", timeout=30) as reply:
        return dict(json.load(reply))


@contextmanager
def store(folder: Path, *, faults: bool = False, far: bool = False) -> Iterator[Callable[[], dict[str, int]]]:
    """An empty store with the bucket `allograft`, and this process's environment set to use it through the proxy."""
    import boto3
    import s3fs

    ports = services.free_ports(2)
    moto, proxy = (f"http://127.0.0.1:{port}" for port in ports)
    given = {
        "AWS_ENDPOINT_URL": proxy,
        "AWS_ACCESS_KEY_ID": "allograft",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16),
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in given}
    commands = [
        [services.tool("moto_server"), "-H", "127.0.0.1", "-p", str(ports[0])],
        proxied(ports[1], moto, *["--faults"] * faults, *["--far"] * far),
    ]
    running = services.Services(folder, dict(os.environ), {})
    try:
        os.environ.update(given)
        s3fs.S3FileSystem.clear_instance_cache()  # they are kept by their arguments, which do not name the address
        for name, command in zip(("moto", "proxy"), commands, strict=True):
            with open(folder / f"{name}.log", "wb") as log:
                running.running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        running.wait("moto", lambda: services.answers(f"{moto}/moto-api/"))
        running.wait("proxy", lambda: services.answers(f"{proxy}/served"))
        boto3.client("s3", endpoint_url=moto).create_bucket(Bucket="allograft")

        def seen() -> dict[str, int]:
            with urllib.request.urlopen(f"{proxy}/served") as reply:
                return dict(json.load(reply))

        yield seen
    finally:
        services.end(*(process.pid for process in running.running.values()))
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        s3fs.S3FileSystem.clear_instance_cache()


if __name__ == "__main__":
    serve()
