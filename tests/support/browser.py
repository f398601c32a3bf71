"""A real Chromium without a screen, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--remote-debugging-port=0", "about:blank",
)  # fmt: skip


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self.faults: list[str] = []
        """What the console said that is an error, and what was thrown."""

    async def listen(self) -> None:
        """Take what the browser says, until it is closed."""
        async for message in self._socket:
            said = json.loads(message.data)
            if "id" in said:
                self._calls.pop(said["id"]).set_result(said)
            elif said["method"] == "Runtime.exceptionThrown":
                self.faults.append(json.dumps(said["params"]["exceptionDetails"]))
            elif said["method"] == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                self.faults.append(json.dumps(said["params"]["entry"]))
            elif said["method"] == "Runtime.consoleAPICalled" and said["params"]["type"] != "log":
                self.faults.append(json.dumps(said["params"]["args"]))

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol."""
        self._number += 1
        number = self._number
        self._calls[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        said = await asyncio.wait_for(self._calls[number], 30)
        assert "error" not in said, said
        found: dict[str, Any] = said["result"]
        return found

    async def open(self, url: str, *, width: int = 1280, height: int = 900) -> None:
        """Show a page in a window of this size."""
        await self.resize(width, height)
        await self.call("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def resize(self, width: int, height: int) -> None:
        """Another window."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip

    async def read(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, expression: str, seconds: float = 15) -> None:
        """Wait until it holds."""
        for _ in range(int(seconds * 20)):
            if await self.read(f"Boolean({expression})"):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"never true: {expression}")

    async def shoot(self, path: Path) -> None:
        """All of the page as a PNG."""
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = await self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@asynccontextmanager
async def chromium() -> AsyncIterator[Page]:
    """A tab of a new browser with a profile of its own."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            BROWSER, f"--user-data-dir={profile}", *_FLAGS,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            port = await _port(Path(profile) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as client:
                async with client.get(f"http://127.0.0.1:{port}/json") as answer:
                    (tab,) = [one for one in await answer.json() if one["type"] == "page"]
                async with client.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Page(socket)
                    listener = asyncio.create_task(page.listen())
                    for domain in ("Page", "Runtime", "Log"):
                        await page.call(f"{domain}.enable")
                    yield page
                    listener.cancel()
        finally:
            process.kill()
            await process.wait()


async def _port(file: Path) -> int:
    for _ in range(600):
        if file.exists() and (text := file.read_text()):
            return int(text.splitlines()[0])
        await asyncio.sleep(0.05)
    raise AssertionError("Chromium does not start")
