"""A headless Chromium, spoken to over a pipe in its own protocol: no driver, no download."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


def program():
    """The browser on this machine, if there is one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Tab:
    """A page in a browser. `requested`: every address it asked for. `said`: what its console complained of."""

    def __init__(self, folder, seconds=600):
        ours, theirs = os.pipe(), os.pipe()

        def connect():  # the browser reads its orders from 3 and writes its answers to 4
            reading, writing = os.dup(ours[0]), os.dup(theirs[1])
            os.dup2(reading, 3)
            os.dup2(writing, 4)

        command = [program(), *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder}/profile", "about:blank"]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        self.process = subprocess.Popen(command, preexec_fn=connect, close_fds=False, **quiet)
        os.close(ours[0])
        os.close(theirs[1])
        self.out, self.inn, self.seconds = ours[1], theirs[0], seconds
        self.rest, self.count, self.session, self.requested, self.said = b"", 0, None, [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self.count += 1
        order = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            order["sessionId"] = self.session
        os.write(self.out, json.dumps(order).encode() + b"\0")
        until = time.monotonic() + self.seconds
        while True:
            answer = self._read(until)
            if answer.get("id") == self.count:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self, until):
        while b"\0" not in self.rest:
            assert select.select([self.inn], [], [], max(0, until - time.monotonic()))[0], "the browser is silent"
            part = os.read(self.inn, 1 << 20)
            assert part, "the browser has gone"
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(line)
        facts = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requested.append(facts["request"]["url"])
        elif message.get("method") == "Log.entryAdded":
            self.said.append(facts["entry"]["text"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.said.append(json.dumps(facts["exceptionDetails"])[:500])
        return message

    def run(self, script):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, script):
        """The value of an expression once it is true."""
        until = time.monotonic() + self.seconds
        while not (value := self.run(script)):
            assert time.monotonic() < until, f"never true: {script}; {self.said}"
            time.sleep(0.1)
        return value

    def open(self, address, width=1280, height=900, phone=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Page.navigate", url=address)

    def click(self, selector):
        self.wait(f"!!document.querySelector({json.dumps(selector)})")
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def send(self, selector, file):
        """Choose a file in a file input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def shoot(self, file):
        """The whole page as a PNG file."""
        picture = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        with open(file, "wb") as stream:
            stream.write(base64.b64decode(picture))

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self.session = None
            self.seconds = 10
            self.call("Browser.close")
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.out)
        os.close(self.inn)
