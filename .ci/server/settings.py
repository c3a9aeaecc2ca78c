"""Settings: the command line goes before the environment, which goes before marlin.toml."""
import json
import re
import subprocess
import tempfile
from pathlib import Path

import httpx

from .harness import check, equal, expect

FILE = """
[serve]
port = 0
parallel = 3
queue = 11
max-body = "1M"
no_page = true
cors-origin = ["https://a.example", "https://b.example"]
api_key = "sk-of-the-file-1"
max_answers = 2
schema-depth = 9
"""


def show(context, folder, *options, env=None):
    done = context.run("config", "show", "--origin", "--json", *options, env=env, folder=folder)
    equal(done.returncode, 0, done.stderr)
    return json.loads(done.stdout)


@check("settings: config show tells what counts and whence")
def precedence(context):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "marlin.toml").write_text(FILE)
        shown = show(context, folder, "--parallel", "5", env={"MARLIN_PARALLEL": "4", "MARLIN_QUEUE": "12", "MARLIN_DRAIN": "7"})
        expected = {"parallel": ("5", "command line"), "queue": ("12", "MARLIN_QUEUE"), "drain": ("7", "MARLIN_DRAIN"),
                    "host": ("127.0.0.1", "default"), "mixed-chunk": ("224", "default")}
        for name, pair in expected.items():
            equal((shown[name]["value"], shown[name]["origin"]), pair, name)
        for name, value in (("port", "0"), ("no-page", "true"), ("cors-origin", "https://a.example,https://b.example")):
            equal(shown[name]["value"], value, name)
            expect(shown[name]["origin"].endswith("marlin.toml"), name, shown[name])
        expect("sk-of-the-file-1" not in json.dumps(shown), "a key is shown")
        plain = context.run("config", "show", "--json", folder=folder)
        equal(json.loads(plain.stdout)["parallel"], "3", "parallel")
        text = context.run("config", "show", "--origin", folder=folder).stdout
        expect(re.search(r"^parallel = 3 +# .*marlin\.toml$", text, re.M), text)
        elsewhere = Path(folder) / "other.toml"
        elsewhere.write_text("[serve]\nparallel = 9\n")
        equal(show(context, folder, "--config", str(elsewhere))["parallel"]["value"], "9", "another file")
        equal(show(context, folder, env={"MARLIN_CONFIG": str(elsewhere)})["parallel"]["value"], "9", "another file by the environment")


@check("settings: the server follows them")
def followed(context):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "marlin.toml").write_text(FILE)
        with context.start("--max-body", "2000", folder=folder, env={"MARLIN_NO_PAGE": "false", "MARLIN_PORT": "0", "MARLIN_MAX_STOPS": "1"}) as server:
            equal(server.get("/v1/models").status_code, 401, "the file's key is asked for; status")
            key = {"authorization": "Bearer sk-of-the-file-1"}
            equal(server.get("/v1/models", headers=key).status_code, 200, "status with the file's key")
            equal([server.chat("Hi", n=n, headers=key).status_code for n in (2, 3)], [200, 400], "status of two and three answers")
            equal(server.chat("Hi", stop=["a", "b"], headers=key).status_code, 400, "status of two stop strings")
            equal(server.post("/tokenize", {"prompt": "a" * 3000}, headers=key).status_code, 413, "status over --max-body")
            equal(server.get("/").status_code, 200, "MARLIN_NO_PAGE=false goes before the file; status of the page")
        with context.start(folder=folder) as server:
            equal(server.get("/", headers=key).status_code, 404, "no_page of the file; status of the page")


@check("settings: what is wrong in a file is told")
def wrong(context):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "marlin.toml"
        for text, told in (("[serve]\nprot = 1\n", "prot"), ("port = 1\n", "port"), ("[serve]\nport = \"x\"\n", "port"), ("[serve\n", "marlin.toml"),
                           ("[serve]\nport = 70000\n", "70000"), ("[serve]\nno-page = 3\n", "no-page"), ("serve = 3\n", "serve")):
            file.write_text(text)
            try:
                done = context.run("serve", *([] if "port" in text else ["--port", "0"]), folder=folder, seconds=10)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"{text!r}: the server starts") from None
            equal(done.returncode, 2, f"{text!r}: {done.stderr[-300:]}; exit code")
            expect(told in done.stderr, f"{text!r}: {done.stderr[-300:]}")


@check("settings: every option is one")
def every(context):
    text = context.run("serve", "--help").stdout
    options = set(re.findall(r"^ +(?:-\w, )?--([a-z-]+)", text, re.M)) - {"help", "config", "verbose", "quiet", "version"}
    expect(len(options) > 20, options)
    # Shared with other verbs, which have no variables; "the server follows them" looks at one.
    options -= {"activations", "device", "threads"}
    without = sorted(name for name in options if f"[env: MARLIN_{name.replace('-', '_').upper()}" not in text)
    expect(not without, f"the help says that every option can stand in the environment; these cannot: {without}")


@check("settings: values at their edges")
def edges(context):
    """Refused as usage errors, or obeyed; never a panic, never a server that starts and cannot answer."""
    most, wrong = str((1 << 64) - 1), []
    for options in (("--rate-limit", "0"), ("--max-connections", most), ("--max-connections", "0"), ("--header-timeout", most), ("--body-timeout", most),
                    ("--keep-alive", most), ("--drain", most), ("--parallel", "0"), ("--prefill-chunk", "0"), ("--queue", "0"),
                    ("--context", "256", "--cache-tokens", "16")):
        try:
            server = context.start(*options)
        except AssertionError as refused:
            expect(re.search(r"\(exit [12]\)", str(refused)), options, refused)
            continue
        with server:
            try:
                statuses = [server.chat("Hi", max_tokens=2).status_code for _ in range(2)]
            except httpx.HTTPError as error:
                statuses = repr(error)
            if statuses != [200, 200] or any("panicked" in line for line in server.lines):
                wrong.append(f"{' '.join(options)}: it starts and answers {statuses}" + " (a panic)" * any("panicked" in line for line in server.lines))
            elif "--cache-tokens" in options:
                wrong.append(f"{' '.join(options)}: a cache below one context is made larger without a word")
    expect(not wrong, "\n         ".join(wrong))
