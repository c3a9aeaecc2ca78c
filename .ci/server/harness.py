"""A server under test, and how checks are written."""
import collections
import contextlib
import functools
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
import traceback
from pathlib import Path

import httpx

START_SECONDS = 120
EMBEDDED = Path(__file__).resolve().parents[2] / "crates/cli/assets/glm-stories"
# How Qwen and Hermes are told of functions and call them.
CALLS = (Path(__file__).resolve().parent / "calls.jinja").read_text()
Check = collections.namedtuple("Check", "name run")
CHECKS = []


class Skip(Exception):
    """The binary does not have what a check is about."""


def check(name):
    """Registers a check; it gets the context, may return a note, and fails by raising."""
    def register(run):
        CHECKS.append(Check(name, run))
        return run
    return register


def expect(condition, *found):
    """Raises with what was found; unlike assert it stays when Python optimizes."""
    if not condition:
        raise AssertionError(" ".join(str(part)[:20000] for part in found) or "not so")


def equal(found, expected, what=""):
    expect(found == expected, f"{what}: expected {expected!r}, found {found!r}")


def failure(error):
    """An error in one or a few lines: what it says, and the line of a check that it comes from."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/.ci/" in f.filename.replace(os.sep, "/")]
    own = [f for f in frames if not f.filename.endswith(("harness.py", "check_server.py"))]
    at = f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}: {own[-1].line}" if own else "?"
    return f"{at}\n         {type(error).__name__}: {str(error)[:20000]}"


class Server:
    """A process of `marlin serve`."""

    def __init__(self, marlin, *options, model=None, env=None, folder=None, wait=True):
        self.own_folder = None if folder else tempfile.mkdtemp(prefix="marlin-check-")
        # Neither settings nor keys of whoever runs this.
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MARLIN_")}
        clean |= {"XDG_CONFIG_HOME": folder or self.own_folder, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", **(env or {})}
        command = [marlin, "serve"]
        if model:
            command += ["-m", model]
        if not any(option.startswith("--port") for option in options) and "MARLIN_PORT" not in clean:
            command += ["--port", "0"]
        self.lines = []
        self.ready = threading.Event()
        self.url = None
        self.process = subprocess.Popen(
            [*command, *options], env=clean, cwd=folder or self.own_folder, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        threading.Thread(target=self._read, daemon=True).start()
        if wait:
            self.wait_ready()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            found = re.match(r"ready: (https?://\S+)", line)
            if found:
                self.url = found[1]
                self.ready.set()
        self.ready.set()

    def wait_ready(self):
        self.ready.wait(START_SECONDS)
        if self.url is None:
            # Its output may end a moment before it does.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
            code = self.process.poll()
            said = "\n".join(self.lines[-20:])
            self.stop()
            raise AssertionError(f"the server did not start (exit {code}):\n{said}")
        self.port = int(self.url.rsplit(":", 1)[1])

    def alive(self):
        return self.process.poll() is None

    def signal(self, number=signal.SIGTERM):
        self.process.send_signal(number)

    def wait(self, seconds):
        """Exit code; an error if it has not ended by then."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s") from None

    def stop(self):
        if self.alive():
            self.process.kill()
            self.process.wait()
        if self.own_folder:
            shutil.rmtree(self.own_folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    # Requests.

    @functools.cached_property
    def client(self):
        # A connection for each request: what one of them does to its connection is not to fail the next.
        return httpx.Client(base_url=self.url, timeout=120, verify=False, limits=httpx.Limits(max_keepalive_connections=0))

    def request(self, method, path, **more):
        return self.client.request(method, path, **more)

    def get(self, path, **more):
        return self.request("GET", path, **more)

    def post(self, path, body, **more):
        return self.request("POST", path, json=body, **more)

    def chat(self, text, headers=None, **more):
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **more}
        return self.post("/v1/chat/completions", body, headers=headers)

    def metric(self, name):
        """Sum of a metric over its labels."""
        lines = [line for line in self.get("/metrics").text.splitlines() if re.match(rf"{re.escape(name)}[ {{]", line)]
        expect(lines, f"no metric {name}")
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    def idle(self, within=2.0):
        """Waits until nothing is under way and no block is in use."""
        names = ["marlin:num_requests_running", "marlin:num_requests_waiting", "marlin:kv_cache_usage_perc"]
        start = time.monotonic()
        while True:
            found = {name: self.metric(name) for name in names}
            if not any(found.values()):
                return
            expect(time.monotonic() - start < within, f"not idle after {within} s: {found}")
            time.sleep(0.02)


