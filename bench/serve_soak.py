#!/usr/bin/env python3
"""Soak of `marlin serve`: mixed traffic for minutes, a fifth of it clients that leave, and nothing may grow or stick.

    serve_soak.py [--marlin FILE] [--model MODEL] [--minutes 10] [--clients 12] [--seed 1] [--json FILE]

Starts a server with a small cache (so that prompts queue, are preempted and push each other out), and until the time
is up has every client send one request after the other: 20 % are left by the client (in the middle of a stream, of a
prompt, of an answer that does not stream), 5 % are invalid, 5 % bring tools, half of which require a call, the others are chats,
streams, completions, embeddings, tokens and perplexities. Every few seconds it notes memory and metrics. Without --model it serves
the embedded model, with a template that tells it of tools.

Fails when the server ends, answers 5xx, sends a broken stream or refuses an invalid body in another shape; when memory
grows by more than 3 % after minute 2 (in runs up to 3 minutes: 15 % after the first third); when at the end anything is still
running or a block is not free; when it does not stop by SIGTERM. Standard library only.
"""
import argparse
import asyncio
import collections
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# After minute 2; a run that is shorter ends before every buffer has been as large as it gets.
GROWTH, SHORT_GROWTH = 0.03, 0.15
CONTEXT, CACHE_TOKENS = 512, 1024
ROOT = Path(__file__).resolve().parents[1]
EMBEDDED, CALLS = ROOT / "crates/cli/assets/glm-stories", ROOT / ".ci/server/calls.jinja"
REQUEST_SECONDS = 120
WORDS = "mouse river mill brave old cat house moon bread song winter letter king road lamp".split()
INVALID = [
    b"", b"{", b"[]", b"\xff\xfe", b'{"messages": 3}', b'{"messages": []}', b'{"messages": [{"role": "wizard", "content": "x"}]}', b"[" * 20_000,
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}', b'{"messages": [{"role": "user", "content": "x"}], "nonsense": 1}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 100000}', b'{"messages": [{"role": "user", "content": "' + b"mouse " * 2000 + b'"}]}',
]
SHARES = {"leave": 20, "invalid": 5, "tools": 5, "stream": 34, "chat": 15, "completion": 10, "embedding": 4, "tokenize": 4, "perplexity": 3}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "The weather of a town", "parameters": {
    "type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}}}]


class Wrong(Exception):
    """The server did what it must not."""


def rss_bytes(pid):
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        return int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1]) * 1024
    return int(subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout) * 1024


async def connect(port):
    return await asyncio.open_connection("127.0.0.1", port)


async def send(writer, method, path, body=b""):
    head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()


async def head(reader):
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    return int(lines[0].split(" ")[1]), headers


async def rest(reader, headers):
    if headers.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(headers["content-length"])) if "content-length" in headers else await reader.read()
    parts = []
    while size := int(await reader.readline(), 16):
        parts.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readexactly(2)
    return b"".join(parts)


async def ask(port, path, body, method="POST"):
    """(status, headers, body) of a whole exchange."""
    reader, writer = await connect(port)
    try:
        await send(writer, method, path, body)
        status, headers = await head(reader)
        return status, headers, await rest(reader, headers)
    finally:
        writer.close()


