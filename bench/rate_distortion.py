#!/usr/bin/env python3
"""EXL3 models of our quantizer beside llama.cpp's types: size, perplexity and divergence from the same source.

    python bench/rate_distortion.py --text wiki.test.raw [--models smollm2,qwen] [--only peers|ours|eval|table]

A source that llama.cpp does not read has no peers:

    python bench/rate_distortion.py --models stories --source stories=glm-stories --bits 2.0,2.5,3.0,4.0,5.0 --quantize-args=--measure \\
        --calibration stories-calibration.txt --text bench/data/stories-eval.txt --only ours --only eval --only table

Four steps; each does what is still missing, so an interrupted run is continued by the same command:

* peers: llama.cpp's importance matrix of the source GGUF, from the rows of calibration text that `marlin quantize` reads,
  then one file per type of --peers by `llama_model_quantize`. Needs numpy and llama-cpp-python (`pip install`ed, or
  a folder that holds the unpacked package: --llama-cpp FOLDER). No other step needs more than the standard library.
* ours: `marlin quantize` at every rate of --bits.
* eval: `marlin eval compare` against the source, on the first --windows windows of --text.
* table: WORK/rate_distortion.json and .md, from everything that was evaluated on this text.

The table says of every EXL3 model whether it lies below the curve of the GGUF types: of those that no other type beats at no
more size, with the logarithm of the divergence interpolated between neighbours.
"""

import argparse
import ctypes
import datetime
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
import types
import typing

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEST_MODELS = pathlib.Path(os.environ.get("MARLIN_TEST_MODELS") or pathlib.Path.home() / ".cache/marlin/test-models")
# name -> (file in --sources, rates)
MODELS = {
    "smollm2": ("smollm2-135m-q4_1.gguf", "2.0,2.5,3.0,3.5,4.0,5.0,6.0"),
    "qwen": ("qwen2.5-coder-0.5b-q4_k_m.gguf", "2.5,3.0,4.0"),
}
PEERS = "IQ2_XXS,IQ2_M,Q2_K,IQ3_XXS,IQ3_M,Q3_K_M,IQ4_XS,Q4_0,Q4_K_M,Q5_K_M,Q6_K"
STEPS = ["peers", "ours", "eval", "table"]
WINDOW, SCORE_FROM = 512, 256

# What `marlin quantize` makes of its text (crates/cli/src/commands/quantize/text.rs, crates/convert/src/calibration.rs).
SEPARATOR = "\n\u241e\n"
CALIBRATION_TOKENS, CALIBRATION_COLUMNS, RANDOM_SHARE, HELD_OUT_WINDOWS = 131072, 2048, 0.06, 16
# Tokens that llama.cpp computes at a time, its imatrix tool's default.
BATCH = 512
# Its imatrix tool ignores multiplications with fewer tokens.
FEWEST_TOKENS = 16


