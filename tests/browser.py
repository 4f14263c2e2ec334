"""A headless Chromium, driven through its DevTools protocol over two pipes; no socket."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """Where Chromium is, or None."""
    return next((place for name in NAMES if (place := shutil.which(name))), None)


class BrowserError(AssertionError):
    """What a page threw, or the browser refused."""


class Browser:
    """One tab.

    Attributes:
        said: what pages wrote to their consoles, and errors they threw.
    """

    def __init__(self) -> None:
        self.profile, self.downloads = tempfile.mkdtemp(), Path(tempfile.mkdtemp())
        to_browser, self.out = os.pipe()
        self.incoming, from_browser = os.pipe()

        def connect() -> None:
            # 3 and 4 are where --remote-debugging-pipe reads and writes; out of their way first
            reads = fcntl.fcntl(to_browser, fcntl.F_DUPFD, 10)
            writes = fcntl.fcntl(from_browser, fcntl.F_DUPFD, 10)
            os.dup2(reads, 3)
            os.dup2(writes, 4)

        self.process = subprocess.Popen(
            [
                find_browser() or NAMES[0], "--headless", "--no-sandbox", "--disable-gpu",
                "--remote-debugging-pipe", f"--user-data-dir={self.profile}", "--no-first-run",
                "--hide-scrollbars", "--disable-background-networking",
            ],
            close_fds=False, preexec_fn=connect,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self.rest, self.number, self.said, self.events = b"", 0, [], []
        self.session = None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.send(
            "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads),
            eventsEnabled=True,
        )  # fmt: skip

    def send(self, method, **parameters):
        """Call a method of the protocol; what it returns."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        self._write(json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            self._note(answer)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        return answer["result"]

    def _write(self, content):
        while content:
            content = content[os.write(self.out, content) :]

    def _read(self):
        while b"\0" not in self.rest:
            part = os.read(self.incoming, 1 << 20)
            if not part:
                raise BrowserError("the browser is gone")
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        method, parameters = event.get("method"), event.get("params", {})
        self.events.append(method)
        if method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.said.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled":
            self.said.append(str([a.get("value") for a in parameters["args"]]))
        elif method == "Log.entryAdded":
            self.said.append(parameters["entry"]["text"])

    def open(self, page, width=1400, height=1000, dark=False, scripts=True):
        """Load a file; seconds until it was ready."""
        self.said.clear()
        self.send("Emulation.setScriptExecutionDisabled", value=not scripts)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.events.clear()
        start = time.perf_counter()
        self.send("Page.navigate", url=Path(page).resolve().as_uri())
        while "Page.loadEventFired" not in self.events:
            self._note(self._read())
        return time.perf_counter() - start

    def run(self, script):
        """What an expression gives, in the page."""
        result = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise BrowserError(details.get("exception", {}).get("description", details["text"]))
        return result["result"].get("value")

    def key(self, name, code=0, text=""):
        """Press a key and let it go."""
        keys = {"key": name, "code": name, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **keys)
        self.send("Input.dispatchKeyEvent", type="keyUp", **keys)

    def screenshot(self, file, *, whole=False):
        """Write what is seen as PNG."""
        got = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(file).write_bytes(base64.b64decode(got["data"]))

    def close(self):
        """End the browser and remove what it kept."""
        self.session = None
        try:
            self.send("Browser.close")
            self.process.wait(10)
        except (BrowserError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.out)
        os.close(self.incoming)
        for place in (self.profile, self.downloads):
            shutil.rmtree(place, ignore_errors=True)