def prompt(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def chat(rng, **more):
    # Some prompts begin alike, so that blocks are shared.
    begin = "Tell me the story of the mill by the river. " * rng.choice([0, 0, 4])
    body = {"messages": [{"role": "user", "content": begin + prompt(rng, rng.choice([3, 10, 60, 150]))}], "max_tokens": rng.choice([4, 12, 24, 48]), **more}
    if rng.random() < 0.5:
        body |= {"temperature": 0}
    if rng.random() < 0.1:
        body |= {"n": 2, "logprobs": True, "top_logprobs": 2}
    if rng.random() < 0.1:
        body |= {"stop": ["mouse", "."]}
    return body


class Soak:
    def __init__(self, port):
        self.port = port
        self.counts = collections.Counter()
        self.faults = []
        self.first_tokens = []

    def fault(self, kind, request, found):
        self.counts["faults"] += 1
        if len(self.faults) < 20:
            self.faults.append({"kind": kind, "request": str(request)[:600], "found": str(found)[:600]})

    async def client(self, number, seed, until):
        rng = random.Random(f"{seed}/{number}")
        while time.monotonic() < until:
            await self.one(rng.choices(list(SHARES), list(SHARES.values()))[0], rng)

    async def one(self, kind, rng):
        try:
            await asyncio.wait_for(getattr(self, kind)(rng), REQUEST_SECONDS)
            self.counts[kind] += 1
        except Wrong as wrong:
            self.fault(kind, *wrong.args)
        except TimeoutError:
            self.fault(kind, "", f"no end after {REQUEST_SECONDS} s")
        except (OSError, EOFError, ValueError, KeyError) as error:
            self.fault(kind, "", f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.2)

    def judge(self, status, body, answer):
        """Whether the answer is one to look at; it may also be that the queue is full."""
        if status == 429:
            self.counts["429"] += 1
            return False
        if status != 200:
            raise Wrong(body, f"{status}: {answer[:400]}")
        return True

    async def whole(self, path, body):
        status, _, answer = await ask(self.port, path, json.dumps(body).encode())
        return json.loads(answer) if self.judge(status, body, answer) else None

    async def streamed(self, body):
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        start = time.monotonic()
        reader, writer = await connect(self.port)
        try:
            await send(writer, "POST", "/v1/chat/completions", json.dumps(body).encode())
            status, headers = await head(reader)
            first = await reader.readline() if status == 200 else b""
            if first:
                self.first_tokens.append(time.monotonic() - start)
                # The size line of the first chunk has been read; the rest as usual.
                size = int(first, 16)
                data = await reader.readexactly(size)
                await reader.readexactly(2)
                data += await rest(reader, headers)
            else:
                data = await rest(reader, headers)
        finally:
            writer.close()
        if not self.judge(status, body, data):
            return
        events = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
        chunks = [json.loads(event) for event in events[:-1]]
        ends = collections.Counter(choice["index"] for chunk in chunks for choice in chunk.get("choices", []) if choice["finish_reason"])
        if events[-1] != "[DONE]" or any("error" in chunk for chunk in chunks) or ends != collections.Counter(range(body.get("n", 1))):
            raise Wrong(body, data[-600:])
        if chunks[-1]["usage"]["completion_tokens"] > body["max_tokens"] * body.get("n", 1):
            raise Wrong(body, chunks[-1])
        self.counts["calls"] += sum("name" in call.get("function", {}) for chunk in chunks for choice in chunk.get("choices", [])
                                    for call in choice["delta"].get("tool_calls") or [])

    # Kinds of requests.

    async def stream(self, rng):
        await self.streamed(chat(rng))

    async def tools(self, rng):
        body = chat(rng, tools=TOOLS)
        body |= {"messages": [{"role": "user", "content": prompt(rng, 10)}], "max_tokens": 64}
        if rng.random() < 0.5:
            body |= {"tool_choice": "required", "parallel_tool_calls": False}
        # In the middle of a call it would be an error, as it should.
        body.pop("stop", None)
        try:
            await self.streamed(body)
        except Wrong as wrong:
            # Not every model has a form of calls; then they have to be refused, by name.
            if "unsupported_parameter" not in str(wrong.args[1]):
                raise
            self.counts["tools refused"] += 1

    async def chat(self, rng):
        body = chat(rng)
        answer = await self.whole("/v1/chat/completions", body)
        if answer and len(answer["choices"]) != body.get("n", 1):
            raise Wrong(body, answer)

    async def completion(self, rng):
        await self.whole("/v1/completions", {"prompt": prompt(rng, rng.choice([2, 40])), "max_tokens": 16, "n": rng.choice([1, 2]), "logprobs": rng.choice([None, 2])})

    async def embedding(self, rng):
        await self.whole("/v1/embeddings", {"input": [prompt(rng, 8) for _ in range(3)], "encoding_format": rng.choice(["float", "base64"])})

    async def tokenize(self, rng):
        await self.whole("/tokenize", {"prompt": prompt(rng, 500)})

    async def perplexity(self, rng):
        await self.whole("/v1/perplexity", {"text": prompt(rng, 60)})

    async def invalid(self, rng):
        body = rng.choice(INVALID)
        status, headers, answer = await ask(self.port, "/v1/chat/completions", body)
        error = json.loads(answer).get("error", {}) if "json" in headers.get("content-type", "") else {}
        if status not in (400, 413) or not isinstance(error.get("message"), str):
            raise Wrong(body[:100], f"{status}: {answer[:300]}")

    async def leave(self, rng):
        where = rng.choice(["stream", "prompt", "whole"])
        if where == "prompt":
            body = {**chat(rng), "messages": [{"role": "user", "content": prompt(rng, 300)}], "stream": rng.random() < 0.5}
        else:
            body = {**chat(rng), "max_tokens": 200, "ignore_eos": True, "stream": where == "stream"}
        reader, writer = await connect(self.port)
        try:
            await send(writer, "POST", "/v1/chat/completions", json.dumps(body).encode())
            if where == "stream":
                status, _ = await head(reader)
                if status == 200:
                    await reader.read(rng.choice([1, 300, 2000]))
                elif status != 429:
                    raise Wrong(body, status)
            else:
                await asyncio.sleep(rng.choice([0, 0.005, 0.05, 0.2]))
            if rng.random() < 0.5:
                # Reset instead of an orderly end.
                writer.transport.abort()
        finally:
            writer.close()

    async def metrics(self):
        status, _, text = await ask(self.port, "/metrics", b"", "GET")
        if status != 200:
            raise Wrong("/metrics", status)
        totals = collections.Counter()
        for line in text.decode().splitlines():
            if line.startswith("marlin:"):
                name, value = re.match(r"marlin:(\w+)(?:\{.*\})? (\S+)", line).groups()
                totals[name] += float(value)
                failed = re.match(r'marlin:http_responses_total\{.*status="(5\d\d)"', line)
                if failed:
                    totals["responses_5xx"] += float(value)
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total", "disconnects_total", "engine_restarts_total"):
            if name not in totals:
                raise Wrong("/metrics", f"no marlin:{name}")
        return totals


async def sample(soak, pid, start, samples, every, until):
    while time.monotonic() < until:
        await asyncio.sleep(max(0, min(every, until - time.monotonic())))
        try:
            found = await asyncio.wait_for(soak.metrics(), 30)
            row = {"seconds": round(time.monotonic() - start, 1), "rss_bytes": rss_bytes(pid), "running": int(found["num_requests_running"]),
                   "waiting": int(found["num_requests_waiting"]), "cache_used": round(found["kv_cache_usage_perc"], 3),
                   "preemptions": int(found["num_preemptions_total"]), "tokens": int(found["generation_tokens_total"]),
                   "disconnects": int(found["disconnects_total"]), "requests": sum(soak.counts[k] for k in SHARES),
                   "refused": soak.counts["429"], "faults": soak.counts["faults"]}
        except (OSError, EOFError, TimeoutError, TypeError, Wrong) as error:
            soak.fault("metrics", "/metrics", f"{type(error).__name__}: {error}")
            continue
        if not samples:
            print("  ".join(f"{name:>11}" for name in row))
        samples.append(row)
        shown = {**row, "rss_bytes": f"{row['rss_bytes'] / 1e6:.2f} MB"}
        print("  ".join(f"{value!s:>11}" for value in shown.values()), flush=True)


async def idle(soak, within):
    """What is still held after `within` seconds without requests."""
    end = time.monotonic() + within
    while True:
        found = await soak.metrics()
        held = {name: found[name] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc") if found[name]}
        if not held or time.monotonic() > end:
            return held, found
        await asyncio.sleep(0.05)


async def run(options, process, port):
    soak, samples = Soak(port), []
    # Every client the same at once, then everything mixed until memory stands still (a minute at most): a short run is not to take for
    # growth what a heap takes once. What goes on growing is measured.
    for kind in SHARES:
        await asyncio.gather(*(soak.one(kind, random.Random(f"{options.seed} {kind} {i}")) for i in range(2 * options.clients)))
    begun, before = time.monotonic(), 0
    while (now := rss_bytes(process.pid)) > 1.002 * before and time.monotonic() - begun < 60:
        before = now
        await asyncio.gather(*(soak.client(i, f"{options.seed} {before}", time.monotonic() + 10) for i in range(options.clients)))
    warmed = time.monotonic() - begun
    start = time.monotonic()
    seconds = options.minutes * 60
    until = start + seconds
    every = min(5.0, seconds / 12)
    print(f"warmed up for {warmed:.0f} s")
    tasks = [soak.client(i, options.seed, until) for i in range(options.clients)]
    await asyncio.gather(*tasks, sample(soak, process.pid, start, samples, every, until))
    held, last = await idle(soak, 5)
    return soak, samples, held, last, rss_bytes(process.pid) if process.poll() is None else 0


def growth(samples, minutes):
    """Memory of the last samples over that of the first ones after the warm-up, and where that ended."""
    warm = 120 if minutes > 3 else minutes * 20
    after = [row["rss_bytes"] for row in samples if row["seconds"] >= warm]
    few = max(1, min(6, len(after) // 3))
    return statistics.median(after[-few:]) / statistics.median(after[:few]) - 1 if after else float("nan"), warm


def start_server(options, folder):
    command = [options.marlin, "serve", "--port", "0", "--context", str(CONTEXT), "--cache-tokens", str(CACHE_TOKENS), "--parallel", "16", "--queue", "64"]
    model = options.model
    if not model:
        model = Path(folder) / "stories"
        shutil.copytree(EMBEDDED, model)
        shutil.copyfile(CALLS, model / "chat_template.jinja")
    command += ["-m", str(model)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MARLIN_")} | {"XDG_CONFIG_HOME": folder, "NO_COLOR": "1"}
    log = open(Path(folder) / "log", "w+", encoding="utf-8")
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=folder)
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"ready: http://\S+:(\d+)", (Path(folder) / "log").read_text(encoding="utf-8", errors="replace"))
        if found:
            return process, int(found[1]), command
        time.sleep(0.1)
    process.kill()
    sys.exit("the server did not start:\n" + (Path(folder) / "log").read_text(encoding="utf-8", errors="replace")[-2000:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--marlin", default="marlin", metavar="FILE", help="the binary [default: from PATH]")
    parser.add_argument("-m", "--model", help="another model than the embedded one")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes samples and outcome there")
    options = parser.parse_args()
    found = shutil.which(options.marlin)
    if found is None:
        sys.exit(f"{options.marlin} is not there; build it, or name it with --marlin")
    options.marlin = os.path.abspath(found)
    with tempfile.TemporaryDirectory(prefix="marlin-soak-") as folder:
        process, port, command = start_server(options, folder)
        try:
            try:
                soak, samples, held, last, rss = asyncio.run(run(options, process, port))
            except (OSError, EOFError) as error:
                log = (Path(folder) / "log").read_text(errors="replace")[-3000:]
                sys.exit(f"the server is gone (exit {process.poll()}): {error}\n{log}")
            grown, warm = growth(samples, options.minutes)
            process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(35)
            except subprocess.TimeoutExpired:
                code = "still running"
        finally:
            if process.poll() is None:
                process.kill()
        log = (Path(folder) / "log").read_text(errors="replace")
    failures = []
    if soak.counts["faults"]:
        failures.append(f"{soak.counts['faults']} faults")
    if last["responses_5xx"]:
        failures.append(f"{last['responses_5xx']:.0f} responses of 5xx")
    if last["engine_restarts_total"] or "panicked" in log:
        failures.append("a panic")
    if not grown <= (GROWTH if options.minutes > 3 else SHORT_GROWTH):
        failures.append(f"memory grew by {grown:.1%} after second {warm:.0f}")
    if held:
        failures.append(f"at the end there are {held}")
    if code != 0:
        failures.append(f"exit {code} after SIGTERM")
    firsts = sorted(soak.first_tokens) or [float("nan")]
    result = {"command": command[1:], "minutes": options.minutes, "clients": options.clients, "seed": options.seed, "requests": dict(soak.counts),
              "rss_growth": grown, "warm_seconds": warm, "rss_idle_bytes": rss, "first_token_p50_seconds": firsts[len(firsts) // 2],
              "first_token_p95_seconds": firsts[int(len(firsts) * 0.95)], "held": held, "exit": code, "faults": soak.faults, "failures": failures, "samples": samples}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"\nrequests: {', '.join(f'{kind} {count}' for kind, count in sorted(soak.counts.items()))}")
    print(f"first token: p50 {result['first_token_p50_seconds'] * 1e3:.0f} ms, p95 {result['first_token_p95_seconds'] * 1e3:.0f} ms")
    print(f"memory: {grown:+.2%} after second {warm:.0f}, {rss / 1e6:.2f} MB at idle; preemptions {last['num_preemptions_total']:.0f}, disconnects {last['disconnects_total']:.0f}")
    for fault in soak.faults:
        print(f"fault in {fault['kind']}: {fault['request']}\n  {fault['found']}")
    print("FAILED: " + "; ".join(failures) if failures else "ok")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
