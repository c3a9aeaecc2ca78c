#!/usr/bin/env python3
"""Speed of marlin and of llama.cpp on this processor: the same files, in turns, medians and spread.

    python bench/cpu_vs_llama_cpp.py [--rounds 5] [--models q4_0,q8_0] [--tests pp512,tg128,tg128x8] [--threads 2] [--out RESULT]

Three steps; each does what is still missing, so an interrupted run is continued by the same command:

* llama.cpp: llama-cpp-python in a virtual environment of its own, compiled for this processor. Compilers matter: GCC 12 drops
  stores of llama.cpp's AMX tile configuration, so it is built by clang unless --cc and --cxx say otherwise. --llama-python
  names the interpreter of an environment that has it and numpy.
* files: the types of --models from the SmolLM2 GGUF (bench/fetch_models.py) by `llama_model_quantize`; a Llama of 1 B random
  weights with SmolLM2's tokenizer; an EXL3 model by `marlin quantize`. All below --work.
* rounds: every round measures every test of every file once with each engine, the engines in turns and only one alive
  at a time. RESULT.json has every number, RESULT.md the table, written after every round.

A test is ppN (a prompt of N tokens in one batch), tgN (N tokens one by one from an empty context) or tgNxB (B sequences
at once); both engines load the model, run the test once uncounted and then --repetitions times, so that neither starting nor
loading is measured. llama.cpp runs as its own llama-bench does (its functions, an attached thread pool), in the
variant of flash attention, repacked weights and cache layout that was fastest for it on this file and test; trying them is not part
of the rounds. Beside every measurement stands how much of the machine other programs took meanwhile.
"""

import argparse
import ctypes
import datetime
import itertools
import json
import os
import pathlib
import platform
import random
import re
import shlex
import shutil
import statistics
import struct
import subprocess
import sys
import time
import venv

from rate_distortion import ROOT, TEST_MODELS, Llama, machine, note, read_json, sha256, write_json

LLAMA_CPP_PYTHON = "0.3.36"
SOURCE = "smollm2-135m-q4_1.gguf"
SMALL_TESTS, BIG_TESTS = "pp512,tg128,tg128x8", "pp256,tg32"
# name -> (what the table calls it, how it is made, tests)
MODELS = {
    "q4_0": ("SmolLM2-135M Q4_0", "Q4_0", SMALL_TESTS),
    "q8_0": ("SmolLM2-135M Q8_0", "Q8_0", SMALL_TESTS),
    "q4_k_m": ("SmolLM2-135M Q4_K_M (mostly Q5_0)", "Q4_K_M", SMALL_TESTS),
    "f16": ("SmolLM2-135M F16", "F16", SMALL_TESTS),
    "1b": ("Llama 1 B, random, Q4_K", "random", BIG_TESTS),
    "exl3": ("SmolLM2-135M EXL3 3.0", "exl3", SMALL_TESTS),
    "embedded": ("embedded model", "embedded", SMALL_TESTS),
}
# The random model.
LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, SEED = 16, 2048, 8192, 32, 8, 64, 1
ENGINES = ["llama.cpp", "marlin"]
# Generated tokens of a trial of llama.cpp's variants.
TRIAL_TOKENS = 48
# A choice that was made while other programs took more cores than this is made again by the next run.
QUIET_CORES, QUIET_SECONDS = 0.2, 1.0
GGUF_U32, GGUF_F32, GGUF_STRING, GGUF_ARRAY = 4, 6, 8, 9
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
GGML_F32, GGML_F16 = 0, 1
ALIGNMENT = 32


class Test:
    def __init__(self, name):
        found = re.fullmatch(r"(pp|tg)([1-9]\d*)(?:x([1-9]\d*))?", name)
        if not found:
            raise SystemExit(f"--tests: {name} is none of ppN, tgN, tgNxB")
        self.name, self.prefill, self.tokens, self.batch = name, found[1] == "pp", int(found[2]), int(found[3] or 1)


