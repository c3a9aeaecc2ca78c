#!/usr/bin/env python3
"""`marlin serve` and llama-server on this processor: the same files and the same load, in turns, medians and spread.

    python bench/serve_vs_llama_server.py [--rounds 5] [--models smollm2,qwen] [--threads 2] [--engines marlin,llama-server]

Four steps; each does what is still missing, so an interrupted run is continued by the same command:

* build: llama-server and llama-quantize from the llama.cpp sources inside llama-cpp-python's source package, for this processor,
  without its web page. Compilers matter: GCC 12 drops stores of llama.cpp's AMX tile configuration, so it is clang unless --cc and
  --cxx say otherwise. --llama-server names a program that was built before.
* files: SmolLM2 Q4_0 from the Q4_1 of bench/fetch_models.py, by llama-quantize; Qwen2.5-Coder as it is fetched.
* variants: which flash attention, cache layout and weight repacking makes llama-server fastest under this load; not part of the rounds.
* rounds: in every round and for every model each engine is started once, the engines in turns and only one alive at a time. It answers a
  question whose answer is known, then one client, then --clients at once (bench/load.py's closed loop), then, for models with a long
  context, one client whose prompts share a long beginning: the first is cold, the others find it cached.
  Prompts are new in every round and the same for both engines.

RESULT.json has every number, RESULT.md the table, written after every server. A ratio above 1 is in marlin's favour. The load comes from
this machine too; beside every figure stands how much of it other programs took meanwhile. Linux; standard library only.
"""

import argparse
import contextlib
import datetime
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import time
import types
import urllib.error
import urllib.request

import load
from cpu_vs_llama_cpp import Machine
from rate_distortion import ROOT, TEST_MODELS, machine, note, read_json, sha256, write_json

LLAMA_CPP_PYTHON = "0.3.36"
CMAKE = [
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=ON", "-DGGML_OPENMP=ON", "-DLLAMA_BUILD_SERVER=ON", "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_OPENSSL=OFF",
    # The page would be fetched from the network while building.
    "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF"]
# name -> (what the table calls it, file, its source and type if it is made, whether prompts with a long beginning are measured)
MODELS = {
    "smollm2": ("SmolLM2-135M Q4_0", "smollm2-135m-q4_0.gguf", ("smollm2-135m-q4_1.gguf", "Q4_0"), False),
    "qwen": ("Qwen2.5-Coder-0.5B Q4_K_M", "qwen2.5-coder-0.5b-q4_k_m.gguf", None, True),
}
ENGINES = ["llama-server", "marlin"]
# What says 200 once the model is loaded. marlin's /health says that it is alive, loading or not.
READY = {"llama-server": "/health", "marlin": "/ready"}
SLOTS, SLOT_TOKENS, LONG_SLOT_TOKENS = 8, 1024, 9216
VARIANTS = [(flash, unified, repack) for flash in ["on", "off"] for unified in ["--kv-unified", "--no-kv-unified"] for repack in ["--repack", "--no-repack"]]
QUESTION, KNOWN = "What is the capital of France? Answer with the name of the city.", "Paris"
SECONDS_TO_START, SECONDS_TO_STOP = 180, 20
# Below this share of one client's tokens per second, many clients show that something is broken.
LEAST_GAIN = 0.8
# (path in a measurement, what the table calls it, whether more is better, what is demanded of marlin: of the ratio, or of its own figure)
ROWS = [
    ("load.tokens_per_second", "tokens/s, {clients} clients", True, ("ratio", 2.5)),
    ("single.tokens_per_second", "tokens/s, one client", True, None),
    ("load.ttft_ms.p50", "first token p50, ms", False, ("most", 200)),
    ("load.ttft_ms.p95", "first token p95, ms", False, None),
    ("load.itl_ms.p50", "between tokens p50, ms", False, None),
    ("load.itl_ms.p95", "between tokens p95, ms", False, ("most", 25)),
    ("load.tpot_ms.p50", "per token p50, ms", False, None),
    ("load.end_to_end_ms.p95", "end to end p95, ms", False, None),
    ("prefix.cold_ms", "first token, {prefix} tokens cold, ms", False, None),
    ("prefix.warm_ms", "first token, beginning cached, ms", False, None),
    ("prefix.warm_share", "cached as a share of cold, %", False, ("most", 10)),
]


