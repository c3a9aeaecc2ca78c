"""Requests made from /openapi.json, those that should be taken and those that should not, by schemathesis."""
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from .harness import check, equal, expect, raw

SEED = "20240607"
# Refusing a valid body is no fault: ids beyond the vocabulary, prompts beyond the context.
CHECKS = ("not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
          "response_schema_conformance,negative_data_rejection,unsupported_method,allow_header_conformance")


def run(server, mode, phases, examples, *more):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", server.url + "/openapi.json",
                   "--checks", CHECKS, "--mode", mode, "--phases", phases, "--max-examples", str(examples), "--seed", SEED,
                   "--generation-deterministic", "--no-shrink", "--continue-on-failure",
                   "--suppress-health-check", "all", "--request-timeout", "60", "--no-color", "--warnings", "off", *more]
        environment = {**os.environ, "SCHEMATHESIS_HOOKS": "server.schema_hooks", "PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


def told(output):
    """The part of schemathesis' output that says what failed, or how much was tried."""
    failures = re.search(r"=+ FAILURES =+\n(.*?)\n=+ SUMMARY", output, re.S)
    errors = re.search(r"=+ ERRORS =+\n(.*?)\n=+ (?:FAILURES|SUMMARY)", output, re.S)
    parts = [found[1] for found in (errors, failures) if found]
    return "\n".join(line for line in "\n".join(parts).splitlines() if line.strip())[:20000] or output[-3000:]


def generated(context, mode, phases, examples):
    # A small context: what the hooks do not bound ends there.
    with context.start("--context", "96", "--cache-tokens", "2048") as server:
        code, output = run(server, mode, phases, examples, "--exclude-path", "/docs")
        expect(server.alive(), "the server ended:", *server.lines[-10:])
        if os.environ.get("MARLIN_CHECKS_VERBOSE"):
            print(output)
        equal(code, 0, told(output) + "\nexit code of schemathesis")
        server.idle(10)
        equal([line for line in server.lines if "panicked" in line], [], "panics")
        cases = re.search(r"Test cases:\s*\n\s*(.*)", output)
        return cases[1].strip() if cases else None


@check("schema: the document")
def document(context):
    document = context.server.get("/openapi.json").json()
    expect(document["openapi"].startswith("3."), document["openapi"])
    for path, methods in document["paths"].items():
        for method in methods:
            status, _, _ = raw(context.server.port, method.upper(), path.replace("{id}", "default"))
            expect(status not in (404, 405), f"{method} {path} is described and answers {status}")
    model = document["paths"]["/v1/models/{id}"]["get"]["parameters"][0]["schema"]
    for card in context.server.get("/v1/models").json()["data"]:
        expect(re.search(model.get("pattern", ""), card["id"]), f"the name {card['id']!r} does not fit the pattern of ids, {model}")


@check("schema: bodies that fit")
def positive(context):
    return generated(context, "positive", "examples,coverage,fuzzing", 12)


@check("schema: bodies that do not fit")
def negative(context):
    return generated(context, "negative", "examples,coverage,fuzzing", 6)