# ---- the llama.cpp side, run by the environment's interpreter ----


class ThreadPoolParams(ctypes.Structure):
    """`ggml_threadpool_params`."""

    _fields_ = [
        ("cpumask", ctypes.c_bool * 512), ("n_threads", ctypes.c_int), ("prio", ctypes.c_int), ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool), ("paused", ctypes.c_bool)]


class Runner:
    """A model in llama.cpp, and contexts on it. Without an attached pool, a build without OpenMP would start its threads anew for every token."""

    def __init__(self, llama, path, threads, extra_buffers):
        self.c, self.threads = llama.c, threads
        # Through the library that is loaded: a wheel holds each library under three names as three files, and opening another of them
        # would put a second copy of ggml into the process, whose threads compute wrong results slowly.
        library = llama.library
        library.ggml_threadpool_new.restype, library.ggml_threadpool_new.argtypes = ctypes.c_void_p, [ctypes.POINTER(ThreadPoolParams)]
        library.ggml_threadpool_free.argtypes = [ctypes.c_void_p]
        library.ggml_threadpool_params_default.restype, library.ggml_threadpool_params_default.argtypes = ThreadPoolParams, [ctypes.c_int]
        self.attach = library.llama_attach_threadpool
        self.attach.restype, self.attach.argtypes = None, [ctypes.c_void_p] * 3
        parameters = library.ggml_threadpool_params_default(threads)
        if parameters.n_threads != threads:
            raise SystemExit(f"llama-cpp-python {llama.version} lays out ggml_threadpool_params in another way; use {LLAMA_CPP_PYTHON}")
        self.library, self.pool = library, library.ggml_threadpool_new(ctypes.byref(parameters))
        copies = {line.split()[-1] for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if "libggml-cpu" in line}
        if len(copies) != 1:
            raise SystemExit(f"{len(copies)} copies of ggml's library in one process, not 1: {sorted(copies)}")
        parameters = self.c.llama_model_default_params()
        parameters.use_extra_bufts = extra_buffers
        self.model = self.c.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp cannot load it; see {llama.log.name}")
        self.vocabulary = self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(self.model))

    def close(self):
        self.c.llama_model_free(self.model)
        self.library.ggml_threadpool_free(self.pool)

    def answer(self, threads, flash):
        """Logits after a short prompt, by the attached pool, or by llama.cpp's own single thread."""
        import numpy

        c, tokens = self.c, 40
        parameters = c.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = 256, tokens, tokens
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = int(flash)
        context = c.llama_init_from_model(self.model, parameters)
        if threads > 1:
            self.attach(context, self.pool, self.pool)
        prompt = (c.llama_token * tokens)(*[i * 977 % self.vocabulary for i in range(tokens)])
        if (status := c.llama_decode(context, c.llama_batch_get_one(prompt, tokens))) != 0:
            raise SystemExit(f"llama_decode returns {status}")
        logits = numpy.ctypeslib.as_array(c.llama_get_logits_ith(context, -1), shape=(self.vocabulary,)).astype("f8")
        c.llama_free(context)
        return logits

    def check(self, flash):
        """Speed counts only where all threads compute what one does."""
        expected, found = self.answer(1, flash), self.answer(self.threads, flash)
        error = abs(found - expected).max() / abs(expected).max()
        # Written so that it fails for what is not a number.
        if not error < 1e-3:
            raise SystemExit(f"llama.cpp answers otherwise with {self.threads} threads than with one: relative error {error}")

    def measure(self, test, repetitions, flash, unified):
        """Tokens per second of each repetition, after one that is not counted."""
        c = self.c
        parameters = c.llama_context_default_params()
        parameters.n_ctx = max(256, test.batch * test.tokens)
        # One computation for the whole prompt.
        parameters.n_batch = parameters.n_ubatch = max(test.tokens if test.prefill else 1, 32) * test.batch
        parameters.n_seq_max, parameters.kv_unified = test.batch, unified
        parameters.n_threads = parameters.n_threads_batch = self.threads
        parameters.flash_attn_type, parameters.no_perf = int(flash), True
        context = c.llama_init_from_model(self.model, parameters)
        if not context:
            raise SystemExit(f"llama.cpp makes no context for {test.name}")
        self.attach(context, self.pool, self.pool)
        step = test.tokens if test.prefill else 1
        batch = c.llama_batch_init(step * test.batch, 0, 1)
        draw = random.Random(SEED)
        speeds = []
        for repetition in range(repetitions + 1):
            c.llama_memory_clear(c.llama_get_memory(context), True)
            start = time.perf_counter()
            for position in range(0, test.tokens, step):
                batch.n_tokens = step * test.batch
                for row in range(batch.n_tokens):
                    sequence, offset = divmod(row, step)
                    batch.token[row], batch.pos[row] = draw.randrange(self.vocabulary), position + offset
                    batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
                    batch.logits[row] = offset == step - 1
                if (status := c.llama_decode(context, batch)) != 0:
                    raise SystemExit(f"{test.name}: llama_decode returns {status}")
                c.llama_synchronize(context)
            if repetition > 0:
                speeds.append(test.tokens * test.batch / (time.perf_counter() - start))
        c.llama_batch_free(batch)
        c.llama_free(context)
        return speeds


