"""Bodies and paths that are wrong: told as the client's fault, in OpenAI's shape, and without harm to others."""
import json

from .harness import check, equal, error_shape, expect, raw

JSON = {"content-type": "application/json"}
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/perplexity", "/tokenize", "/detokenize", "/apply-template"]


@check("bodies: malformed, deep, huge, not UTF-8")
def malformed(context):
    server = context.server
    bodies = [b"", b"{", b"[]", b"null", b"1", b'"a"', b'{"messages": [}', b"\xff\xfe{}", b'{"prompt": "\xff"}', b'{"input": "\\ud800"}',
              b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b'{"prompt": 1e999}', b"{}" * 2, b"\0" * 1000]
    for path in PATHS:
        for body in bodies:
            response = server.request("POST", path, content=body, headers=JSON)
            error_shape(response, 400)


@check("bodies: too large, of another type, by another method")
def refused(context):
    server = context.server
    large = json.dumps({"prompt": "a" * (33 << 20)}).encode()
    status, headers, body = raw(server.port, "POST", "/tokenize", large, JSON)
    equal(status, 413, "status of a body of 33 MiB")
    expect(json.loads(body)["error"]["message"], body)
    error_shape(server.request("POST", "/tokenize", content=b"{}", headers={"content-type": "text/plain"}), 415)
    error_shape(server.request("POST", "/tokenize", content=b"{}"), 415)
    for method, path in (("DELETE", "/v1/models"), ("PUT", "/v1/chat/completions"), ("GET", "/tokenize")):
        response = server.request(method, path)
        error_shape(response, 405)
        expect(response.headers.get("allow"), f"{method} {path}: 405 without allow")
    error_shape(server.get("/nowhere"), 404)


@check("bodies: paths that are no text")
def paths(context):
    for path in ("/v1/models/%ff", "/v1/models/%00", "/v1/models/a%2fb", "/v1/models/..%2f..%2fetc", "/%ff", "//", "/v1/models/" + "x" * 4000):
        status, headers, body = raw(context.server.port, "GET", path)
        expect(status in (400, 404), f"{path}: {status}")
        expect("json" in headers.get("content-type", ""), f"{path[:60]}: {status} as {headers.get('content-type')}: {body[:200]}")
        expect(json.loads(body)["error"]["message"], body)


@check("bodies: what a field may not be")
def fields(context):
    server = context.server
    cases = [({"stop": ["a", 1]}, "stop"), ({"n": 17}, "n"), ({"logit_bias": {"1": "x"}}, "logit_bias"), ({"temprature": 1}, "temprature"),
             ({"stop_token_ids": [2 ** 31]}, "stop_token_ids"), ({"logit_bias": {"999999999": 1}}, "logit_bias"), ({"seed": 0.5}, "seed"),
             ({"max_tokens": -1}, "max_tokens"), ({"timeout": 0}, "timeout"), ({"stream_options": {}}, "stream_options"),
             ({"top_logprobs": 2}, "top_logprobs"), ({"user": 1}, "user"), ({"metadata": "x"}, "metadata"), ({"tools": {}}, "tools"),
             ({"tool_choice": "required"}, "tool_choice"), ({"response_format": "json"}, "response_format"), ({"store": True}, "store")]
    for more, param in cases:
        error = error_shape(server.chat("Hi", **more), 400)
        equal(error["param"], param, f"param of {more}")
    whole = {"seed": 5.0, "max_tokens": 2.0, "n": 1.0, "priority": 1.0}
    equal(server.chat("Hi", **whole).status_code, 200, f"whole numbers written with a point, {whole}, status")


@check("bodies: a context that overflows")
def overflow(context):
    limit = context.server.get("/v1/models").json()["data"][0]["max_model_len"]
    error = error_shape(context.server.chat("mouse " * limit), 400)
    equal(error["code"], "context_length_exceeded", "code")
    expect(str(limit) in error["message"], error)
    error = error_shape(context.server.chat("Hi", max_tokens=limit), 400)
    equal(error["code"], "context_length_exceeded", "code")
    expect(str(limit) in error["message"], error)
    ids = {"prompt": [1] * (limit + 1), "max_tokens": 1}
    equal(error_shape(context.server.post("/v1/completions", ids), 400)["code"], "context_length_exceeded", "code")
