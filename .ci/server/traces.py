"""Traces: what a collector gets is held to the schema of OTLP, and one that fails costs nothing."""
import base64
import http.server
import json
import threading
import time

from .harness import check, equal, expect

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """Takes traces; `status` is what it answers."""

    def __init__(self, status=200):
        self.status, self.requests = status, []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.requests.append((self.path, dict(self.headers), body))
                self.send_response(collector.status)
                self.send_header("content-type", "application/json")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def wait(self, count, seconds=8):
        deadline = time.monotonic() + seconds
        while len(self.requests) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        expect(len(self.requests) >= count, f"{len(self.requests)} requests came")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()


def parse(body):
    """The message of a body; unknown fields and wrong types are errors."""
    from google.protobuf import json_format
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    def as_protobuf(value):
        """OTLP writes ids in hexadecimal digits where protobuf's own JSON has base 64."""
        if isinstance(value, list):
            return [as_protobuf(item) for item in value]
        if not isinstance(value, dict):
            return value
        ids = ("traceId", "spanId", "parentSpanId")
        return {key: base64.b64encode(bytes.fromhex(item)).decode() if key in ids else as_protobuf(item) for key, item in value.items()}

    return json_format.ParseDict(as_protobuf(json.loads(body)), ExportTraceServiceRequest())


def attributes(owner):
    values = {item.key: item.value for item in owner.attributes}
    equal(len(values), len(owner.attributes), "attributes by name")
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


@check("traces: what a collector gets is OTLP")
def schema(context):
    with Collector() as collector:
        env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_EXPORTER_OTLP_HEADERS": "x-token=a%20b",
               "OTEL_SERVICE_NAME": "mine", "OTEL_RESOURCE_ATTRIBUTES": "service.namespace=tests,service.name=other"}
        with context.start("-v", env=env) as server:
            body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "ignore_eos": True}
            equal(server.post("/v1/chat/completions", body, headers={"traceparent": CALLER}).status_code, 200, "status")
            collector.wait(1)
            trace = CALLER.split("-")[1]
            expect(any(trace in line for line in server.lines), "the trace is not in the log", *server.lines[-5:])
            server.chat("Bye", max_tokens=3)
            server.signal()
            equal(server.wait(10), 0, "exit code")
        collector.wait(2, seconds=1)
        path, headers, body = collector.requests[0]
        equal((path, headers["content-type"], headers["x-token"]), ("/v1/traces", "application/json", "a b"), "request")
        message = parse(body)
        equal((len(message.resource_spans), len(message.resource_spans[0].scope_spans)), (1, 1), "groups")
        resource = attributes(message.resource_spans[0].resource)
        equal((resource["service.name"], resource["service.namespace"], resource["telemetry.sdk.language"]), ("mine", "tests", "rust"), "resource")
        spans = list(message.resource_spans[0].scope_spans[0].spans)
        equal([span.name.split(" ")[0] for span in spans], ["chat", "queue", "prefill", "decode"], "spans")
        own = spans[0]
        equal((own.trace_id.hex(), own.parent_span_id.hex(), own.kind), (trace, CALLER.split("-")[2], 2), "own span")
        found = attributes(own)
        equal((found["gen_ai.usage.output_tokens"], found["gen_ai.operation.name"], found["gen_ai.response.finish_reasons"].values[0].string_value),
              (5, "chat", "length"), "attributes")
        expect(abs(own.start_time_unix_nano / 1e9 - time.time()) < 60 and own.end_time_unix_nano > own.start_time_unix_nano, "times")
        expect(all(span.parent_span_id == own.span_id and span.trace_id == own.trace_id for span in spans[1:]), "parents")
        return f"{len(spans)} spans"


@check("traces: a collector that is not there costs nothing")
def absent(context):
    with Collector(500) as collector, context.start("--otlp-endpoint", collector.url) as server:
        for _ in range(3):
            equal(server.chat("Hi", max_tokens=2).status_code, 200, "status")
            time.sleep(1.2)
        told = [line for line in server.lines if "traces are not exported" in line]
        expect(len(told) == 1 and "500" in told[0], "it is told once", *server.lines[-6:])
        equal(server.metric("marlin:traces_dropped_total"), 3, "dropped")
        collector.status = 200
        server.chat("Hi", max_tokens=2)
        deadline = time.monotonic() + 5
        while server.metric("marlin:traces_exported_total") < 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        expect(any("exported again" in line for line in server.lines), *server.lines[-4:])
    with context.start("--otlp-endpoint", "http://127.0.0.1:1") as server:
        equal(server.chat("Hi", max_tokens=2).status_code, 200, "status")
        server.signal()
        equal(server.wait(6), 0, "exit code, with spans that nobody takes")


@check("traces: off unless asked for, and what is wrong is told")
def asked(context):
    equal(context.server.metric("marlin:traces_exported_total") + context.server.metric("marlin:traces_dropped_total"), 0, "spans")
    for env, options, told in (({}, ["--otlp-endpoint", "localhost:4318"], "http://HOST:4318"),
                               ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, [], "grpc"),
                               ({"OTEL_EXPORTER_OTLP_HEADERS": "nonsense"}, ["--otlp-endpoint", "http://x"], "OTEL_EXPORTER_OTLP_HEADERS")):
        done = context.run("serve", "--port", "0", *options, env=env)
        equal(done.returncode, 2, f"{env} {options}: {done.stderr[-300:]}; exit code")
        expect(told in done.stderr, done.stderr)
    shown = context.run("config", "show", "--origin", "--json", env={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4318"})
    equal(json.loads(shown.stdout)["otlp-endpoint"], {"value": "http://x:4318", "origin": "OTEL_EXPORTER_OTLP_ENDPOINT"}, "origin")
    both = context.run("config", "show", "--json", env={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "MARLIN_OTLP_ENDPOINT": "http://y"})
    equal(json.loads(both.stdout)["otlp-endpoint"], "http://y", "ours goes first")