def buffers(log, start):
    """Where llama.cpp put the weights, by its log after `start`: name -> MiB. AMX and repacked ones are its fast paths."""
    with open(log) as file:
        file.seek(start)
        return {name: float(size) for name, size in re.findall(r"(\S+) model buffer size =\s*([\d.]+) MiB", file.read())}


def about(llama):
    return dict(llama_cpp_python=llama.version, system=llama.c.llama_print_system_info().decode().strip())


def worker_measure(llama, job):
    variant = job["variant"]
    runner = Runner(llama, job["path"], job["threads"], variant["extra_buffers"])
    runner.check(variant["flash"])
    speeds = runner.measure(Test(job["test"]), job["repetitions"], variant["flash"], variant["unified"])
    runner.close()
    return dict(speeds=speeds)


def worker_choose(llama, job):
    """Tries every variant twice, in turns."""
    test = Test(job["test"])
    if not test.prefill:
        test.tokens = min(test.tokens, TRIAL_TOKENS)
    tried = []
    for extra_buffers in [True, False]:
        llama.log.flush()
        start = os.path.getsize(llama.log.name)
        runner = Runner(llama, job["path"], job["threads"], extra_buffers)
        llama.log.flush()
        kept = buffers(llama.log.name, start)
        variants = [
            dict(flash=flash, unified=unified, extra_buffers=extra_buffers, buffers_mib=kept, speeds=[])
            for flash, unified in itertools.product([True, False], [False, True] if test.batch > 1 else [False])]
        for variant in variants * 2:
            variant["speeds"] += runner.measure(test, 1, variant["flash"], variant["unified"])
        runner.close()
        tried += variants
    return dict(tried=tried, best=max(tried, key=lambda variant: max(variant["speeds"])), **about(llama))


def worker_make(llama, job):
    c = llama.c
    parameters = c.llama_model_quantize_default_params()
    parameters.nthread, parameters.allow_requantize, parameters.pure = job["threads"], True, job["pure"]
    parameters.ftype = getattr(c, f"LLAMA_FTYPE_MOSTLY_{job['kind']}")
    if (status := c.llama_model_quantize(os.fsencode(job["source"]), os.fsencode(job["target"]), ctypes.byref(parameters))) != 0:
        raise SystemExit(f"{job['source']}: llama_model_quantize to {job['kind']} returns {status}; see {llama.log.name}")
    return about(llama)


def worker_random(_, job):
    write_random_model(pathlib.Path(job["source"]), pathlib.Path(job["target"]))
    return {}


