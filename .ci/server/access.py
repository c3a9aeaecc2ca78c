"""Who may ask: keys, their file, hosts, TLS."""
import os
import shutil
import ssl
import subprocess
import tempfile
import time
from pathlib import Path

import httpx

from .harness import Skip, check, equal, error_shape, events, expect, raw

KEY, OTHER = "sk-first-key-000001", "sk-other-key-000002"
# Without a key: whether it lives, and the page in which a key is typed.
OPEN = {"/health", "/ready", "/"}


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@check("access: a wrong key gets 401 everywhere but where none is needed")
def wrong_key(context):
    with context.start("--api-key", KEY) as server:
        paths = [(method.upper(), path) for path, methods in server.get("/openapi.json", headers=bearer(KEY)).json()["paths"].items()
                 for method in methods]
        paths += [("GET", path) for path in ("/openapi.json", "/docs", "/")]
        for method, path in paths:
            path = path.replace("{id}", "default")
            there = server.request(method, path, json={}, headers=bearer(KEY)).status_code
            expect(there != 401, f"{method} {path} refuses the right key")
            if there == 404:
                continue
            for headers in ({}, bearer(OTHER), bearer(KEY[:-1]), bearer(KEY + "x"), {"x-api-key": OTHER}, {"authorization": f"Basic {KEY}"},
                            {"authorization": KEY}, {"authorization": ""}):
                response = server.request(method, path, json={}, headers=headers)
                if path in OPEN:
                    expect(response.status_code < 400, f"{method} {path}: {response.status_code}")
                else:
                    equal(response.status_code, 401, f"{method} {path} with {headers}: {response.text[:100]}; status")
                    expect("www-authenticate" in response.headers, f"{path}: no www-authenticate")
        error = error_shape(server.get("/v1/models", headers=bearer(OTHER)), 401)
        equal(error["code"], "invalid_api_key")
        equal(server.get("/v1/models", headers={"x-api-key": KEY}).status_code, 200, "x-api-key")
        for line in server.lines:
            expect(KEY not in line and OTHER not in line, "a key is in the log:", line)
        status, _, _ = raw(server.port, "GET", "/v1/models", headers={"authorization": b"Bearer \xff\xfe"})
        equal(status, 401, "a key that is no text")


@check("access: an empty key does not open the server")
def empty_key(context):
    # An unset secret becomes an empty variable; a key that begins with # must not be read as a remark.
    for options, env in ((("--api-key", ""), {}), ((), {"MARLIN_API_KEY": ""}), (("--api-key", "#secret-key-1"), {}), (("--api-key", "  "), {})):
        try:
            server = context.start(*options, env=env)
        except AssertionError:
            continue
        with server:
            status = server.get("/v1/models").status_code
            equal(status, 401, f"{options} {env}: the server starts and answers without a key; status")


@check("access: a file of keys is read again")
def key_file(context):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        file.write_text(f"# ours\nann:{KEY}\n")
        with context.start("--api-key-file", str(file)) as server:
            status = lambda key: server.get("/v1/models", headers=bearer(key)).status_code  # noqa: E731

            def becomes(expected, what):
                start = time.monotonic()
                while (found := (status(KEY), status(OTHER))) != expected:
                    expect(time.monotonic() - start < 10, f"{what}: expected {expected} for both keys, found {found}")
                    time.sleep(0.2)

            becomes((200, 401), "at first")
            file.write_text(f"ben:{OTHER}\n")
            becomes((401, 200), "written anew")
            replacement = Path(folder) / "new"
            replacement.write_text(f"{KEY}\nben:{OTHER}\n")
            os.replace(replacement, file)
            becomes((200, 200), "replaced")
            file.write_text("short\n")
            time.sleep(3)
            equal((status(KEY), status(OTHER)), (200, 200), "a file that is wrong changes nothing")
            expect(any("keys stay" in line for line in server.lines), "and that is not told", server.lines)
            file.unlink()
            time.sleep(3)
            equal((status(KEY), status(OTHER)), (200, 200), "a file that is gone changes nothing")
            file.write_text(f"ben:{OTHER}\n")
            becomes((401, 200), "back again")


@check("access: quotas of a key")
def quotas(context):
    with context.start("--api-key", KEY, "--api-key", OTHER, "--rate-limit", "5") as server:
        codes = [server.post("/tokenize", {"prompt": "a"}, headers=bearer(KEY)) for _ in range(8)]
        expect(5 <= sum(r.status_code == 200 for r in codes) <= 6, [r.status_code for r in codes])
        late = codes[-1]
        error_shape(late, 429)
        expect(int(late.headers["retry-after"]) >= 1 and float(late.headers["retry-after-ms"]) > 0, late.headers)
        equal(server.post("/tokenize", {"prompt": "a"}, headers=bearer(OTHER)).status_code, 200, "another key")
        equal(server.get("/v1/models", headers=bearer(KEY)).status_code, 200, "what costs nothing")


@check("access: other hosts and origins")
def hosts(context):
    port = context.server.port
    for host, expected in ((f"localhost:{port}", 200), (f"127.0.0.1:{port}", 200), ("rebound.example", 403), (f"rebound.example:{port}", 403)):
        equal(raw(port, "GET", "/v1/models", headers={"host": host})[0], expected, f"host {host}")
    response = context.server.get("/v1/models", headers={"origin": "https://elsewhere.example"})
    expect("access-control-allow-origin" not in response.headers, response.headers)
    with context.start("--cors-origin", "https://ours.example") as server:
        asked = server.request("OPTIONS", "/v1/chat/completions", headers={"origin": "https://ours.example", "access-control-request-method": "POST"})
        equal(asked.headers.get("access-control-allow-origin"), "https://ours.example")
        other = server.get("/v1/models", headers={"origin": "https://elsewhere.example"})
        expect("access-control-allow-origin" not in other.headers, other.headers)


@check("access: TLS")
def tls(context):
    if shutil.which("openssl") is None:
        raise Skip("no openssl to make a certificate with")
    with tempfile.TemporaryDirectory() as folder:
        cert, key = f"{folder}/cert.pem", f"{folder}/key.pem"
        make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE",
                "-keyout", key, "-out", cert]
        subprocess.run(make, check=True, capture_output=True)
        with context.start("--tls-cert", cert, "--tls-key", key) as server:
            expect(server.url.startswith("https://"), server.url)
            trusting = ssl.create_default_context(cafile=cert)
            with httpx.Client(base_url=server.url, verify=trusting, timeout=60) as client:
                equal(client.get("/health").json()["status"], "ok")
                body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "stream": True}
                with client.stream("POST", "/v1/chat/completions", json=body) as response:
                    equal(list(events(response))[-1], "[DONE]", "last event")
            try:
                httpx.get(server.url + "/health")
            except httpx.ConnectError:
                pass
            else:
                expect(False, "a client that does not know the certificate trusts it")
            try:
                plain = httpx.get(server.url.replace("https", "http") + "/health", timeout=15)
                expect(plain.status_code >= 400, "it also answers without TLS")
            except httpx.HTTPError:
                pass
            equal(httpx.get(server.url + "/health", verify=trusting).status_code, 200, "after clients that failed; status")
        half = context.run("serve", "--port", "0", "--tls-cert", cert)
        expect(half.returncode == 2 and "tls-key" in half.stderr, f"--tls-cert alone: exit {half.returncode}, {half.stderr[-300:]}")
