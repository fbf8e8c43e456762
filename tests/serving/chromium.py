"""A headless Chromium, driven over a pipe by the DevTools protocol: no driver and no package is needed."""

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time

import pytest

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless=new", "--disable-gpu", "--no-first-run", "--disable-extensions", "--hide-scrollbars")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--no-sandbox")
in_a_browser = pytest.mark.skipif(
    FOUND is None, reason="no chromium, chromium-browser or google-chrome is on this machine"
)
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, " ": 32}


@contextlib.contextmanager
def browser(folder):
    """A page of a browser whose files are in that folder."""
    (theirs, to_it), (from_it, its) = os.pipe(), os.pipe()
    # The browser reads commands on its file 3 and answers on 4.
    line = f'exec "$0" "$@" 3<&{theirs} 4>&{its} 2>/dev/null'
    words = ["bash", "-c", line, FOUND, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder}"]
    process = subprocess.Popen([*words, "about:blank"], pass_fds=(theirs, its))
    os.close(theirs), os.close(its)
    try:
        yield Page(to_it, from_it)
    finally:
        process.terminate()
        process.wait(20)
        os.close(to_it), os.close(from_it)


class Page:
    """One page. `complaints` are errors of its scripts, of its security policy, and of what it loads."""

    def __init__(self, to_it, from_it):
        self._to_it, self._from_it, self._session, self._rest = to_it, from_it, None, b""
        self._numbers, self.complaints = itertools.count(1), []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": params}
        command |= {} if self._session is None else {"sessionId": self._session}
        os.write(self._to_it, json.dumps(command).encode() + b"\0")
        while (message := self._next()).get("id") != number:
            level = message.get("params", {}).get("entry", {}).get("level")
            if message.get("method") == "Runtime.exceptionThrown" or level in ("warning", "error"):
                self.complaints.append(json.dumps(message["params"])[:500])
        assert "error" not in message, (method, message)
        return message["result"]

    def _next(self, seconds=20):
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            assert select.select([self._from_it], [], [], max(end - time.monotonic(), 0))[0], "no answer"
            self._rest += os.read(self._from_it, 2**16)
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def eval(self, code):
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, code, seconds=10.0):
        """Waits until an expression is true, and returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.eval(code)):
            assert time.monotonic() < end, (
                f"never {code}; the page says {self.eval('document.body.innerText')!r}"
            )
            time.sleep(0.01)
        return value

    def open(self, address):
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def size(self, width, height, phone=False):
        scale = 2 if phone else 1
        facts = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **facts)

    def place(self, selector):
        """(x, y, width, height) of an element, scrolled to."""
        find = f"document.querySelector({json.dumps(selector)})"
        code = f"(e => (e.scrollIntoView({{block: 'center'}}), e.getBoundingClientRect().toJSON()))({find})"
        box = self.eval(code)
        return box["x"], box["y"], box["width"], box["height"]

    def click(self, selector):
        x, y, width, height = self.place(selector)
        assert width and height, f"{selector} cannot be seen"
        for kind in ("mousePressed", "mouseReleased"):
            where = {"x": x + width / 2, "y": y + height / 2}
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def press(self, key, modifiers=0):
        text = {"Enter": "\r", " ": " "}.get(key)
        facts = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **facts, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def write(self, selector, text):
        """Types into a field in place of what is there."""
        self.click(selector)
        self.eval("document.activeElement.select()")
        self.type(text)

    def screenshot(self, clip=None):
        """The bytes of a PNG of the window, or of (x, y, width, height) in it."""
        names = ("x", "y", "width", "height")
        options = {} if clip is None else {"clip": dict(zip(names, clip, strict=True)) | {"scale": 1}}
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"])