def worker(name):
    job = json.load(sys.stdin)
    llama = Llama(None, job["log"])
    result = globals()[f"worker_{name}"](llama, job)
    llama.log.close()
    # llama.cpp may have written to stdout itself.
    print("\n" + json.dumps(result))


# ---- the random model ----


def metadata(path):
    """Key -> bytes of its type and value, of a GGUF file."""
    data = path.read_bytes()[: 64 << 20]
    if data[:4] != b"GGUF":
        raise SystemExit(f"{path}: not a GGUF file")
    count, at = struct.unpack_from("<Q", data, 16)[0], 24

    def string(at):
        length = struct.unpack_from("<Q", data, at)[0]
        return data[at + 8 : at + 8 + length], at + 8 + length

    def skip(kind, at):
        if kind == GGUF_STRING:
            return string(at)[1]
        if kind == GGUF_ARRAY:
            inner, length = struct.unpack_from("<IQ", data, at)
            at += 12
            if inner in GGUF_SIZES:
                return at + length * GGUF_SIZES[inner]
            for _ in range(length):
                at = skip(inner, at)
            return at
        return at + GGUF_SIZES[kind]

    found = {}
    for _ in range(count):
        key, at = string(at)
        start = at
        at = skip(struct.unpack_from("<I", data, at)[0], at + 4)
        found[key.decode()] = data[start:at]
    return found