# ---- llama-server ----


def run(command, log=None, **options):
    """Runs a command that must succeed; its output goes to `log`."""
    done = subprocess.run([str(part) for part in command], stdout=log, stderr=subprocess.STDOUT if log else None, **options)
    if done.returncode != 0:
        where = f"; see {log.name}" if log else ""
        raise SystemExit(f"{shlex.join(map(str, command))}: exit status {done.returncode}{where}")


def build(args):
    """Folder with llama-server and llama-quantize."""
    folder = args.work / f"llama.cpp-{LLAMA_CPP_PYTHON}"
    programs, done = folder / "build/bin", folder / "built"
    recipe = shlex.join([args.cc, args.cxx, *CMAKE])
    if done.exists() and done.read_text() == recipe:
        return programs
    for program in [args.cc, args.cxx, "cmake"]:
        if not shutil.which(program):
            raise SystemExit(f"{program} is not there; install cmake and clang 16 or later, or name other compilers with --cc and --cxx")
    folder.mkdir(exist_ok=True)
    package = folder / f"llama_cpp_python-{LLAMA_CPP_PYTHON}.tar.gz"
    with open(f"{folder}.log", "a") as log:
        if not package.exists():
            note(f"fetching the sources of llama-cpp-python {LLAMA_CPP_PYTHON}")
            run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder, f"llama-cpp-python=={LLAMA_CPP_PYTHON}"], log)
        sources = folder / package.name.removesuffix(".tar.gz") / "vendor/llama.cpp"
        if not sources.exists():
            with tarfile.open(package) as archive:
                archive.extractall(folder, filter="data")
        note(f"building llama-server with {args.cxx}, some ten minutes; log in {log.name}")
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        run(["cmake", "-S", sources, "-B", folder / "build", *generator, *CMAKE], log, env=os.environ | dict(CC=args.cc, CXX=args.cxx))
        run(["cmake", "--build", folder / "build", "--target", "llama-server", "llama-quantize", "-j", args.jobs], log)
    done.write_text(recipe)
    return programs


# ---- servers ----


