"""Headless Chromium for tests, driven through chromedriver's HTTP interface: https://www.w3.org/TR/webdriver2/."""

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key of an element's id in WebDriver's JSON
KEYS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015"}
FLAGS = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
FLAGS += " disable-component-update disable-sync window-size=1400,900"


class Browser:
    """One browser with one page. Requests and console messages are logged from its start."""

    def __init__(self, profile: Path):
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        command = [DRIVER, "--port=0"]
        self.driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        line = next(line for line in self.driver.stdout if "started successfully" in line)
        port = re.search(r"port (\d+)", line)[1]
        self.address = f"http://127.0.0.1:{port}/session"
        flags = [f"--{flag}" for flag in FLAGS.split()] + [f"--user-data-dir={profile}"]
        options = {"goog:chromeOptions": {"binary": CHROMIUM, "args": flags}}
        options["goog:loggingPrefs"] = {"browser": "ALL", "performance": "ALL"}
        session = self.post("", capabilities={"alwaysMatch": {"browserName": "chrome", **options}})
        self.address += "/" + session["sessionId"]

    def request(self, method: str, path: str, body: bytes | None):
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"}, method=method)
        return json.load(self.opener.open(request, timeout=60))["value"]

    def post(self, path: str, **body):
        return self.request("POST", path, json.dumps(body).encode())

    def open(self, path: Path) -> None:
        self.post("/url", url=path.as_uri())

    def run(self, script: str):
        """Return the value of a JavaScript expression."""
        return self.post("/execute/sync", script=f"return {script}", args=[])

    def element(self, selector: str) -> str:
        return self.post("/element", using="css selector", value=selector)[ELEMENT]

    def press(self, selector: str, key: str) -> None:
        self.post(f"/element/{self.element(selector)}/value", text=KEYS[key])

    def click(self, selector: str) -> None:
        self.post(f"/element/{self.element(selector)}/click")

    def point(self, selector: str, x: int = 0) -> None:
        """Move the pointer to x pixels right of an element's center."""
        move = {"type": "pointerMove", "origin": {ELEMENT: self.element(selector)}, "x": x, "y": 0}
        self.post("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": [move]}])

    def devtools(self, command: str, **parameters) -> None:
        """Send a command of https://chromedevtools.github.io/devtools-protocol/."""
        self.post("/goog/cdp/execute", cmd=command, params=parameters)

    def console(self) -> list[str]:
        return [entry["message"] for entry in self.post("/se/log", type="browser")]

    def requested(self, page: Path) -> list[str]:
        """Return the addresses that a page has requested since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.post("/se/log", type="performance")]
        requests = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [request["request"]["url"] for request in requests if request["documentURL"] == page.as_uri()]

    def close(self) -> None:
        self.request("DELETE", "", None)
        self.driver.terminate()
        self.driver.wait(timeout=10)
