"""A headless Chromium driven over a pipe (DevTools protocol), for tests and pictures of the page. Needs no library.

with Browser.launch() as browser:
    browser.open("http://127.0.0.1:8000/")
    browser.wait("document.querySelectorAll('figure img').length > 0")
    browser.screenshot(Path("page.png"))
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Names under which it is installed.
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_chromium() -> str | None:
    """The program, None where there is none."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Browser:
    """One page of a running Chromium.

    Attributes:
        complaints: errors and warnings that the page's scripts left in the console, and uncaught exceptions.
    """

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read, self._rest, self._number, self._session = write, read, b"", 0, ""
        self._answers: dict[int, dict[str, Any]] = {}
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    @classmethod
    @contextlib.contextmanager
    def launch(cls, program: str | None = None, width: int = 1280, height: int = 860) -> Iterator[Browser]:
        """Start Chromium with a profile of its own, and end it with all its processes.

        Raises:
            RuntimeError: where there is no Chromium.
        """
        program = program or find_chromium()
        if program is None:
            raise RuntimeError(f"none of {', '.join(PROGRAMS)} is installed")
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
            options += ["--remote-debugging-pipe", f"--user-data-dir={profile}", f"--window-size={width},{height}"]
            # Chromium takes the pipe at descriptors 3 and 4, which may be in use here: the shell puts it there
            shell = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
            process = subprocess.Popen(
                ["bash", "-c", shell, program, *options], pass_fds=(theirs_in, theirs_out), start_new_session=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                for theirs in (theirs_in, theirs_out):
                    os.close(theirs)
                yield cls(ours_out, ours_in)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                for ours in (ours_out, ours_in):
                    os.close(ours)

    def open(self, url: str) -> None:
        """Load a page and wait until it is there."""
        self._call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The JSON value of an expression; RuntimeError when it throws."""
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, condition: str, seconds: float = 60.0) -> None:
        """Wait until an expression is true; TimeoutError when it never is."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() >= end:
                raise TimeoutError(f"{condition} did not come true in {seconds:g} s; console: {self.complaints}")
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """Press the mouse at the middle of an element."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.drag([(x, y)])

    def drag(self, points: list[tuple[float, float]]) -> None:
        """Press the mouse at the first point, move it over the others and let go; pixels of the window."""
        self._mouse("mousePressed", points[0])
        for point in points[1:]:
            self._mouse("mouseMoved", point)
        self._mouse("mouseReleased", points[-1])

    def key(self, key: str, code: str, number: int, text: str = "", shift: bool = False) -> None:
        """Press and let go a key; see DevTools' `Input.dispatchKeyEvent`."""
        given = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": 8 if shift else 0}
        self._call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **given)
        self._call("Input.dispatchKeyEvent", type="keyUp", **given)

    def media(self, **features: str) -> None:
        """Pretend preferences of the reader, such as `prefers_color_scheme="dark"`."""
        given = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self._call("Emulation.setEmulatedMedia", features=given)

    def resize(self, width: int, height: int) -> None:
        """Another size of the window, in CSS pixels."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def screenshot(self, path: Path) -> None:
        """Write what the window shows as a PNG."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def _mouse(self, kind: str, point: tuple[float, float]) -> None:
        x, y = point
        self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while self._number not in self._answers:
            self._receive()
        answer = self._answers.pop(self._number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> None:
        if not select.select([self._read], [], [], 60)[0]:
            raise TimeoutError("Chromium did not answer for 60 s")
        data = os.read(self._read, 1 << 20)
        if not data:
            raise RuntimeError("Chromium ended")
        *messages, self._rest = (self._rest + data).split(b"\0")
        for text in messages:
            message = json.loads(text)
            if "id" in message:
                self._answers[message["id"]] = message
            elif message["method"] == "Runtime.exceptionThrown":
                self.complaints.append(str(message["params"]["exceptionDetails"]))
            elif message["method"] == "Log.entryAdded":
                entry = message["params"]["entry"]
                self.complaints += [entry["text"]] if entry["level"] in ("error", "warning") else []
