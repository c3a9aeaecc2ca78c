#!/usr/bin/env python3
"""Streaming load on an OpenAI-compatible server of this machine: throughput, first token, gaps between tokens.

    python bench/load.py --base http://127.0.0.1:8080 --clients 8 --requests 64 --max-tokens 64

`marlin bench serve` measures the same and more; this is the second opinion that shares no code with it. Method:

* closed loop: every client sends its next request when its last one is answered, over a connection that it keeps;
* every request has a prompt of its own from a seeded generator, so that a prefix cache finds only the chat template, unless
  --same-prompt, or --shared-prefix-words put the same words before each; give every run another --seed;
* temperature 0 and `ignore_eos`, so that a server that knows it generates exactly --max-tokens (--no-ignore-eos leaves it out);
* TTFT: from sending the request to the first chunk with text; ITL: between successive chunks with text of one request. A server
  that puts several tokens into a chunk shows fewer and longer gaps, so TPOT stands beside it: (last - first) / (tokens - 1);
* tokens are usage.completion_tokens where the server tells them, else chunks with text; the report says which.

Only loopback addresses. Exit status: 0 all requests were answered, 1 some were not, 2 wrong arguments. Standard library only.
"""

import argparse
import http.client
import ipaddress
import itertools
import json
import random
import sys
import threading
import time
import types
import urllib.parse

WORDS = (
    "river stone lantern copper window garden engine winter market thread harbor ladder signal forest bridge candle mirror valley"
    " anchor paper circle planet summer bottle hammer ribbon corner basket meadow silver").split()
PERCENTILES = [50, 90, 95, 99]
LONGEST_LINE, LONGEST_ERROR = 1 << 20, 240
DEFAULTS = dict(
    model="default", endpoint="chat", clients=8, requests=64, max_tokens=64, prompt_words=48, shared_prefix_words=0, same_prompt=False,
    temperature=0.0, seed=1, warmup=2, ignore_eos=True, usage=True, extra={}, api_key=None, timeout=120.0, deadline=600.0)


class Failed(Exception):
    """A request that was not answered as it must be; the text is for the report."""


def percentile(values, share):
    """Linear between neighbours; None of nothing."""
    if not values:
        return None
    values = sorted(values)
    place = (len(values) - 1) * share / 100
    low = int(place)
    return values[low] + (values[min(low + 1, len(values) - 1)] - values[low]) * (place - low)


def summary(values):
    """In milliseconds."""
    shown = lambda seconds: None if seconds is None else round(seconds * 1e3, 2)
    return {f"p{share}": shown(percentile(values, share)) for share in PERCENTILES} | {"max": shown(max(values, default=None))}


def prompts(options):
    """As many as there are requests, those that warm up first."""
    draw = random.Random(options.seed)
    words = lambda count: " ".join(draw.choice(WORDS) for _ in range(count))
    prefix = f"{words(options.shared_prefix_words)}. " if options.shared_prefix_words else ""
    count = options.warmup + options.requests
    made = [f"{prefix}Story {i}. Write a short story that uses these words: {words(options.prompt_words)}." for i in range(1 if options.same_prompt else count)]
    return made * count if options.same_prompt else made


class Connection:
    """One HTTP connection that is opened again whenever it was closed."""

    def __init__(self, base, options):
        url = urllib.parse.urlsplit(base)
        self.prefix, self.options = url.path.rstrip("/"), options
        self.http = http.client.HTTPConnection(url.hostname, url.port or 80, timeout=options.timeout)
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {options.api_key}"} if options.api_key else {})

    def post(self, path, body):
        """The answer to a request, its body unread. A connection that was kept may have been closed meanwhile, so it gets a second try."""
        data = json.dumps(body).encode()
        while True:
            kept = self.http.sock is not None
            try:
                self.http.request("POST", self.prefix + path, data, self.headers)
                return self.http.getresponse()
            except (ConnectionError, http.client.BadStatusLine):
                self.http.close()
                if not kept:
                    raise

    def events(self, response):
        """The data of server-sent events, one line each."""
        rest = b""
        while piece := response.read1(1 << 16):
            *lines, rest = (rest + piece).split(b"\n")
            if len(rest) > LONGEST_LINE:
                raise Failed("an event is too long")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()


def ask(connection, prompt):
    """One request; what came of it."""
    options = connection.options
    result = types.SimpleNamespace(error=None, ttft=None, gaps=[], chunks=0, usage=None, finish=None, done=False, tokens=0, tpot=None, total=None, text="")
    if options.endpoint == "chat":
        path, body = "/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}]}
    else:
        path, body = "/v1/completions", {"prompt": prompt}
    body |= dict(model=options.model, stream=True, max_tokens=options.max_tokens, temperature=options.temperature, seed=options.seed)
    if options.usage:
        body["stream_options"] = {"include_usage": True}
    if options.ignore_eos:
        body["ignore_eos"] = True
    body |= options.extra
    start, first, last = time.perf_counter(), None, None
    try:
        response = connection.post(path, body)
        if response.status != 200:
            raise Failed(f"HTTP {response.status}: {response.read(LONGEST_ERROR).decode(errors='replace')}")
        for data in connection.events(response):
            now = time.perf_counter()
            if result.done:
                raise Failed("an event after [DONE]")
            if data == b"[DONE]":
                result.done = True
                continue
            event = json.loads(data)
            if event.get("error"):
                raise Failed(str(event["error"]))
            result.usage = event.get("usage") or result.usage
            for choice in event.get("choices") or []:
                delta = choice.get("delta") or {}
                if text := delta.get("content") or delta.get("reasoning_content") or choice.get("text"):
                    result.chunks += 1
                    result.text += text
                    if first is None:
                        first, result.ttft = now, now - start
                    else:
                        result.gaps.append(now - last)
                    last = now
                result.finish = choice.get("finish_reason") or result.finish
        result.total = time.perf_counter() - start
        for missing, there in [("text", first is not None), ("finish_reason", result.finish), ("[DONE]", result.done)]:
            if not there:
                raise Failed(f"the answer ended without {missing}")
        result.tokens = (result.usage or {}).get("completion_tokens") or result.chunks
        if result.tokens > 1:
            result.tpot = (last - first) / (result.tokens - 1)
    except (Failed, OSError, ValueError, http.client.HTTPException) as error:
        result.error = f"{type(error).__name__}: {error}"[:LONGEST_ERROR]
        connection.http.close()
    return result


