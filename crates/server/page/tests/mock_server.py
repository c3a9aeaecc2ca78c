#!/usr/bin/env python3
"""A stand-in for `marlin serve`, for the tests of the page and for working on it.

    mock_server.py [--port 8090]

Serves the page at `/`, its files at `/page/`, and the parts of the API that the page uses. What it
answers depends on a word in the last message: see SCENARIOS. Standard library only.
"""
import argparse
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = ("default-src 'self'; style-src 'self'; script-src 'self'; img-src 'self' data:; "
          "connect-src 'self'")

PAUSE_S = 60

STORY = ("The marlin kept to the deep water until the boats had gone. Then it rose, slowly, "
         "through green light and blue, and for a moment hung above the sea like a held breath.")

MARKDOWN = """## Reading a trellis

EXL3 stores a weight as a *walk* through a trellis: **each state** shares all but a few bits with the one before it, \
so `k` bits a weight are enough. A decoder needs three things:

1. the packed states of a 16 × 16 tile,
2. the codebook, which is computed and not stored,
3. scales for inputs and outputs:
   - signs of the rotation,
   - one factor for each channel.

```rust
/// The next state keeps the low bits of the last one.
fn advance(state: u16, bits: u16, k: u32) -> u16 {
    (state << k) | bits
}
```

| bits | size of 7 B | perplexity |
| :-- | --: | --: |
| 2.0 | 1.9 GB | 8.41 |
| 3.0 | 2.8 GB | 6.92 |
| 4.0 | 3.7 GB | 6.61 |

> Right before fast: a number that was not measured is not shown.

- [x] decode on the CPU
- [ ] decode on the GPU

More under [the format's page](https://example.org/exl3) and https://example.org/a_b_c.
"""

EVIL = """<script>window.pwned = 1</script>
<img src=x onerror="window.pwned = 2"><svg onload="window.pwned = 3"></svg>
<iframe src="https://example.org/frame"></iframe><style>body { display: none }</style>

[click](javascript:window.pwned=4) [data](data:text/html,<script>window.pwned=5</script>)
![pixel](https://example.org/pixel.png) <a href="javascript:window.pwned=6">raw</a>

| <b onmouseover="window.pwned = 7">cell</b> | `<i>` |
| --- | --- |
| </td><script>window.pwned = 8</script> | x |

```"><script>window.pwned=9</script>
</code></pre><script>window.pwned = 10</script>
```
The end of it.
"""

FLOOD = [f"Line {i} of **many**, with `code`.\n\n" for i in range(3000)]

UTF8 = "Grüße, 漢字, 🐟🐠, 👩‍🚀 and e\u0301. Ω ≈ ∞."


def pieces(text, size=7):
    return [text[i:i + size] for i in range(0, len(text), size)]


def call(index, arguments, name=None):
    """The delta of a tool call, its first part if it has a name."""
    delta = {"index": index, "function": {"arguments": arguments}}
    if name:
        delta.update(id=f"call_{index}", type="function")
        delta["function"]["name"] = name
    return {"tool_calls": [delta]}


def words(text):
    return [word + " " for word in text.split(" ")]


def content(parts):
    return [{"content": part} for part in parts]


# Word in the last message: (seconds before the first delta, seconds between deltas, deltas). At
# "pause" the server waits for `State.go`, so that a test sees the middle of an answer on a slow machine too.
SCENARIOS = {
    "markdown": (0.05, 0.004, content(pieces(MARKDOWN))),
    "evil": (0.05, 0.004, content(pieces(EVIL))),
    "utf8": (0.02, 0.004, content(pieces(UTF8, 1))),
    "forever": (0.05, 0.03, content([f"word {i} " for i in range(2000)])),
    "patient": (0.0, 0.01, ["pause", *content(words(STORY))]),
    "flood": (0.0, 0.0, content(FLOOD[:500]) + ["pause"] + content(FLOOD[500:])),
    "think": (0.05, 0.02, [{"reasoning_content": part} for part in words("First I weigh the question, then I look for *the short way* to say it.")] + ["pause"]
              + content(words("The short way is the answer itself."))),
    "tools": (0.05, 0.02, content(["I look that up."])
              + [call(0, "", "get_weather"), call(0, '{"city": "Ha'), call(0, 'vana", "unit": "celsius"}'),
                 call(1, '{"zone": "America/Havana"}', "get_time")]),
    "broken": (0.05, 0.02, content(words("This stops short")) + ["error"]),
    "severed": (0.05, 0.02, content(words("The line goes dead")) + ["sever"]),
    "length": (0.05, 0.01, content(words("Cut off in the middle of a"))),
}

# Word in the last message: (status, error, headers).
ERRORS = {
    "refuse": (400, {"message": "temperature must lie between 0 and 2, found 9; lower it", "type": "invalid_request_error",
                     "param": "temperature", "code": "invalid_value"}, {}),
    "busy": (429, {"message": "too many requests wait; try again later", "type": "rate_limit_error", "param": None,
                   "code": "queue_full"}, {"Retry-After": "7"}),
}