class Server:
    """A server that is running and ready."""

    def __init__(self, command, port, ready, log):
        self.base, self.ready = f"http://127.0.0.1:{port}", ready
        self.log = open(log, "a")
        self.log.write(f"\n$ {shlex.join(map(str, command))}\n")
        self.log.flush()
        self.process = subprocess.Popen([str(part) for part in command], stdout=self.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            self.wait()
        except BaseException:
            self.stop()
            raise

    def wait(self):
        """Until it says 200; it says 503 while the model is loaded, and nothing before."""
        end = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended with status {self.process.returncode} before it was ready; see {self.log.name}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                if urllib.request.urlopen(self.base + self.ready, timeout=5).status == 200:
                    return
            time.sleep(0.1)
        raise SystemExit(f"the server was not ready after {SECONDS_TO_START} s; see {self.log.name}")

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                note("the server did not end when it was asked to; killing it")
                self.process.kill()
                self.process.wait()
        self.log.close()

    def seconds(self):
        """Processor time that it has taken."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_bytes(self):
        found = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) * 1024 if found else None


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def machine_seconds():
    """Processor time of all programs, and what the hypervisor took."""
    fields = [int(field) / os.sysconf("SC_CLK_TCK") for field in pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _, _, irq, soft, steal = fields
    return user + nice + system + irq + soft, steal


@contextlib.contextmanager
def watched(server, into):
    """Adds to `into` which cores the server, the load and other programs took meanwhile."""
    before, start = (*machine_seconds(), server.seconds(), time.process_time()), time.monotonic()
    yield
    after, seconds = (*machine_seconds(), server.seconds(), time.process_time()), time.monotonic() - start
    busy, stolen, theirs, own = ((late - early) / seconds for early, late in zip(before, after))
    into |= dict(server_cores=round(theirs, 2), load_cores=round(own, 2), other_cores=round(max(0.0, busy - theirs - own), 2), stolen_cores=round(stolen, 2))


class Bench:
    def __init__(self, args):
        self.args = args
        self.programs = args.llama_server.parent if args.llama_server else None
        self.state_file, self.choices_file, self.digests = args.work / "rounds.json", args.work / "variants.json", {}

    def digest(self, path):
        if path not in self.digests:
            self.digests[path] = sha256(path)
        return self.digests[path]

    def program(self, name):
        if name == "llama-server" and self.args.llama_server:
            return self.args.llama_server
        self.programs = self.programs or build(self.args)
        return self.programs / name

    def file(self, name):
        """Path of a model's file, made unless it is there."""
        _, file, recipe, _ = MODELS[name]
        if name in self.args.file:
            path = self.args.file[name]
        elif recipe is None:
            path = self.args.sources / file
        else:
            path, source = self.args.work / file, self.args.sources / recipe[0]
            if not path.exists() and source.exists():
                note(f"making {path.name}")
                partial = path.with_name(path.name + ".partial")
                with open(self.args.work / "quantize.log", "a") as log:
                    run([self.program("llama-quantize"), "--allow-requantize", source, partial, recipe[1], self.args.threads], log)
                partial.replace(path)
        if not path.exists():
            raise SystemExit(f"{path} is not there; python bench/fetch_models.py fetches what is needed, --sources names its folder, --file {name}=PATH the file itself")
        return path

    def command(self, engine, name, port, variant):
        args, path = self.args, self.file(name)
        if engine == "marlin":
            return [args.marlin, "serve", "-m", path, "--port", port, "--threads", args.threads, *shlex.split(args.marlin_args)]
        flash, unified, repack = variant
        tokens = SLOTS * (LONG_SLOT_TOKENS if MODELS[name][3] else SLOT_TOKENS)
        return [
            self.program("llama-server"), "-m", path, "--host", "127.0.0.1", "--port", port, "-t", args.threads, "-tb", args.threads, "-np", SLOTS, "-c", tokens,
            "--cont-batching", "-fa", flash, unified, repack, "--no-webui", "--offline"]

    @contextlib.contextmanager
    def server(self, engine, name, variant):
        Machine().wait(self.args.patience)
        port = free_port()
        server = Server(self.command(engine, name, port, variant), port, READY[engine], self.args.work / f"{engine}.log")
        try:
            yield server
        finally:
            server.stop()

    def load(self, server, **changes):
        """A report of load.py that has no failures."""
        report = load.measure(server.base, timeout=600.0, deadline=3600.0, **changes)
        if report["failed"]:
            raise SystemExit(f"{report['failed']} of {report['sent']} requests failed: {'; '.join(report['errors'])}; see {server.log.name}")
        return report

    def sensible(self, server):
        """What it answers to a question; without the answer that everybody knows, its speed counts for nothing."""
        options = types.SimpleNamespace(**load.DEFAULTS | dict(max_tokens=24, ignore_eos=False, timeout=120.0))
        answer = load.ask(load.Connection(server.base, options), QUESTION)
        if answer.error or KNOWN not in answer.text:
            raise SystemExit(f"to {QUESTION!r} the server answers {answer.text!r} {answer.error or ''}; see {server.log.name}")
        return answer.text.strip()

    def choose(self, name):
        """llama-server's fastest variant, every one tried twice, in turns."""
        args, kept = self.args, read_json(self.choices_file)
        key = f"{self.digest(self.program('llama-server'))} {self.digest(self.file(name))} {args.threads} {args.clients}"
        if key not in kept:
            tried = [dict(variant=variant, tokens_per_second=[]) for variant in VARIANTS]
            for seed, one in enumerate(tried * 2):
                with self.server("llama-server", name, one["variant"]) as server:
                    self.sensible(server)
                    report = self.load(server, clients=args.clients, requests=2 * args.clients, max_tokens=min(32, args.max_tokens), seed=10_000 + seed)
                one["tokens_per_second"].append(report["tokens_per_second"])
                note(f"{name}: llama-server {' '.join(one['variant'])}: {report['tokens_per_second']:.1f} tokens/s")
            kept[key] = dict(tried=tried, best=max(tried, key=lambda one: max(one["tokens_per_second"]))["variant"])
            write_json(self.choices_file, kept)
        return kept[key]

    def measure(self, engine, name, number):
        """One engine, one model, one round."""
        args, variant = self.args, self.choose(name)["best"] if engine == "llama-server" else None
        found, seed = {}, 100 * (number + 1)
        with self.server(engine, name, variant) as server:
            found["answer"] = self.sensible(server)
            with watched(server, found.setdefault("single_machine", {})):
                found["single"] = self.load(server, clients=1, requests=4, max_tokens=args.max_tokens, seed=seed)
            with watched(server, found.setdefault("load_machine", {})):
                found["load"] = self.load(server, clients=args.clients, requests=args.requests, max_tokens=args.max_tokens, seed=seed + 1)
            if MODELS[name][3] and args.prefix_words:
                # Each beginning is new, so the first request that has it is cold.
                reports = [
                    self.load(server, clients=1, requests=3, max_tokens=8, warmup=0, shared_prefix_words=args.prefix_words, prompt_words=16, seed=seed + 2 + i)
                    for i in range(args.prefixes)]
                cold = statistics.median(report["ttft_ms_in_order"][0] for report in reports)
                warm = statistics.median(time for report in reports for time in report["ttft_ms_in_order"][1:])
                tokens = reports[0]["prompt_tokens"] // 3
                found["prefix"] = dict(prompt_tokens=tokens, cold_ms=cold, warm_ms=warm, warm_share=100 * warm / cold, reports=reports)
            found["peak_bytes"] = server.peak_bytes()
        gain = found["load"]["tokens_per_second"] / found["single"]["tokens_per_second"]
        note(
            f"round {number + 1}/{args.rounds}: {name} {engine}: one client {found['single']['tokens_per_second']:.1f} tokens/s,"
            f" {args.clients} clients {found['load']['tokens_per_second']:.1f} ({gain:.2f} times), first token {found['load']['ttft_ms']['p50']:.0f} ms")
        if gain < LEAST_GAIN:
            note(f"WARNING: {engine} is slower with {args.clients} clients than with one; it may be broken or the machine was taken")
        return found


# ---- results ----


def at(found, path):
    for key in path.split("."):
        found = (found or {}).get(key)
    return found


def spread(values):
    return dict(median=statistics.median(values), least=min(values), most=max(values))


def shown(value):
    digits = 0 if value["median"] >= 100 else 1
    return f"{value['median']:.{digits}f} ({value['least']:.{digits}f}–{value['most']:.{digits}f})"


def table(report):
    """Every row of every model, with medians and, where both engines were measured, the ratio in marlin's favour."""
    rows = []
    for name, rounds in report["models"].items():
        for path, label, more, goal in ROWS:
            values = {engine: [at(one, path) for one in rounds[engine] if at(one, path) is not None] for engine in ENGINES}
            if not any(values.values()):
                continue
            prefix = next((at(one, "prefix.prompt_tokens") for engine in ENGINES for one in rounds[engine] if at(one, "prefix.prompt_tokens")), None)
            row = dict(model=MODELS[name][0], measure=label.format(clients=report["clients"], prefix=prefix))
            row |= {engine: spread(found) for engine, found in values.items() if found}
            if all(values.values()):
                better = lambda ours, theirs: ours / theirs if more else theirs / ours
                row["ratio"] = better(*(row[engine]["median"] for engine in ENGINES[::-1]))
                row["paired"] = spread([better(ours, theirs) for theirs, ours in zip(*(values[engine] for engine in ENGINES))])
            kind, bound = goal or (None, None)
            if kind == "most" and "marlin" in row or kind == "ratio" and "ratio" in row:
                row["goal"] = f"ratio ≥ {bound}" if kind == "ratio" else f"≤ {bound}"
                row["met"] = row["ratio"] >= bound if kind == "ratio" else row["marlin"]["median"] <= bound
            rows.append(row)
    return rows


def markdown(report):
    lines = ["| model | | llama-server | marlin | ratio | goal |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for row in report["table"]:
        ratio = f"**{row['ratio']:.2f}** ({row['paired']['least']:.2f}–{row['paired']['most']:.2f})" if "ratio" in row else "–"
        goal = f"{row['goal']}, {'met' if row['met'] else 'missed'}" if "goal" in row else ""
        figures = [shown(row[engine]) if engine in row else "–" for engine in ENGINES]
        lines.append(f"| {row['model']} | {row['measure']} | {' | '.join(figures)} | {ratio} | {goal} |")
    place, versions = report["machine"], report["versions"]
    meanwhile = [one["load_machine"] for rounds in report["models"].values() for found in rounds.values() for one in found]
    others, stolen, loads = ([one[key] for one in meanwhile] for key in ["other_cores", "stolen_cores", "load_cores"])
    lines += [
        "", "Median (least–most) of {rounds} rounds; the ratio is in marlin's favour when above 1, in brackets that of single rounds. {threads} threads,"
        " {clients} clients, {requests} requests of {max_tokens} tokens, prompts of {prompt_words} words that are new in every round.".format(**report),
        f"Of {place['cores']} cores other programs took {statistics.median(others):.2f} in the median and {max(others):.2f} at most, the hypervisor"
        f" {statistics.median(stolen):.2f} and {max(stolen):.2f}, the load itself {statistics.median(loads):.2f}.", ""]
    for name, choice in report["variants"].items():
        lines.append(f"llama-server on {MODELS[name][0]}: `-np {SLOTS} -fa {' '.join(choice['best'])}`, the fastest of {len(choice['tried'])} variants.")
    lines += [
        "", f"`{report['command']}`, {report['date']}, {place['processor']}; {versions['marlin'] or 'marlin not measured'}, commit {versions['commit']};"
        f" llama-server {versions['llama_server'] or 'not measured'}, of llama-cpp-python {LLAMA_CPP_PYTHON}."]
    return "\n".join(lines) + "\n"


def output(command):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else None


def measure(bench):
    args = bench.args
    versions = dict(marlin=None, llama_server=None, commit=args.commit or output(["git", "rev-parse", "--short=12", "HEAD"]), python=platform.python_version())
    programs = {}
    if "marlin" in args.engines:
        if output([args.marlin, "serve", "--help"]) is None:
            raise SystemExit(f"{args.marlin} serve --help fails; build marlin, or name it with --marlin, or leave it out with --engines llama-server")
        versions["marlin"], programs["marlin"] = output([args.marlin, "--version"]), bench.digest(pathlib.Path(args.marlin))
    if "llama-server" in args.engines:
        program = bench.program("llama-server")
        found = re.search(r"version:\s*(.+)", output([program, "--version"]) or "")
        versions["llama_server"], programs["llama-server"] = found[1] if found else "unknown", bench.digest(program)
    report = dict(
        command="python bench/serve_vs_llama_server.py " + shlex.join(sys.argv[1:]), date=datetime.datetime.now().isoformat(timespec="minutes"), machine=machine(),
        threads=args.threads, clients=args.clients, requests=args.requests, max_tokens=args.max_tokens, prompt_words=load.DEFAULTS["prompt_words"], rounds=0,
        versions=versions, programs=programs, files={name: bench.digest(bench.file(name)) for name in args.models},
        variants={name: bench.choose(name) for name in args.models if "llama-server" in args.engines},
        models={name: {engine: [] for engine in ENGINES} for name in args.models})
    state = read_json(bench.state_file)
    for number in range(args.rounds):
        for name in args.models:
            # Who goes first alternates.
            for engine in ENGINES[:: 1 if number % 2 == 0 else -1]:
                if engine not in args.engines:
                    continue
                settings = [args.threads, args.clients, args.requests, args.max_tokens, args.prefix_words, args.prefixes]
                settings += [args.marlin_args] if engine == "marlin" else report["variants"][name]["best"]
                key = " ".join(map(str, [engine, name, number, programs[engine], report["files"][name], *settings]))
                if key not in state:
                    state[key] = bench.measure(engine, name, number)
                    write_json(bench.state_file, state)
                report["models"][name][engine].append(state[key])
            report["table"] = table(report)
            report["rounds"] = number + 1
            write_json(args.out.with_name(args.out.name + ".json"), report)
            args.out.with_name(args.out.name + ".md").write_text(markdown(report))
    print(markdown(report), end="")
    return report


def main():
    named = lambda text: (text.partition("=")[0], pathlib.Path(text.partition("=")[2]))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS), help=f"which (default: {','.join(MODELS)})")
    parser.add_argument("--engines", type=lambda text: text.split(","), default=ENGINES, help=f"which (default: {','.join(ENGINES)})")
    parser.add_argument("--threads", type=int, default=machine()["cores"])
    parser.add_argument("--clients", type=int, default=SLOTS, help=f"at once, at most llama-server's {SLOTS} slots (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prefix-words", type=int, default=7400, help="of the long beginning, about a token each; 0 leaves it out (default: %(default)s)")
    parser.add_argument("--prefixes", type=int, default=2, help="long beginnings of each round (default: %(default)s)")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "target/serve-vs-llama-server", help="where everything is kept (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, help="result without .json and .md (default: WORK/result)")
    parser.add_argument("--sources", type=pathlib.Path, default=TEST_MODELS, help="folder of the fetched models (default: %(default)s)")
    parser.add_argument("--file", type=named, action="append", default=[], metavar="MODEL=PATH", help="a model's file (repeatable)")
    parser.add_argument("--marlin", default=str(ROOT / "target/release/marlin"))
    parser.add_argument("--marlin-args", default="", help="more options of marlin serve")
    parser.add_argument("--commit", help="what marlin was built from (default: the checkout's)")
    parser.add_argument("--llama-server", type=pathlib.Path, help="the program, if it was built before")
    parser.add_argument("--patience", type=float, default=0, metavar="SECONDS", help="wait this long for a quiet machine before a server is started (default: %(default)s)")
    parser.add_argument("--cc", default="clang-16")
    parser.add_argument("--cxx", default="clang++-16")
    parser.add_argument("--jobs", type=int, default=machine()["cores"], help="of the build (default: %(default)s)")
    parser.add_argument("--only", choices=["build", "files", "variants"], help="do this step and stop")
    args = parser.parse_args()
    if not sys.platform.startswith("linux"):
        raise SystemExit("the load of the machine is read from /proc: Linux only")
    for option, known, given in [("--models", MODELS, args.models), ("--engines", ENGINES, args.engines), ("--file", MODELS, [name for name, _ in args.file])]:
        for name in given:
            if name not in known:
                parser.error(f"{option}: {name!r} is none of {', '.join(known)}")
    if min(args.rounds, args.threads, args.clients, args.requests, args.prefixes, args.jobs) < 1 or args.max_tokens < 2 or args.clients > SLOTS:
        parser.error(f"--clients is 1 to {SLOTS}, --max-tokens at least 2, other numbers at least 1")
    args.file = dict(args.file)
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out = args.out or args.work / "result"
    bench = Bench(args)
    if args.only == "build":
        print(build(args))
    elif args.only == "files":
        print("\n".join(str(bench.file(name)) for name in args.models))
    elif args.only == "variants":
        for name in args.models:
            print(name, *bench.choose(name)["best"])
    else:
        measure(bench)


if __name__ == "__main__":
    main()
