"""A headless Chromium, driven over the W3C's WebDriver protocol: JSON over loopback HTTP.

Two dozen lines of it are all that the tests need, so no driver's package is.
"""

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

DRIVER = shutil.which("chromedriver")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference
# arguments[0] of what is inserted is the first of the caller's own.
_WAIT = """
const [ms, ...own] = arguments, until = performance.now() + ms;
return (async () => {
  for (;;) {
    const found = (function () { %s }).apply(null, own);
    if (found || performance.now() > until) return found;
    await new Promise((next) => setTimeout(next, 15));
  }
})();
"""
_loopback = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Browser:
    """One window. Elements are given by CSS selectors, scripts as bodies of functions."""

    def __init__(self, address, session):
        self._session = f"{address}/session/{session}"

    def _call(self, method, path, **body):
        return _call(method, self._session + path, body if method == "POST" else None)

    def open(self, url):
        self._call("POST", "/url", url=url)

    def run(self, script, *arguments):
        """What a script returns; where that is a promise, what becomes of it."""
        return self._call("POST", "/execute/sync", script=script, args=arguments)

    def _element(self, selector):
        found = self._call("POST", "/element", using="css selector", value=selector)
        return f"/element/{found[_ELEMENT]}"

    def click(self, selector):
        """As a person does: once it is seen, which after a dialog closes may be a moment later.

        Again where a page that moves had something else there; what stays covered fails.
        """
        self.wait(f"return document.querySelector({json.dumps(selector)})?.checkVisibility()")
        for n_left in reversed(range(20)):
            try:
                return self._call("POST", self._element(selector) + "/click")
            except AssertionError as error:
                if not n_left or "intercepted" not in str(error):
                    raise
                time.sleep(0.1)

    def type(self, selector, text):
        self._call("POST", self._element(selector) + "/value", text=text)

    def text(self, selector):
        return self._call("GET", self._element(selector) + "/text")

    def press(self, *keys):
        """Keys, one after another, wherever the focus is."""
        pressed = [{"type": kind, "value": k} for k in keys for kind in ("keyDown", "keyUp")]
        self._act({"type": "key", "id": "keys", "actions": pressed})

    def point(self, x, y):
        """Move the mouse there."""
        move = {"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0}
        self._act({"type": "pointer", "id": "mouse", "actions": [move]})

    def _act(self, source):
        self._call("POST", "/actions", actions=[source])

    def wait(self, script, *arguments, seconds=15):
        """Until a script returns something true, which is given back; AssertionError in the end."""
        found = self.run(_WAIT % script, seconds * 1000, *arguments)
        assert found, f"it did not come to pass: {script}"
        return found

    def resize(self, width, height, *, touch=False, dark=False):
        """The size of the page in CSS pixels, and what its media queries see."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self.cdp("Emulation.setDeviceMetricsOverride", **size)
        self.cdp("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])

    def cdp(self, name, **parameters):
        """A command of Chromium's own protocol."""
        return self._call("POST", "/goog/cdp/execute", cmd=name, params=parameters)

    def screenshot(self):
        """PNG bytes of what is in view."""
        return base64.b64decode(self._call("GET", "/screenshot"))

    def log(self, kind):
        """Entries since the last call: of the page's console ('browser'), or 'performance'."""
        return self._call("POST", "/se/log", type=kind)

    def requests(self):
        """(address, body that was sent or None, id) of each request since the last call."""
        entries = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        sent = [e["params"] for e in entries if e["method"] == "Network.requestWillBeSent"]
        return [
            (p["request"]["url"], p["request"].get("postData"), p["requestId"])
            for p in sent
            if p["request"]["url"].partition(":")[0] not in ("chrome", "data")
        ]

    def response(self, request):
        """The body that came for a request of this page, by its id."""
        found = self.cdp("Network.getResponseBody", requestId=request)
        return base64.b64decode(found["body"]).decode() if found["base64Encoded"] else found["body"]


@contextmanager
def browser(profile):
    """A Browser that keeps what it keeps in the folder `profile`, until the block ends."""
    command = [DRIVER, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as driver:
        session = None
        try:
            port = next(
                m[1]
                for line in driver.stdout
                if (m := re.search(rb"successfully on port (\d+)", line))
            )
            address = f"http://127.0.0.1:{int(port)}"
            options = {"args": [*_FLAGS, f"--user-data-dir={profile}"], "binary": BROWSER}
            wanted = {
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"performance": "ALL", "browser": "ALL"},
            }
            body = {"capabilities": {"alwaysMatch": wanted}}
            session = _call("POST", f"{address}/session", body)["sessionId"]
            yield Browser(address, session)
        finally:
            if session is not None:
                _call("DELETE", f"{address}/session/{session}")
            driver.terminate()


def _call(method, url, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method)
    try:
        with _loopback.open(request, timeout=60) as response:
            return json.load(response)["value"]
    except urllib.error.HTTPError as error:
        with error:
            value = json.load(error)["value"]
        raise AssertionError(f"{value['error']}: {value['message'].splitlines()[0]}") from None