def write_random_model(source, target):
    """A Llama in F16 with weights drawn from a normal distribution, tied embeddings and the tokenizer of `source`."""
    import numpy

    tokenizer = {key: value for key, value in metadata(source).items() if key.startswith("tokenizer.")}
    vocabulary = struct.unpack_from("<IIQ", tokenizer["tokenizer.ggml.tokens"])[2]
    text = lambda value: struct.pack("<IQ", GGUF_STRING, len(value)) + value.encode()
    number = lambda value: struct.pack("<II", GGUF_U32, value)
    real = lambda value: struct.pack("<If", GGUF_F32, value)
    values = {
        "general.architecture": text("llama"), "general.name": text("random Llama 1B"), "general.file_type": number(1),
        "general.alignment": number(ALIGNMENT), "llama.block_count": number(LAYERS), "llama.context_length": number(8192),
        "llama.embedding_length": number(HIDDEN), "llama.feed_forward_length": number(INTERMEDIATE),
        "llama.attention.head_count": number(HEADS), "llama.attention.head_count_kv": number(KV_HEADS),
        "llama.attention.layer_norm_rms_epsilon": real(1e-5), "llama.rope.dimension_count": number(HEAD_DIM),
        "llama.rope.freq_base": real(10000.0), "llama.vocab_size": number(vocabulary)} | tokenizer
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    tensors = [("token_embd.weight", (vocabulary, HIDDEN)), ("output_norm.weight", (HIDDEN,))]
    for layer in range(LAYERS):
        tensors += [(f"blk.{layer}.{name}.weight", shape) for name, shape in [
            ("attn_norm", (HIDDEN,)), ("attn_q", (q, HIDDEN)), ("attn_k", (kv, HIDDEN)), ("attn_v", (kv, HIDDEN)),
            ("attn_output", (HIDDEN, q)), ("ffn_norm", (HIDDEN,)), ("ffn_gate", (INTERMEDIATE, HIDDEN)),
            ("ffn_up", (INTERMEDIATE, HIDDEN)), ("ffn_down", (HIDDEN, INTERMEDIATE))]]
    name = lambda value: struct.pack("<Q", len(value)) + value.encode()
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    header += b"".join(name(key) + value for key, value in values.items())
    padded = lambda size: -(-size // ALIGNMENT) * ALIGNMENT
    offset = 0
    for tensor, shape in tensors:
        matrix = len(shape) == 2
        header += name(tensor) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        header += struct.pack("<IQ", GGML_F16 if matrix else GGML_F32, offset)
        offset += padded((2 if matrix else 4) * int(numpy.prod(shape)))
    draw = numpy.random.default_rng(SEED)
    with open(target, "wb") as out:
        out.write(header.ljust(padded(len(header)), b"\0"))
        for _, shape in tensors:
            if len(shape) == 1:
                data = numpy.ones(shape, "<f4").tobytes()
            else:
                data = (draw.standard_normal(shape, "f4") * shape[1] ** -0.5).astype("<f2").tobytes()
            out.write(data.ljust(padded(len(data)), b"\0"))


# ---- preparation ----


def environment(args):
    """Interpreter of a virtual environment with llama-cpp-python, made when there is none."""
    if args.llama_python:
        return args.llama_python
    folder = args.work / f"llama-cpp-python-{LLAMA_CPP_PYTHON}"
    python, done = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"), folder / "built"
    if done.exists():
        return python
    for compiler in [args.cc, args.cxx]:
        if not shutil.which(compiler):
            raise SystemExit(f"{compiler} is not there; install clang 16 or later, or name other compilers with --cc and --cxx")
    note(f"building llama-cpp-python {LLAMA_CPP_PYTHON} with {args.cxx}; log in {folder}.log")
    venv.create(folder, with_pip=True, clear=True)
    command = [python, "-m", "pip", "install", "--verbose", "--no-cache-dir", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={LLAMA_CPP_PYTHON}", "numpy"]
    variables = os.environ | dict(CC=args.cc, CXX=args.cxx, CMAKE_ARGS=os.environ.get("CMAKE_ARGS", "-DGGML_NATIVE=ON"))
    with open(f"{folder}.log", "w") as log:
        if subprocess.run(command, env=variables, stdout=log, stderr=subprocess.STDOUT).returncode != 0:
            raise SystemExit(f"llama-cpp-python cannot be built; see {log.name}")
    done.write_text(f"{args.cc} {args.cxx}\n")
    return python


class Machine:
    """Runs one program at a time and says what else the machine did meanwhile."""

    def __init__(self):
        self.ticks = os.sysconf("SC_CLK_TCK")

    def times(self):
        fields = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        user, nice, system, _, _, irq, soft, steal = (int(field) / self.ticks for field in fields)
        own = os.times()
        return user + nice + system + irq + soft, steal, own.children_user + own.children_system + own.user + own.system

    def wait(self, patience):
        """Until other programs leave the machine alone, at most `patience` seconds."""
        end = time.monotonic() + patience
        while time.monotonic() < end:
            busy, steal, own = self.times()
            time.sleep(QUIET_SECONDS)
            after = self.times()
            if (after[0] - busy) - (after[2] - own) + after[1] - steal < QUIET_CORES * QUIET_SECONDS:
                return

    def run(self, command, text=None):
        before, start, load = self.times(), time.monotonic(), os.getloadavg()[0]
        done = subprocess.run([str(part) for part in command], input=text, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{shlex.join(map(str, command))}: exit status {done.returncode}")
        seconds = time.monotonic() - start
        busy, steal, own = (after - earlier for earlier, after in zip(before, self.times()))
        meanwhile = dict(load_before=load, other_cores=round(max(0.0, busy - own) / seconds, 2), stolen_cores=round(steal / seconds, 2))
        return done.stdout, meanwhile


class Bench:
    def __init__(self, args):
        self.args, self.machine, self.python = args, Machine(), None
        self.choices_file = args.work / "llama-choices.json"
        self.made_file = args.work / "made.json"
        self.digests, self.chosen = {}, set()

    def llama(self, name, **job):
        self.python = self.python or environment(self.args)
        job |= dict(threads=self.args.threads, log=str(self.args.work / "llama.log"))
        self.machine.wait(self.args.patience)
        out, meanwhile = self.machine.run([self.python, __file__, "--worker", name], json.dumps(job))
        return json.loads(out.strip().split("\n")[-1]), meanwhile

    def digest(self, path):
        if path not in self.digests:
            self.digests[path] = sha256(path)
        return self.digests[path]

    def make(self, name):
        """Path of the file, made unless it is there; None for the embedded model."""
        _, kind, _ = MODELS[name]
        args, source = self.args, self.args.sources / SOURCE
        if kind == "embedded":
            return None
        if kind == "exl3" and args.exl3:
            return args.exl3
        if not source.exists():
            raise SystemExit(f"{source} is not there; python bench/fetch_models.py {SOURCE} fetches it, --sources names its folder")
        if kind == "exl3":
            target = args.work / "smollm2-135m-exl3-3.0bpw"
            if not (target / "config.json").exists():
                note("making the EXL3 model, some minutes")
                command = [args.marlin, "quantize", source, "-o", target, "--bits", "3.0", "--threads", args.threads]
                subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
            return target
        target = args.work / ("llama-1b-random-q4_k.gguf" if kind == "random" else f"smollm2-135m-{name}.gguf")
        recipe = f"{kind} {self.digest(source)}"
        made = read_json(self.made_file)
        if target.exists() and made.get(target.name) == recipe:
            return target
        note(f"making {target.name}")
        partial = target.with_name(target.name + ".partial")
        if kind == "random":
            full = target.with_name(target.name + ".f16")
            self.llama("random", source=str(source), target=str(full))
            self.llama("make", source=str(full), target=str(partial), kind="Q4_K_S", pure=True)
            full.unlink()
        else:
            self.llama("make", source=str(source), target=str(partial), kind=kind, pure=False)
        partial.replace(target)
        write_json(self.made_file, read_json(self.made_file) | {target.name: recipe})
        return target

    def choose(self, path, test):
        """Fastest variant of llama.cpp."""
        kept = read_json(self.choices_file)
        # The first number grows when the way of measuring changes, so that older choices are made again.
        key = f"2 {self.digest(path)} {test.name} {self.args.threads} {LLAMA_CPP_PYTHON}"
        if key in self.chosen or kept.get(key, {}).get("other_cores", 99) <= QUIET_CORES:
            return kept[key]
        note(f"{path.name} {test.name}: llama.cpp's variants")
        result, meanwhile = self.llama("choose", path=str(path), test=test.name)
        kept[key] = result | meanwhile
        write_json(self.choices_file, kept)
        self.chosen.add(key)
        return kept[key]

    def marlin(self, path, test):
        args = self.args
        count = ["-p", test.tokens, "-n", 0] if test.prefill else ["-p", 0, "-n", test.tokens]
        command = [args.marlin, "bench", *(["-m", path] if path else []), *count, "-r", args.repetitions]
        self.machine.wait(args.patience)
        out, meanwhile = self.machine.run([*command, "--batch", test.batch, "--threads", args.threads, "--json"])
        (row,) = json.loads(out)
        return row, meanwhile

    def measure_llama(self, path, test):
        variant = self.choose(path, test)["best"]
        result, meanwhile = self.llama("measure", path=str(path), test=test.name, repetitions=self.args.repetitions, variant=variant)
        return statistics.median(result["speeds"]), meanwhile


def output(command):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else None


# ---- results ----


def spread(values):
    return dict(median=statistics.median(values), least=min(values), most=max(values))


def summarize(row):
    """Medians, and the ratio of them; `paired` are the ratios round by round. Both engines' bytes are those of the file's tensors."""
    speeds = {engine: [one["tokens_per_second"] for one in row["rounds"][engine]] for engine in ENGINES if row["rounds"][engine]}
    test = Test(row["test"])
    for engine, values in speeds.items():
        row[engine] = spread(values)
        passes = row[engine]["median"] / test.batch / (test.tokens if test.prefill else 1)
        row[engine]["gigabytes_per_second"] = row["model_bytes"] * passes / 1e9
    if len(speeds) == 2:
        row["ratio"] = row["marlin"]["median"] / row["llama.cpp"]["median"]
        row["paired"] = spread([ours / theirs for theirs, ours in zip(*(speeds[engine] for engine in ENGINES))])


def shown(value):
    digits = 0 if value["median"] >= 100 else 1
    return f"{value['median']:.{digits}f} ({value['least']:.{digits}f}–{value['most']:.{digits}f})"


def markdown(report):
    lines = [
        "| model | test | llama.cpp, tokens/s | marlin, tokens/s | ratio | llama.cpp, GB/s | marlin, GB/s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    for row in report["rows"]:
        theirs, ratio = ("–", "–")
        if "llama.cpp" in row:
            theirs, paired = shown(row["llama.cpp"]), row["paired"]
            ratio = f"**{row['ratio']:.2f}** ({paired['least']:.2f}–{paired['most']:.2f})"
        reads = [f"{row[e]['gigabytes_per_second']:.1f}" if e in row and row["test"].startswith("tg") else "" for e in ENGINES]
        lines.append(f"| {row['model']} | {row['test']} | {theirs} | {shown(row['marlin'])} | {ratio} | {' | '.join(reads)} |")
    by_test = {(row["model"], row["test"]): row for row in report["rows"]}
    several = []
    for (model, test), row in by_test.items():
        single = by_test.get((model, test.split("x")[0]))
        if "x" in test and single:
            gains = [row[e]["median"] / single[e]["median"] if e in row else None for e in ENGINES]
            several.append(f"| {model} | {test} | " + " | ".join("–" if g is None else f"{g:.2f}" for g in gains) + " |")
    if several:
        lines += ["", "Several sequences at once, tokens/s as a multiple of one sequence's:", ""]
        lines += ["| model | test | llama.cpp | marlin |", "| --- | --- | ---: | ---: |", *several]
    others = [one["other_cores"] for row in report["rows"] for engine in row["rounds"].values() for one in engine]
    stolen = [one["stolen_cores"] for row in report["rows"] for engine in row["rounds"].values() for one in engine]
    place, versions = report["machine"], report["versions"]
    lines += [
        "", "Median (least–most) of {rounds} rounds, in brackets after the ratio that of single rounds; {threads} threads.".format(**report),
        f"Other programs took {statistics.median(others):.2f} cores in the median and {max(others):.2f} at most, the hypervisor"
        f" {statistics.median(stolen):.2f} and {max(stolen):.2f}, of {place['cores']}; load average {report['load_average'][0]:.1f} before and {report['load_average'][1]:.1f} after.",
        "", f"`{report['command']}`, {report['date']}, {place['processor']}; {versions['marlin']}, commit {versions['commit']};"
        f" llama-cpp-python {versions['llama_cpp_python'] or 'not used'}."]
    return "\n".join(lines) + "\n"


def write(report, out):
    for row in report["rows"]:
        summarize(row)
    report["load_average"][1] = os.getloadavg()[0]
    write_json(out.with_name(out.name + ".json"), report)
    out.with_name(out.name + ".md").write_text(markdown(report))


def measure(bench):
    args = bench.args
    rows, plan = [], []
    for name in args.models.split(","):
        label, kind, tests = MODELS[name]
        path = bench.make(name)
        for test in map(Test, (args.tests or tests).split(",")):
            peer = kind not in ("exl3", "embedded")
            row = dict(model=label, name=name, test=test.name, rounds={"marlin": [], "llama.cpp": []})
            if path:
                row |= dict(file=path.name, sha256=bench.digest(path))
            if peer:
                chosen = bench.choose(path, test)
                row["llama_variant"] = {k: v for k, v in chosen["best"].items() if k != "speeds"}
                row["llama_tried"] = chosen["tried"]
            rows.append(row)
            plan.append((row, path, test, peer))
    systems = [bench.choose(path, test) for _, path, test, peer in plan if peer][:1]
    report = dict(
        command="python bench/cpu_vs_llama_cpp.py " + shlex.join(sys.argv[1:]), date=datetime.datetime.now().isoformat(timespec="minutes"),
        machine=machine(), threads=args.threads, rounds=0, repetitions=args.repetitions, load_average=[os.getloadavg()[0], None],
        versions=dict(
            marlin=output([args.marlin, "--version"]), marlin_sha256=sha256(pathlib.Path(args.marlin)), commit=args.commit or output(["git", "rev-parse", "--short=12", "HEAD"]),
            python=platform.python_version(), llama_cpp_python=systems[0]["llama_cpp_python"] if systems else None,
            llama_cpp_system=systems[0]["system"] if systems else None),
        rows=rows)
    for number in range(args.rounds):
        for row, path, test, peer in plan:
            speeds = {}
            # Who goes first alternates.
            for engine in ENGINES[:: 1 if number % 2 == 0 else -1]:
                if engine == "marlin":
                    result, meanwhile = bench.marlin(path, test)
                    kept = dict(tokens_per_second=result["tokens_per_second"])
                    row |= {k: result[k] for k in ("model_bytes", "device", "activations")}
                elif peer:
                    speed, meanwhile = bench.measure_llama(path, test)
                    kept = dict(tokens_per_second=speed)
                else:
                    continue
                row["rounds"][engine].append(kept | meanwhile)
                speeds[engine] = f"{engine} {kept['tokens_per_second']:.1f}"
            note(f"round {number + 1}/{args.rounds}: {row['model']} {test.name}: {', '.join(speeds.values())}")
        report["rounds"] = number + 1
        write(report, args.out)
    print(markdown(report), end="")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=1, help="measured runs in each round, after one that is not counted (default: %(default)s)")
    parser.add_argument("--models", default=",".join(MODELS), help="which (default: %(default)s)")
    parser.add_argument("--tests", help=f"of every model (default: {SMALL_TESTS}; of the 1 B one {BIG_TESTS})")
    parser.add_argument("--threads", type=int, default=machine()["cores"])
    parser.add_argument("--out", type=pathlib.Path, help="result without .json and .md (default: WORK/result)")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "target/cpu-vs-llama-cpp", help="where everything is kept (default: %(default)s)")
    parser.add_argument("--sources", type=pathlib.Path, default=TEST_MODELS, help=f"folder of {SOURCE} (default: %(default)s)")
    parser.add_argument("--exl3", type=pathlib.Path, help="EXL3 directory of SmolLM2 that was made before")
    parser.add_argument("--marlin", default=str(ROOT / "target/release/marlin"))
    parser.add_argument("--commit", help="what marlin was built from (default: the checkout's)")
    parser.add_argument("--llama-python", type=pathlib.Path, help="interpreter with llama-cpp-python and numpy")
    parser.add_argument("--patience", type=float, default=0, metavar="SECONDS", help="wait this long for a quiet machine before every measurement (default: %(default)s)")
    parser.add_argument("--cc", default="clang-16")
    parser.add_argument("--cxx", default="clang++-16")
    parser.add_argument("--only", choices=["files"], help="make the files and stop")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker)
    if not sys.platform.startswith("linux"):
        raise SystemExit("the load of the machine is read from /proc: Linux only")
    for name in args.models.split(","):
        if name not in MODELS:
            parser.error(f"--models: {name} is none of {', '.join(MODELS)}")
    if args.rounds < 1 or args.repetitions < 1 or args.threads < 1:
        parser.error("--rounds, --repetitions and --threads are at least 1")
    args.work = args.work.resolve()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out = args.out or args.work / "result"
    bench = Bench(args)
    if args.only == "files":
        for name in args.models.split(","):
            bench.make(name)
    else:
        measure(bench)


if __name__ == "__main__":
    main()