class State:
    """What a test may change while the server runs, and what it may look at."""

    def __init__(self):
        self.key = None
        self.loading = False
        self.metrics = True
        self.models = ["glm-stories", "SmolLM2-135M-Instruct"]
        self.requests = []  # bodies of completions
        self.running = 0
        self.go = threading.Event()
        self.aborted = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def send(self, status, body, kind="application/json", headers=()):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def error(self, status, message, kind, param=None, code=None, headers=()):
        self.send(status, {"error": {"message": message, "type": kind, "param": param, "code": code}}, headers=headers)

    def admitted(self):
        state = self.server.state
        if state.key and self.headers.get("Authorization") != f"Bearer {state.key}":
            self.error(401, "wrong or missing API key", "authentication_error", code="invalid_api_key")
        elif state.loading:
            self.error(503, "the model is being loaded", "server_error", code="loading", headers={"Retry-After": "1"})
        else:
            return True
        return False

    def do_GET(self):
        path = self.path.split("?", 1)[0]
        state = self.server.state
        if path == "/" or path.startswith("/page/"):
            file = (PAGE / ("index.html" if path == "/" else path[len("/page/"):])).resolve()
            if PAGE in file.parents and file.suffix in TYPES and file.is_file():
                return self.send(200, file.read_bytes(), TYPES[file.suffix] + "; charset=utf-8")
        elif path == "/v1/models" and self.admitted():
            return self.send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in state.models]})
        elif path == "/metrics" and state.metrics and self.admitted():
            use = min(0.93, 0.11 + 0.23 * state.running)
            text = (f'# TYPE vllm:kv_cache_usage_perc gauge\nvllm:kv_cache_usage_perc{{model_name="{state.models[0]}"}} {use}\n'
                    f'vllm:num_requests_running{{model_name="{state.models[0]}"}} {state.running}\n')
            return self.send(200, text.encode(), "text/plain; version=0.0.4")
        if path not in ("/v1/models", "/metrics") or (path == "/metrics" and not state.metrics):
            self.error(404, f"{path} is not here", "not_found_error")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            return self.error(404, f"{self.path} is not here", "not_found_error")
        if not self.admitted():
            return None
        self.server.state.requests.append(body)
        text = body["messages"][-1]["content"] or ""
        for word, (status, error, headers) in ERRORS.items():
            if word in text:
                return self.send(status, {"error": error}, headers=headers)
        name = next((word for word in SCENARIOS if word in text), None)
        wait, gap, deltas = SCENARIOS.get(name, (0.05, 0.02, content(words(STORY))))
        self.server.state.running += 1
        try:
            self.stream(name, body, wait, gap, deltas)
        except (BrokenPipeError, ConnectionResetError):
            self.server.state.aborted += 1
        finally:
            self.server.state.running -= 1
            self.close_connection = True
        return None

    def stream(self, name, body, wait, gap, deltas):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

        def write(data):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()

        def event(value):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if name != "utf8":
                return write(f"data: {text}\n\n".encode())
            # Everything a stream may do: CRLF, several data lines, other fields, and cuts
            # inside characters and between CR and LF.
            half = text.find(", ") + 2
            lines = [f"data: {text[:half]}", f"data: {text[half:]}"] if half > 1 else [f"data: {text}"]
            data = "\r\n".join([": a comment", "id: 1", *lines, "", ""]).encode()
            for byte in data:
                write(bytes([byte]))
                if byte >= 0x80:
                    time.sleep(0.003)  # or the pieces of a character arrive together
            return None

        def chunk(**fields):
            event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"], **fields})

        write(b": ping\n\n")
        time.sleep(wait)
        chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        for delta in deltas:
            if delta == "pause":
                self.server.state.go.wait(PAUSE_S)
                continue
            if delta == "error":
                event({"error": {"message": "the engine stopped while it wrote this", "type": "server_error", "param": None, "code": None}})
                return write(b"")
            if delta == "sever":
                return None
            chunk(choices=[{"index": 0, "delta": delta, "finish_reason": None}])
            if gap:
                time.sleep(gap)
        tokens = sum(isinstance(delta, dict) for delta in deltas)
        end = {"tools": "tool_calls", "length": "length"}.get(name, "stop")
        chunk(choices=[{"index": 0, "delta": {}, "finish_reason": end}])
        if body.get("stream_options", {}).get("include_usage"):
            chunk(choices=[], usage={"prompt_tokens": 34, "completion_tokens": tokens, "total_tokens": 34 + tokens,
                                     "prompt_tokens_details": {"cached_tokens": 20}})
        event("[DONE]")
        write(b"")
        return None


class Server(ThreadingHTTPServer):
    """Cuts open connections when it stops, as the end of a process does."""

    daemon_threads = True

    def __init__(self, *args):
        super().__init__(*args)
        self.open = set()

    def get_request(self):
        connection, address = super().get_request()
        self.open.add(connection)
        return connection, address

    def shutdown_request(self, request):
        self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        pass  # readers go away in the middle of an answer; that is what some tests do

    def server_close(self):
        super().server_close()
        for connection in list(self.open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Mock:
    """The server in a thread; can be stopped and started again on its port."""

    def __init__(self, port=0):
        self.state = State()
        self.port = port
        self.start()

    def start(self):
        self.server = Server(("127.0.0.1", self.port), Handler)
        self.server.state = self.state
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8090)
    mock = Mock(parser.parse_args().port)
    mock.state.go.set()
    print(mock.url, flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        mock.stop()


if __name__ == "__main__":
    main()