def sha256(path):
    digest = hashlib.sha256()
    for part in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        with open(part, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_json(path):
    return json.loads(path.read_text()) if path.exists() else {}


def write_json(path, value):
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def note(text):
    print(text, file=sys.stderr, flush=True)


class Model:
    """A source, and the files made from it in `work`."""

    def __init__(self, name, source, bits, args):
        self.name, self.source, self.bits, self.args = name, source, bits, args
        self.work = args.work / name
        self.peers, self.ours = self.work / "peers", self.work / "exl3"
        self.peers_file, self.ours_file, self.evaluations_file = (
            self.work / f"{stem}.json" for stem in ("peers", "ours", "evaluations"))
        self.digests = {}

    def digest(self, path):
        if path not in self.digests:
            self.digests[path] = sha256(path)
        return self.digests[path]

    def variants(self):
        """Name -> (rate, options of `marlin quantize`)."""
        args, suffix, options = self.args, "", []
        for option, value in [("--head-bits", args.head_bits), ("--embedding-bits", args.embedding_bits)]:
            if value is not None:
                suffix += f"-{option[2]}{value}"
                options += [option, value]
        if args.calibration_tokens != CALIBRATION_TOKENS:
            suffix += f"-c{args.calibration_tokens}"
            options += ["--calibration-tokens", args.calibration_tokens]
        if args.quantize_args:
            suffix += "-" + re.sub(r"[^A-Za-z0-9.=_]+", "-", args.quantize_args).strip("-")
            options += shlex.split(args.quantize_args)
        if args.calibration:
            options += ["--calibration", str(args.calibration)]
        return {f"{float(bits)}{suffix}": (bits, options) for bits in self.bits}

    def candidates(self):
        """Name in the table -> path, of what this call's options name and is whole."""
        records = read_json(self.peers_file)
        found = {f"GGUF {kind}": self.peers / f"{kind}.gguf" for kind in self.args.peers if kind in records}
        found |= {f"EXL3 {name}": self.ours / name for name in self.variants()}
        return {name: path for name, path in found.items() if path.exists() and (path.is_file() or (path / "config.json").exists())}


# ---- llama.cpp ----

class Tensor(ctypes.Structure):
    """`ggml_tensor` up to its name; `Llama.check` compares with the library's own reading of one."""
    _fields_ = [
        ("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4), ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32), ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p), ("view_offs", ctypes.c_size_t), ("data", ctypes.c_void_p), ("name", ctypes.c_char * 64)]


class Llama:
    """The package's bindings of the C interface, without the rest of the package and what that imports."""

    def __init__(self, folder, log):
        if folder:
            sys.path.insert(0, str(folder))
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None:
            raise SystemExit("llama-cpp-python is not there; pip install llama-cpp-python==0.3.36, or name its folder with --llama-cpp")
        package = types.ModuleType("llama_cpp")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["llama_cpp"] = package
        if importlib.util.find_spec("typing_extensions") is None:
            stub = types.ModuleType("typing_extensions")
            stub.TypeAlias = typing.Any
            sys.modules["typing_extensions"] = stub
        self.c = importlib.import_module("llama_cpp.llama_cpp")
        init = pathlib.Path(package.__path__[0], "__init__.py").read_text()
        self.version = re.search(r'__version__ = "([^"]+)"', init).group(1)
        if not hasattr(self.c, "llama_model_imatrix_data"):
            raise SystemExit(f"llama-cpp-python {self.version} has no llama_model_imatrix_data; use 0.3.36 or later")
        self.log = open(log, "a")
        self.level, self.on_log = 0, self.c.llama_log_callback(self.write)
        self.c.llama_log_set(self.on_log, None)
        self.c.llama_backend_init()
        library = self.c._lib
        library.ggml_op_name.restype = library.ggml_get_name.restype = ctypes.c_char_p
        library.ggml_op_name.argtypes, library.ggml_get_name.argtypes = [ctypes.c_int], [ctypes.c_void_p]
        self.library, self.checked = library, False
        # The numbers differ between versions; the two follow each other.
        self.mul_mat = next(number for number in range(200) if library.ggml_op_name(number) == b"MUL_MAT")
        self.mul_mat_id = self.mul_mat + 1
        assert library.ggml_op_name(self.mul_mat_id) == b"MUL_MAT_ID"

    def write(self, level, text, _):
        # Five continues a line of the level before, one is for llama.cpp's own developers.
        self.level = self.level if level == 5 else level
        if self.level != 1:
            self.log.write(text.decode(errors="replace"))

    def check(self, address, tensor):
        if not self.checked and self.library.ggml_get_name(address) != tensor.name:
            raise SystemExit(f"llama-cpp-python {self.version} lays out ggml_tensor in another way; use 0.3.36")
        self.checked = True


def view(numpy, tensor, kind):
    """The elements of a tensor in host memory, slowest dimension first, not copied."""
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    size = sum((n - 1) * s for n, s in zip(shape, strides)) + numpy.dtype(kind).itemsize
    memory = (ctypes.c_char * size).from_address(tensor.data)
    return numpy.ndarray(shape, kind, memory, 0, strides)


class Importance:
    """Sums of squares of the inputs of every matrix of the layers, by llama.cpp's name: what its imatrix tool collects."""

    def __init__(self, llama):
        import numpy

        self.numpy, self.llama, self.sums, self.counts, self.error = numpy, llama, {}, {}, None

    def callback(self, address, ask, _):
        try:
            tensor = Tensor.from_address(address)
            if tensor.op not in (self.llama.mul_mat, self.llama.mul_mat_id):
                return not ask
            self.llama.check(address, tensor)
            weight, inputs = (Tensor.from_address(tensor.src[i]) for i in range(2))
            # A backend's copy of a tensor is named BACKEND#NAME#NUMBER.
            name = weight.name.decode()
            name = name.split("#")[1] if "#" in name else name
            indirect = tensor.op == self.llama.mul_mat_id
            wanted = name.startswith("blk.") and inputs.type == 0 and (indirect or inputs.ne[1] >= FEWEST_TOKENS)
            if ask or not wanted:
                return wanted or not ask
            self.collect(name, weight, view(self.numpy, inputs, "f4"), Tensor.from_address(tensor.src[2]) if indirect else None)
            return True
        except BaseException as error:  # nothing may be raised through C
            self.error = self.error or error
            return False

    def collect(self, name, weight, inputs, chosen):
        numpy = self.numpy
        matrices, width = weight.ne[2] * weight.ne[3], weight.ne[0]
        sums = self.sums.setdefault(name, numpy.zeros((matrices, width)))
        counts = self.counts.setdefault(name, numpy.zeros(matrices))

        def add(matrix, rows):
            sums[matrix] += numpy.einsum("ij,ij->j", rows, rows)
            counts[matrix] += len(rows)

        if chosen is not None:
            experts = view(numpy, chosen, "i4")[0, 0]
            for slot in range(experts.shape[1]):
                rows = inputs[0, :, slot % inputs.shape[2]]
                for expert in numpy.unique(experts[:, slot]):
                    add(expert, rows[experts[:, slot] == expert])
            return
        for outer, group in enumerate(inputs):
            for inner, rows in enumerate(group):
                add(outer % weight.ne[3] * weight.ne[2] + inner % weight.ne[2], rows)

    def means(self):
        """Mean squares by name, one for an expert that saw nothing."""
        out = {}
        for name, sums in self.sums.items():
            counts = self.counts[name][:, None]
            out[name] = self.numpy.where(counts > 0, sums / self.numpy.maximum(counts, 1), 1.0).astype("f4").ravel()
            if not self.numpy.isfinite(out[name]).all():
                raise SystemExit(f"{name}: inputs that are not finite")
        return out


def calibration_rows(tokens, count):
    """The rows of text that `marlin quantize` reads; it adds random ones, which are no text and are left out here."""
    held_out = min(HELD_OUT_WINDOWS, len(tokens) // 10 // WINDOW)
    tokens = tokens[: len(tokens) - held_out * WINDOW]
    wanted = round(count // CALIBRATION_COLUMNS * (1 - RANDOM_SHARE))
    columns = min(CALIBRATION_COLUMNS, len(tokens))
    available = len(tokens) // columns
    used = min(wanted, available)
    starts = [row * available // used * columns for row in range(used)]
    return [tokens[start : start + columns] for start in starts]


def tokenize(c, vocabulary, text):
    tokens = []
    for document in text.split(SEPARATOR):
        data = document.encode()
        out = (c.llama_token * (len(data) + 8))()
        count = c.llama_tokenize(vocabulary, data, len(data), out, len(out), False, False)
        if count < 0:
            raise SystemExit(f"llama_tokenize asks for {-count} tokens of {len(out)}")
        tokens += out[:count]
    return tokens


def importance(llama, model, source, text, key):
    """Mean squares by name, and how many tokens they are of; kept in the work folder after every few rows."""
    import numpy

    c, path = llama.c, model.work / "imatrix.npz"
    collector, done = Importance(llama), 0
    if path.exists():
        with numpy.load(path) as kept:
            if str(kept["key"]) == key:
                done = int(kept["rows"])
                for name in kept.files:
                    what, _, tensor = name.partition(":")
                    if tensor:
                        {"sums": collector.sums, "counts": collector.counts}[what][tensor] = kept[name]
                if bool(kept["whole"]):
                    return collector.means(), int(kept["tokens"])

    def keep(rows, tokens, whole):
        values = {f"sums:{k}": v for k, v in collector.sums.items()} | {f"counts:{k}": v for k, v in collector.counts.items()}
        partial = path.with_name("imatrix.partial.npz")
        numpy.savez(partial, key=key, rows=rows, tokens=tokens, whole=whole, **values)
        partial.replace(path)

    parameters = c.llama_model_default_params()
    parameters.n_gpu_layers = 0
    loaded = c.llama_model_load_from_file(os.fsencode(source), parameters)
    if not loaded:
        raise SystemExit(f"{source}: llama.cpp cannot load it; see {llama.log.name}")
    rows = calibration_rows(tokenize(c, c.llama_model_get_vocab(loaded), text), model.args.calibration_tokens)
    parameters = c.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = max(map(len, rows)), BATCH, BATCH
    parameters.n_threads = parameters.n_threads_batch = model.args.threads or os.cpu_count()
    on_node = c.ggml_backend_sched_eval_callback(collector.callback)
    parameters.cb_eval = on_node
    context = c.llama_init_from_model(loaded, parameters)
    batch = c.llama_batch_init(BATCH, 0, 1)
    start, tokens = time.time(), sum(len(row) for row in rows[:done])
    for number, row in enumerate(rows[done:], done + 1):
        c.llama_memory_clear(c.llama_get_memory(context), True)
        for first in range(0, len(row), BATCH):
            part = row[first : first + BATCH]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, first + i, 1, 0
                # The last layer only computes rows whose logits are wanted.
                batch.logits[i] = 1
            status = c.llama_decode(context, batch)
            if collector.error:
                raise collector.error
            if status != 0:
                raise SystemExit(f"llama_decode gave {status}; see {llama.log.name}")
        tokens += len(row)
        if number % 4 == 0 or number == len(rows):
            keep(number, tokens, number == len(rows))
            note(f"{model.name}: importance matrix, row {number} of {len(rows)}, {time.time() - start:.0f} s")
    c.llama_batch_free(batch)
    c.llama_free(context)
    c.llama_model_free(loaded)
    return collector.means(), tokens


def quantize_peer(llama, source, target, kind, means, threads):
    """Writes `target`; the means reach the quantizer as an array of (name, data, size) that ends with a null name."""
    c = llama.c
    parameters = c.llama_model_quantize_default_params()
    parameters.nthread, parameters.allow_requantize = threads or os.cpu_count(), True
    parameters.ftype = getattr(c, f"LLAMA_FTYPE_MOSTLY_{kind}")
    entries = (c.llama_model_imatrix_data * (len(means) + 1))()
    for entry, (name, values) in zip(entries, means.items()):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if means:
        parameters.imatrix = entries
    partial = target.with_name(target.name + ".partial")
    status = c.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(parameters))
    llama.log.flush()
    if status == 0:
        partial.replace(target)
    else:
        partial.unlink(missing_ok=True)
    return status == 0


def make_peers(model):
    if model.source.is_dir():
        note(f"{model.name}: peers are made from GGUF files only, this is a directory")
        return
    args = model.args
    calibration = args.calibration or ROOT / "data/calibration/calibration.txt"
    text = calibration.read_text(encoding="utf-8")
    model.peers.mkdir(parents=True, exist_ok=True)
    key = f"{model.digest(model.source)} {hashlib.sha256(text.encode()).hexdigest()} {args.calibration_tokens} {BATCH}"
    records = read_json(model.peers_file)
    missing = [k for k in args.peers if records.get(k, {}).get("key") != key or not (model.peers / f"{k}.gguf").exists()]
    if not missing:
        return
    llama = Llama(args.llama_cpp, model.work / "llama.log")
    for kind in missing:
        if not hasattr(llama.c, f"LLAMA_FTYPE_MOSTLY_{kind}"):
            raise SystemExit(f"--peers: llama.cpp has no type {kind}")
    # llama.cpp multiplies faster by f16, and does not round the inputs to integers there.
    half = model.work / "f16.gguf"
    if not half.exists() and not quantize_peer(llama, model.source, half, "F16", {}, args.threads):
        raise SystemExit(f"{model.source}: llama.cpp cannot make F16 of it; see {llama.log.name}")
    means, tokens = importance(llama, model, half, text, key)
    for kind in missing:
        target, start = model.peers / f"{kind}.gguf", time.time()
        # Some types cannot be read by its quantizer directly.
        through = not quantize_peer(llama, model.source, target, kind, means, args.threads)
        if through and not quantize_peer(llama, half, target, kind, means, args.threads):
            raise SystemExit(f"{kind}: llama.cpp refuses; see {llama.log.name}")
        records[kind] = dict(
            key=key, bytes=target.stat().st_size, seconds=round(time.time() - start, 1), through_f16=through,
            llama_cpp_python=llama.version, imatrix_tokens=tokens, imatrix_tensors=len(means), calibration=calibration.name)
        write_json(model.peers_file, records)
        note(f"{model.name}: {kind}, {records[kind]['bytes']} bytes, {records[kind]['seconds']} s")


# ---- marlin ----

def marlin(args, *arguments):
    command = [args.marlin, *map(str, arguments)]
    note("+ " + shlex.join(command))
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode != 0:
        raise SystemExit(f"{shlex.join(command)}: exit status {process.returncode}")
    return process.stdout


def place(args):
    """Where both verbs compute."""
    return [*(["--threads", args.threads] if args.threads else []), *(["--device", args.device] if args.device else [])]


def make_ours(model):
    records = read_json(model.ours_file)
    for name, (bits, options) in model.variants().items():
        target = model.ours / name
        # The configuration is written last.
        if (target / "config.json").exists():
            continue
        command = ["quantize", model.source, "-o", target, "--bits", bits, *options]
        start, resumed, before = time.time(), target.exists(), os.times()
        report = json.loads(marlin(model.args, *command, *place(model.args), "--json"))
        after = os.times()
        text = f"marlin quantize {model.source.name} " + shlex.join(map(str, ["--bits", bits, *options, *place(model.args)]))
        # Seconds of all threads, which neighbours on the machine disturb less than those of the clock.
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        records[name] = dict(
            command=text, seconds=round(time.time() - start, 1), cpu_seconds=round(cpu, 1), resumed=resumed,
            **{field: report[field] for field in ("bits", "all_stored_bits", "encoder", "encoder_seconds")})
        write_json(model.ours_file, records)


def evaluation_settings(model, text_digest):
    return f"{model.digest(model.source)} {text_digest} {model.args.windows} {WINDOW} {SCORE_FROM}"


def evaluate(model, text_digest):
    """Adds what is missing to the model's file of evaluations: settings -> name -> row of `eval compare`."""
    args, settings = model.args, evaluation_settings(model, text_digest)
    kept = read_json(model.evaluations_file)
    rows = kept.setdefault(settings, {})
    candidates = model.candidates()
    absent = [f"GGUF {k}" for k in args.peers if f"GGUF {k}" not in candidates]
    absent += [f"EXL3 {n}" for n in model.variants() if f"EXL3 {n}" not in candidates]
    if absent:
        note(f"{model.name}: not made yet: {', '.join(absent)}")
    missing = [n for n, path in candidates.items() if rows.get(n, {}).get("sha256") != model.digest(path)]
    for first in range(0, len(missing), args.group):
        names = missing[first : first + args.group]
        start = time.time()
        report = json.loads(marlin(
            args, "eval", "compare", *[candidates[n] for n in names], "--reference", model.source, "--text", args.text,
            "--window", WINDOW, "--score-from", SCORE_FROM, "--windows", args.windows, "--json", *place(args)))
        common = {k: v for k, v in report.items() if k not in ("models", "reference")}
        common |= dict(group=len(names), group_seconds=round(time.time() - start, 1))
        by_path = {row["model"]: row for row in report["models"]}
        for name, path in [("source", model.source)] + [(n, candidates[n]) for n in names]:
            row = {k: v for k, v in by_path[str(path)].items() if k != "model"}
            rows[name] = row | common | dict(text=args.text.name, sha256=model.digest(path))
        write_json(model.evaluations_file, kept)


# ---- table ----
AXES = {"file_bytes": "bytes", "bits_per_weight_linears": "bits of linears", "bits_per_weight": "bits of all"}


def front(rows, axis):
    """(size, log divergence) of the GGUF files that no other beats at no more size, by size."""
    points, best = [], math.inf
    for row in sorted(rows, key=lambda r: (r[axis], r["kl_divergence"])):
        if row["kl_divergence"] < best:
            best = row["kl_divergence"]
            points.append((row[axis], math.log(max(best, 1e-9))))
    return points


def against(row, curve, axis):
    """Verdict, and the divergence as a share of the curve's; of the curve's continuation where `extrapolated`."""
    x, own = row[axis], math.log(max(row["kl_divergence"], 1e-9))
    if not curve:
        return dict(verdict="no curve", ratio=None, extrapolated=False)
    (x0, y0), (xn, yn) = curve[0], curve[-1]
    if x < x0:
        # Smaller than every peer. Better than the smallest settles it; otherwise the first segment's continuation is only shown.
        (x1, y1) = curve[1] if len(curve) > 1 else (x0 + 1, y0)
        at = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        return dict(verdict="below" if own <= y0 else "outside", ratio=math.exp(own - at), extrapolated=True)
    at = yn
    for (x1, y1), (x2, y2) in zip(curve, curve[1:]):
        if x1 <= x < x2:
            at = y1 + (y2 - y1) * (x - x1) / (x2 - x1)
    return dict(verdict="below" if own < at else "not below", ratio=math.exp(own - at), extrapolated=False)


def shown(verdict):
    if verdict["ratio"] is None:
        return verdict["verdict"]
    mark = "~" if verdict["extrapolated"] else ""
    return f"{verdict['verdict']} ({mark}{verdict['ratio']:.2f})"


def markdown(name, result):
    lines = [
        f"## {name}: {result['source']}", "",
        f"{result['tokens_scored']} tokens in {result['windows']} windows of {result['text']}; KL divergence from the source in nats per token.", "",
        "| model | bits, linears | bits, head | bits, all | file bytes | perplexity | KL | top-1 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for row in result["rows"]:
        kl = "" if row["is_reference"] else f"{row['kl_divergence']:.5f}"
        top = "" if row["is_reference"] else f"{row['top1_agreement'] * 100:.2f} %"
        lines.append(
            f"| {row['name']} | {row['bits_per_weight_linears']:.3f} | {row['bits_per_weight_head']:.3f} | {row['bits_per_weight']:.3f} |"
            f" {row['file_bytes']:,} | {row['perplexity']:.4f} | {kl} | {top} |")
    if result["verdicts"]:
        lines += [
            "", "Against the curve of the GGUF types, in brackets KL as a share of the curve's there, `~` where no peer is that small and"
            " the curve is continued:", "",
            "| model | " + " | ".join(f"by {label}" for label in AXES.values()) + " |", "| --- |" + " --- |" * len(AXES)]
        for own, verdicts in result["verdicts"].items():
            lines.append(f"| {own} | " + " | ".join(shown(verdicts[axis]) for axis in AXES) + " |")
    return "\n".join(lines) + "\n"


def summarize(model, text_digest):
    rows = read_json(model.evaluations_file).get(evaluation_settings(model, text_digest), {})
    if len(rows) < 2:
        note(f"{model.name}: nothing evaluated on this text")
        return None
    rows = sorted((dict(name=name) | row for name, row in rows.items()), key=lambda r: r["file_bytes"])
    peers = [r for r in rows if r["name"].startswith("GGUF")]
    curves = {axis: front(peers, axis) for axis in AXES}
    ours = [r for r in rows if r["name"].startswith("EXL3") and peers]
    verdicts = {r["name"]: {a: against(r, curves[a], a) for a in AXES} for r in ours}
    common = {k: rows[0][k] for k in ("text", "windows", "tokens_scored", "window", "score_from")}
    return common | dict(
        source=model.source.name, source_sha256=model.digest(model.source), text_sha256=text_digest, rows=rows, verdicts=verdicts,
        peers=read_json(model.peers_file), ours=read_json(model.ours_file))


def machine():
    about = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", about.read_text()) if about.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return dict(processor=name, cores=cores, system=platform.platform())


def tabulate(models, args, text_digest):
    if not (results := {m.name: r for m in models if (r := summarize(m, text_digest))}):
        return
    version = marlin(args, "--version").strip()
    llama = sorted({p["llama_cpp_python"] for r in results.values() for p in r["peers"].values()})
    report = dict(
        command="python bench/rate_distortion.py " + shlex.join(sys.argv[1:]), date=datetime.date.today().isoformat(), machine=machine(),
        versions=dict(marlin=version, marlin_sha256=sha256(pathlib.Path(args.marlin)), python=platform.python_version(), llama_cpp_python=llama),
        models=results)
    write_json(args.work / "rate_distortion.json", report)
    text = "\n".join(markdown(name, result) for name, result in results.items())
    where = "{processor}, {cores} cores".format(**report["machine"])
    text += f"\n`{report['command']}`, {report['date']}, {where}; {version}, llama-cpp-python {', '.join(llama) or 'not used'}.\n"
    (args.work / "rate_distortion.md").write_text(text)
    print(text, end="")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help="any of smollm2, qwen and names given with --source (default: %(default)s)")
    parser.add_argument("--sources", type=pathlib.Path, default=TEST_MODELS, help="folder of the GGUF files (default: %(default)s)")
    parser.add_argument("--source", action="append", default=[], metavar="NAME=PATH", help="another model (repeatable)")
    parser.add_argument("--text", type=pathlib.Path, help="text to evaluate on: wiki.test.raw")
    parser.add_argument("--windows", type=int, default=80)
    parser.add_argument("--bits", help="rates of our models (default: smollm2 2.0 ... 6.0, qwen 2.5, 3.0 and 4.0)")
    parser.add_argument("--head-bits", help="passed to marlin quantize; part of the model's name")
    parser.add_argument("--embedding-bits", help="passed to marlin quantize; part of the model's name")
    parser.add_argument("--quantize-args", help="more options of marlin quantize, in one string; part of the model's name")
    parser.add_argument("--calibration", type=pathlib.Path, help="text for both sides (default: the built-in mix)")
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS, help="for both (default: %(default)s)")
    parser.add_argument("--peers", default=PEERS, help="types of llama.cpp (default: %(default)s)")
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "target/rate-distortion", help="where everything is kept (default: %(default)s)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", help="passed to marlin quantize and marlin eval")
    parser.add_argument("--group", type=int, default=4, help="models evaluated side by side; what an interruption loses (default: %(default)s)")
    parser.add_argument("--marlin", default=shutil.which("marlin") or str(ROOT / "target/release/marlin"))
    parser.add_argument("--llama-cpp", type=pathlib.Path, help="folder with the unpacked llama_cpp package")
    parser.add_argument("--only", choices=STEPS, action="append", help="only this step (repeatable)")
    args = parser.parse_args()
    args.peers = [p for p in args.peers.split(",") if p]
    steps = args.only or STEPS
    known = {name: (args.sources / file, bits) for name, (file, bits) in MODELS.items()}
    known |= {name: (pathlib.Path(path), MODELS["smollm2"][1]) for name, _, path in (g.partition("=") for g in args.source)}
    models = []
    for name in args.models.split(","):
        if name not in known:
            parser.error(f"--models: {name} is none of {', '.join(known)}")
        source, bits = known[name]
        if not source.exists():
            parser.error(f"{source} is not there; python bench/fetch_models.py fetches the test models, --sources names their folder")
        models.append(Model(name, source, [b for b in (bits if args.bits is None else args.bits).split(",") if b], args))
    if {"eval", "table"} & set(steps) and args.text is None:
        parser.error("--text is needed to evaluate")
    text_digest = sha256(args.text) if args.text else None
    for model in models:
        model.work.mkdir(parents=True, exist_ok=True)
        if "peers" in steps:
            make_peers(model)
        if "ours" in steps:
            make_ours(model)
        if "eval" in steps:
            evaluate(model, text_digest)
    if "table" in steps:
        tabulate(models, args, text_digest)


if __name__ == "__main__":
    main()
