"""A real browser for pages: headless Chromium driven through its own protocol (Chrome DevTools), with what aiohttp already brings.

    with Browser() as browser:
        page = browser.open("file:///.../index.html")
        page.run("document.title"), page.errors, page.requests, page.screenshot(390)

Tests that need it are skipped where `CHROMIUM` is not found.
"""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import aiohttp
import psutil

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE_S = 30.0


class Page:
    """One open page. errors: what its console and its scripts complained of; requests: addresses it asked for, but for its own; logins: how
    often the browser was asked for a name and a password."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse, login: tuple[str, str] | None = None
    ) -> None:
        self._loop, self._socket, self._login, self._count, self.logins = loop, socket, login, 0, 0
        self.errors: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol, and its answer; events that come before it are noted."""
        return self._loop.run_until_complete(self._call(method, params))

    async def _call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        number = await self._send(method, params)
        while True:
            told = json.loads((await self._socket.receive(timeout=PATIENCE_S)).data)
            if told.get("id") == number:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return dict(told["result"])
            self._note(told)
            if told.get("method") == "Fetch.requestPaused":
                await self._send("Fetch.continueRequest", {"requestId": told["params"]["requestId"]})
            elif told.get("method") == "Fetch.authRequired":
                assert self._login is not None
                self.logins += 1
                answer = {"response": "ProvideCredentials", "username": self._login[0], "password": self._login[1]}
                await self._send("Fetch.continueWithAuth", {"requestId": told["params"]["requestId"], "authChallengeResponse": answer})

    async def _send(self, method: str, params: dict[str, Any]) -> int:
        self._count += 1
        await self._socket.send_str(json.dumps({"id": self._count, "method": method, "params": params}))
        return self._count

    def _note(self, told: dict[str, Any]) -> None:
        method, params = told.get("method"), told.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"].get("text")))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(one.get("value", one.get("description"))) for one in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            if params["entry"]["source"] != "rendering":  # of a machine without a graphics card, which draws all the same
                self.errors.append(str(params["entry"]["text"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(str(params["request"]["url"]))

    def goto(self, url: str) -> None:
        """Load a page and wait until it is there."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        if self._login is not None:
            self.call("Fetch.enable", handleAuthRequests=True)
        self.call("Page.navigate", url=url)
        end = time.monotonic() + PATIENCE_S
        while self.run("document.readyState") != "complete" or self.run("location.href") == "about:blank":
            if time.monotonic() > end:
                raise TimeoutError(url)
            time.sleep(0.05)
        self.requests = [one for one in self.requests if one != url and not one.startswith(("data:", "about:"))]

    def shows(self, text: str) -> str:
        """All that the page shows, once this text is there. Raises TimeoutError with what it shows instead."""
        end = time.monotonic() + PATIENCE_S
        while text not in (shown := str(self.run("document.body ? document.body.innerText : ''"))):
            if time.monotonic() > end:
                raise TimeoutError(f"no {text!r}, but {shown[:2000]}")
            time.sleep(0.2)
        return shown

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(str(told["exceptionDetails"]))
        return told["result"].get("value")

    def width(self, pixels: int, height: int = 900, dark: bool = False) -> None:
        """The window's size, and whether the reader prefers dark pages."""
        self.call("Emulation.setDeviceMetricsOverride", width=pixels, height=height, deviceScaleFactor=1, mobile=pixels < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="", features=[scheme])

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """As PNG: the window, or the whole page."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


class Browser:
    """A Chromium of its own, with a profile that goes with it."""

    def __enter__(self) -> Self:
        assert CHROMIUM is not None
        self._profile = tempfile.TemporaryDirectory(prefix="browser-")
        words = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        words += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"]
        words += [f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        file, end = Path(self._profile.name) / "DevToolsActivePort", time.monotonic() + PATIENCE_S
        while not (file.exists() and len(file.read_text().splitlines()) > 1):
            if time.monotonic() > end or self._process.poll() is not None:
                raise TimeoutError("Chromium does not start")
            time.sleep(0.05)
        self._port = int(file.read_text().splitlines()[0])
        self._loop = asyncio.new_event_loop()
        self._session = self._loop.run_until_complete(self._connect())
        return self

    async def _connect(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession()

    def open(self, url: str, login: tuple[str, str] | None = None) -> Page:
        """The page at an address, loaded; `login` is what the browser answers whoever asks for a name and a password."""

        async def socket() -> aiohttp.ClientWebSocketResponse:
            async with self._session.get(f"http://127.0.0.1:{self._port}/json/list") as reply:
                target = next(one for one in await reply.json() if one["type"] == "page")
            return await self._session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)

        page = Page(self._loop, self._loop.run_until_complete(socket()), login)
        page.goto(url)
        return page

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._session.close())
        self._loop.close()
        helpers = psutil.Process(self._process.pid).children(recursive=True)
        self._process.terminate()
        self._process.wait(10)
        psutil.wait_procs(helpers, 10)  # they write into the profile to their end
        self._profile.cleanup()