def run(base, options):
    """Results in the order of sending, and seconds."""
    connections = [Connection(base, options) for _ in range(options.clients)]
    texts = prompts(options)
    for text in texts[: options.warmup]:
        ask(connections[0], text)
    texts, results, turn = texts[options.warmup :], {}, itertools.count()
    start = time.perf_counter()

    def client(connection):
        # `next` of a count is one step: no two clients get the same number.
        while (i := next(turn)) < len(texts) and time.perf_counter() - start < options.deadline:
            results[i] = ask(connection, texts[i])

    threads = [threading.Thread(target=client, args=[connection]) for connection in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    for connection in connections:
        connection.http.close()
    return [results[i] for i in sorted(results)], seconds


def measure(base, **changes):
    """The report of one run, as `main` prints it."""
    options = types.SimpleNamespace(**(DEFAULTS | changes))
    results, seconds = run(base, options)
    good = [result for result in results if not result.error]
    tokens, prompt_tokens = sum(result.tokens for result in good), sum((result.usage or {}).get("prompt_tokens", 0) for result in good)
    finishes = [result.finish for result in good]
    return dict(
        endpoint=options.endpoint, clients=options.clients, requests=options.requests, max_tokens=options.max_tokens, prompt_words=options.prompt_words,
        shared_prefix_words=options.shared_prefix_words, same_prompt=options.same_prompt, seed=options.seed,
        sent=len(results), good=len(good), failed=len(results) - len(good), done_seen=sum(result.done for result in good),
        seconds=round(seconds, 3), completion_tokens=tokens, prompt_tokens=prompt_tokens, text_chunks=sum(result.chunks for result in good),
        token_count_from="usage" if good and all(result.usage for result in good) else "chunks",
        tokens_per_second=round(tokens / seconds, 2), requests_per_second=round(len(good) / seconds, 3),
        ttft_ms=summary([result.ttft for result in good]), itl_ms=summary([gap for result in good for gap in result.gaps]),
        tpot_ms=summary([result.tpot for result in good if result.tpot is not None]), end_to_end_ms=summary([result.total for result in good]),
        ttft_ms_in_order=[round(result.ttft * 1e3, 2) for result in good],
        finish_reasons={reason: finishes.count(reason) for reason in sorted(set(finishes))}, first_text=good[0].text if good else None,
        errors=sorted({result.error for result in results if result.error})[:5])


def is_loopback(url):
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="http://127.0.0.1:8080", help="root of the server (default: %(default)s)")
    parser.add_argument("--endpoint", choices=["chat", "completions"])
    parser.add_argument("--extra", type=json.loads, help="JSON object, merged into every request")
    parser.add_argument("--same-prompt", action="store_true", default=None)
    parser.add_argument("--no-ignore-eos", dest="ignore_eos", action="store_false", default=None)
    parser.add_argument("--no-usage", dest="usage", action="store_false", default=None)
    for name, kind, text in [
        ("model", str, ""), ("api-key", str, ""), ("clients", int, "at once"), ("requests", int, "in all"), ("max-tokens", int, "of each answer"),
        ("prompt-words", int, "of each prompt"), ("shared-prefix-words", int, "before each prompt, the same"), ("temperature", float, ""), ("seed", int, "of prompts and sampling"),
        ("warmup", int, "requests sent first, one by one, and not counted"), ("timeout", float, "seconds of silence after which a request has failed"),
        ("deadline", float, "seconds after which nothing new is sent")]:
        parser.add_argument(f"--{name}", type=kind, help=f"{text} (default: {DEFAULTS[name.replace('-', '_')]})".strip())
    args = vars(parser.parse_args())
    base = args.pop("base")
    if not is_loopback(base) or urllib.parse.urlsplit(base).scheme != "http":
        parser.error("--base: expected http and a loopback address")
    changes = {name: value for name, value in args.items() if value is not None}
    options = DEFAULTS | changes
    if not (1 <= options["clients"] <= 64 and 1 <= options["requests"] <= 2000 and 1 <= options["max_tokens"] <= 4096):
        parser.error("at most 64 clients, 2000 requests and 4096 tokens, and at least one of each")
    report = measure(base, **changes)
    print(json.dumps(report, indent=1))
    return 0 if report["good"] == options["requests"] else 1


if __name__ == "__main__":
    sys.exit(main())
