"""Pages in headless Chromium, through its DevTools protocol."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FOUND = next((path for name in NAMES if (path := shutil.which(name))), None)
SECONDS = 60.0  # that the browser may take to start, and for an answer


class Page:
    """One page: what was logged or thrown in it, and commands to it."""

    def __init__(self, address: str):
        import websocket

        self._socket = websocket.create_connection(address, timeout=SECONDS, suppress_origin=True)
        self._ids, self.errors, self._loaded = itertools.count(1), [], 0
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        """Let go of the page."""
        self._socket.close()

    def send(self, method: str, **parameters: Any) -> dict:
        """The answer to a command of the protocol."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self._socket.recv())
            if said.get("id") == number:
                assert "error" not in said, said
                return said["result"]
            self._hear(said)

    def _hear(self, said: dict) -> None:
        of, what = said.get("method"), said.get("params", {})
        if of == "Page.loadEventFired":
            self._loaded += 1
        bad = of == "Runtime.exceptionThrown"
        bad |= of == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert")
        bad |= of == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning")
        if bad:
            self.errors.append(what)

    def open(self, path: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file in a window of this size and colour scheme, until its plots are there."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        before = self._loaded
        self.send("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + SECONDS
        drawn = "typeof PLOTS == 'undefined' || document.querySelectorAll('.plot .plot-container')\
                 .length == Object.keys(PLOTS).length"
        while self._loaded == before or not self.value(drawn):
            assert time.monotonic() < end, "the page does not load"
            self.value("0")  # events come with answers
            time.sleep(0.05)
        self.value("new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page."""
        found = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def mouse(self, kind: str, x: float, y: float) -> None:
        """Move, press or release the mouse at a place of the window."""
        button = {"button": "left", "clickCount": 1}
        self.send("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, **button)

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A browser with one empty page; its profile is in this folder."""
    assert FOUND is not None
    options = ["--headless=new", "--remote-debugging-port=0", "--no-sandbox", "--disable-gpu",
               "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars",
               f"--user-data-dir={folder}"]  # fmt: skip
    quiet = subprocess.DEVNULL
    with subprocess.Popen([FOUND, *options, "about:blank"], stdout=quiet, stderr=quiet) as process:
        try:
            page = Page(_address(process, folder / "DevToolsActivePort"))
            try:
                yield page
            finally:
                page.close()
        finally:
            process.terminate()


def _address(process: subprocess.Popen, port: Path) -> str:
    """Of the page, once the browser has said on which port it listens."""
    import urllib.request

    end = time.monotonic() + SECONDS
    while not (port.exists() and port.read_text().count("\n")):
        assert process.poll() is None and time.monotonic() < end, "the browser does not start"
        time.sleep(0.05)
    number = port.read_text().split("\n")[0]
    local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with local.open(f"http://127.0.0.1:{number}/json") as answer:
        pages = json.load(answer)
    return next(each["webSocketDebuggerUrl"] for each in pages if each["type"] == "page")
