"""How a server starts, stops and minds clients that leave."""
import json
import os
import signal
import socket
import time

import httpx

from .harness import Skip, check, equal, expect, streaming

LONG = {"messages": [{"role": "user", "content": "Tell me a long story."}], "temperature": 0, "ignore_eos": True}


def tokens_per_second(server):
    start = time.monotonic()
    server.chat("Tell me a story.", max_tokens=24, ignore_eos=True)
    return 24 / (time.monotonic() - start)


def posix():
    if os.name == "nt":
        raise Skip("signals as on Unix")


@check("life: SIGTERM lets answers end")
def drains(context):
    posix()
    with context.start() as server:
        tokens = max(100, min(1500, int(3 * tokens_per_second(server))))
        with streaming(server, {**LONG, "max_tokens": tokens}) as data:
            next(data)
            # A connection from before is closed, or told.
            with httpx.Client(base_url=server.url) as before:
                before.get("/health")
                server.signal(signal.SIGTERM)
                time.sleep(0.1)
                for ask in (lambda: before.get("/ready"), lambda: before.post("/tokenize", json={"prompt": "a"})):
                    try:
                        equal(ask().status_code, 503, "status while it drains")
                    except httpx.HTTPError:
                        pass
            try:
                late = server.get("/ready", timeout=5).status_code
                equal(late, 503, "status on a new connection")
            except httpx.HTTPError:
                pass
            rest = list(data)
        equal(rest[-1], "[DONE]", "last event")
        reasons = [choice["finish_reason"] for event in rest[:-1] for choice in json.loads(event)["choices"]]
        equal(reasons[-1], "length", "finish_reason")
        equal(server.wait(5), 0, "exit code")


@check("life: a whole answer under way also ends")
def drains_whole(context):
    posix()
    import threading
    with context.start() as server:
        tokens = max(16, min(1000, int(tokens_per_second(server))))
        found = []
        asking = threading.Thread(target=lambda: found.append(server.chat("Tell me a story.", max_tokens=tokens, ignore_eos=True)))
        asking.start()
        time.sleep(0.3)
        server.signal(signal.SIGTERM)
        asking.join(60)
        equal(found and found[0].json()["usage"]["completion_tokens"], tokens, "tokens")
        equal(server.wait(5), 0, "exit code")


@check("life: a large answer to a slow reader is not cut")
def drains_large(context):
    posix()
    with context.start() as server:
        word = server.post("/tokenize", {"prompt": "mouse", "add_special_tokens": False}).json()["tokens"][:1]
        # More than the system holds between the two.
        body = json.dumps({"tokens": word * 2_000_000}).encode()
        whole = len(server.request("POST", "/detokenize", content=body, headers={"content-type": "application/json"}).content)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            connection.settimeout(20)
            head = f"POST /detokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            got = len(connection.recv(1000))
            server.signal(signal.SIGTERM)
            # Well below --drain.
            time.sleep(1)
            try:
                while got < whole and (part := connection.recv(65536)):
                    got += len(part)
            except OSError:
                pass
        # Beside the body, the head of the response was counted.
        expect(got >= whole, f"{got} of {whole} bytes came")


@check("life: a second signal stops at once")
def at_once(context):
    posix()
    for number in (signal.SIGTERM, signal.SIGINT):
        with context.start() as server:
            with streaming(server, {**LONG, "max_tokens": 1800}) as data:
                next(data)
                server.signal(number)
                time.sleep(0.3)
                expect(server.alive(), "one signal ended it")
                start = time.monotonic()
                server.signal(number)
                rest = []
                try:
                    rest = list(data)
                except httpx.HTTPError:
                    pass
                expect("[DONE]" not in rest, "the stream says it is whole")
            code = server.wait(5)
            expect(time.monotonic() - start < 3, f"it took {time.monotonic() - start:.1f} s")
            expect(code >= 0, f"ended by signal {-code}")


@check("life: a signal while idle, or while loading, ends it")
def idle(context):
    posix()
    with context.start() as server:
        server.signal()
        equal(server.wait(5), 0, "exit code")
    with context.start(wait=False) as server:
        time.sleep(0.05)
        server.signal()
        code = server.wait(10)
        expect(code in (0, -signal.SIGTERM), f"exit code {code}")


@check("life: a port that is taken, a model that is not there")
def refuses(context):
    taken = context.run("serve", "--port", str(context.server.port))
    expect(taken.returncode == 1 and str(context.server.port) in taken.stderr, taken)
    absent = context.run("serve", "--port", "0", "-m", "/nowhere/model.gguf")
    expect(absent.returncode == 3, absent)


@check("life: clients that leave free their blocks")
def leave(context):
    server = context.server
    server.idle(10)
    long = {**LONG, "messages": [{"role": "user", "content": "mouse and cat " * 300}]}
    for round in range(4):
        for body, reads in (({**LONG, "stream": True}, True), ({**long, "stream": True}, False), (LONG, False), (long, False)):
            text = json.dumps({**body, "max_tokens": 500}).encode()
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
                connection.sendall(head.encode() + text)
                if reads:
                    connection.recv(400)
                time.sleep(0.01 * round)
    server.idle(3)
    equal(server.chat("Hi", max_tokens=2).status_code, 200)


@check("life: a client that leaves stops its embeddings and perplexities")
def leave_texts(context):
    server = context.server
    stat = f"/proc/{server.process.pid}/stat"
    if not os.path.exists(stat):
        raise Skip("no /proc to read the time of a process from")

    def computed():
        fields = open(stat, encoding="utf-8").read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    for path, body in (("/v1/embeddings", {"input": ["mouse and cat " * 250] * 200}), ("/v1/perplexity", {"text": "mouse and cat " * 6000, "window": 512})):
        text = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
            connection.sendall(head.encode() + text)
            time.sleep(0.3)
        time.sleep(2)
        before = computed()
        time.sleep(1)
        expect(computed() - before < 0.1, f"{path}: {computed() - before:.2f} s of work in the third second after the client left")