def events(response):
    """Data of the events of a streamed httpx response."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line[6:]


@contextlib.contextmanager
def streaming(server, body, path="/v1/chat/completions", **more):
    """A streamed request: yields the iterator of its events."""
    with server.client.stream("POST", path, json={**body, "stream": True}, **more) as response:
        if response.status_code != 200:
            raise AssertionError(f"{response.status_code}: {response.read()[:500]}")
        yield events(response)


def streamed_text(server, body, **more):
    """Text of a streamed chat answer; fails unless the stream is whole."""
    text, last, reason = [], None, None
    with streaming(server, body, **more) as data:
        for last in data:
            if last == "[DONE]":
                break
            chunk = json.loads(last)
            expect("error" not in chunk, chunk)
            for choice in chunk["choices"]:
                text.append(choice["delta"].get("content") or "")
                reason = choice["finish_reason"] or reason
    equal(last, "[DONE]", "end of the stream")
    expect(reason is not None, "no finish_reason came")
    return "".join(text)


def error_shape(response, status=None):
    """The inner object of an error in OpenAI's shape."""
    if status is not None:
        equal(response.status_code, status, f"status ({response.text[:300]})")
    kind = response.headers.get("content-type", "")
    expect(kind.startswith("application/json"), f"{response.status_code} with content-type {kind!r}: {response.text[:300]}")
    body = response.json()
    equal(set(body), {"error"}, "fields of the body")
    error = body["error"]
    expect({"message", "type", "param", "code"} <= set(error), error)
    expect(isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str), error)
    for field in ("param", "code"):
        expect(error[field] is None or isinstance(error[field], str), error)
    return error


def raw(port, method, path, body=b"", headers=None, seconds=30):
    """(status, headers, body) of a request whose bytes are sent as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


class Context:
    """What checks share: the binary, a server with usual settings, clients, what the binary has."""

    def __init__(self, marlin, model):
        self.marlin, self.model = marlin, model
        self._server = self._folder = None

    @property
    def server(self):
        if self._server is None:
            self._server = self.start("--context", "2048", "--cache-tokens", "8192")
        return self._server

    def start(self, *options, **more):
        return Server(self.marlin, *options, model=self.model, **more)

    def run(self, *arguments, env=None, folder=None, seconds=60):
        """A finished `marlin …`."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MARLIN_")}
        clean |= {"XDG_CONFIG_HOME": folder or "/nonexistent", "NO_COLOR": "1", **(env or {})}
        return subprocess.run([self.marlin, *arguments], env=clean, cwd=folder, capture_output=True, text=True, timeout=seconds)

    def revive(self):
        """A server that a check brought down must not fail the others; the check has told."""
        if self._server is not None and not self._server.alive():
            print(f"         the server ended with {self._server.process.returncode}:", *self._server.lines[-10:], sep="\n         ")
            self._server.stop()
            self._server = None

    @functools.cached_property
    def caller(self):
        """The same with a model that calls functions: the embedded one with a template that tells it of them, unless another is named."""
        if self.model:
            return self
        self._folder = tempfile.mkdtemp(prefix="marlin-caller-")
        model = Path(self._folder) / "caller"
        shutil.copytree(EMBEDDED, model)
        (model / "chat_template.jinja").write_text(CALLS)
        return Context(self.marlin, str(model))

    def close(self):
        if self._server is not None:
            self._server.stop()
        if self._folder is not None:
            self.caller.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def openai(self):
        import openai
        return openai.OpenAI(base_url=self.server.url + "/v1", api_key="none", max_retries=0, timeout=120)

    @property
    def model_id(self):
        return self.server.get("/v1/models").json()["data"][0]["id"]

    @functools.cache
    def _lacks(self, path, body):
        response = self.server.request("POST", path, content=body, headers={"content-type": "application/json"})
        error = response.json().get("error", {}) if response.status_code in (400, 404) else {}
        if response.status_code == 404 and error.get("code") != "model_not_found":
            return f"this binary has no {path}"
        if error.get("code") == "unsupported_parameter" or "no known form of calls" in error.get("message", ""):
            return f"this binary refuses {error.get('param') or 'it'} ({error.get('message')})"
        return None

    def needs(self, path, body):
        """Skips the check when the binary answers `body` at `path` with 404 or `unsupported_parameter`."""
        reason = self._lacks(path, json.dumps(body))
        if reason:
            raise Skip(reason)

    def needs_chat(self, **more):
        """Skips the check when chat requests with these fields are refused as unsupported."""
        self.needs("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, **more})
