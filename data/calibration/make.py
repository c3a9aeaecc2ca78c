#!/usr/bin/env python3
"""Makes calibration.txt: the text that `marlin quantize` calibrates on unless told otherwise.

    python3 bench/fetch_models.py smollm2-135m-q4_1.gguf qwen2.5-coder-0.5b-q4_k_m.gguf
    python3 data/calibration/make.py generate      # about half an hour on one core; continues where it stopped
    python3 data/calibration/make.py assemble      # seconds; writes calibration.txt and prints the table of README.md

`generate` asks two small Apache-2.0 models for every prompt of prompts.py through this project's own engine (the
example `generate` of crates/engine), with the seed that `requests` derives from class and number, and keeps the
answers in --cache. `assemble` drops degenerate answers and duplicates, fills each class up to its budget, adds
excerpts of this repository as it was at SOURCE_COMMIT, and shuffles by hash, so that any prefix is mixed. Both are
deterministic given the models and the instruction set (the file that is committed was made with avx512-vnni). Python 3.10, git and cargo; no packages.
"""

import argparse
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import zlib

from prompts import CLASSES, LANGUAGES

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SEPARATOR = "\u241e"
LIMIT = 700_000
MODELS = {"smollm2": "smollm2-135m-q4_1.gguf", "qwen": "qwen2.5-coder-0.5b-q4_k_m.gguf"}
GENERATOR = ["cargo", "run", "--release", "--quiet", "--manifest-path", str(ROOT / "Cargo.toml"), "-p", "marlin-engine", "--example", "generate", "--"]

SOURCE_COMMIT = "3008852"
SOURCES = re.compile(r"(crates/.*\.(rs|py)|docs/.*\.md|bench/.*\.py|fuzz/.*\.(rs|md)|\.ci/.*|README\.md|CONTRIBUTING\.md|.*/?Cargo\.toml)$")
# Tables of numbers, and what would only repeat itself.
NOT_SOURCES = re.compile(r"grids\.rs|LICENSE|fixtures/.*\.json")
SOURCE_BYTES = {"own code": 70_000, "own documentation": 35_000}

# What may be somebody's: addresses, names of authors, licences. What is no answer.
FOREIGN = re.compile(r"https?://|www\.|\w@\w|copyright|\u00a9|all rights reserved|licen[cs]e|wikipedia|lorem ipsum", re.I)
REFUSAL = re.compile(r"^\W*(i'm sorry|i am sorry|sorry|as an ai|i can't|i cannot|i'm unable)|an ai (language )?model|أعتذر|üzgünüm|извините|죄송|抱歉|申し訳|désolé|lo siento", re.I)
SENTENCE_END = re.compile(r"[.!?:;\u3002\uff01\uff1f\u061f\u0964](?=[\s\"'\u201d\u2019)*\u300d]|$)|[\u3002\uff01\uff1f]")
DIALOGUES = [("User: ", "Assistant: "), ("Human: ", "AI: "), ("Q: ", "A: ")]


def digest(*parts):
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def requests(model):
    """Requests for `model`, classes interleaved so that an interrupted run has some of everything."""
    found = []
    for name, wanted, _, _, (max_tokens, temperature, min_p, penalty), prompts in CLASSES:
        for i, prompt in enumerate(prompts):
            if wanted == model:
                request = {"prompt": prompt, "seed": int(digest(name, i)[:8], 16), "max_tokens": max_tokens,
                           "temperature": temperature, "min_p": min_p, "repetition_penalty": penalty}
                request["id"] = digest(MODELS[model], json.dumps(request, sort_keys=True))[:16]
                found.append(((i + 0.5) / len(prompts), name, i, request))
    return [(name, i, request) for _, name, i, request in sorted(found, key=lambda row: row[:3])]


def answers(cache, model):
    """Answers so far, by the request's id. A line that an interruption cut is asked for again."""
    path, found = cache / f"{model}.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            answer = json.loads(line)
            found[answer["id"]] = answer
        except ValueError:
            continue
    return found


def generate(args):
    args.cache.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        path = args.models / MODELS[model]
        if not path.exists():
            raise SystemExit(f"{path}: not there; python3 bench/fetch_models.py {MODELS[model]}")
        done = answers(args.cache, model)
        missing = [request for _, _, request in requests(model) if request["id"] not in done]
        print(f"{model}: {len(done)} answers, {len(missing)} to come", flush=True)
        if not missing:
            continue
        lines = "".join(json.dumps(request) + "\n" for request in missing)
        with open(args.cache / f"{model}.jsonl", "a") as out:
            out.write("\n")
            out.flush()
            command = (args.generator or GENERATOR) + [str(path), str(args.threads), str(args.batch)]
            subprocess.run(command, input=lines.encode(), stdout=out, check=True)


def ratio(text):
    """How many times zlib shrinks the text; prose of a thousand bytes is about 2, loops are above 4."""
    data = text.encode()
    return len(data) / len(zlib.compress(data, 9))


def cut(text, form, finished):
    """The answer without a torn end, and, for code, what stands in its fence."""
    if form == "code":
        fence = re.search(r"```[\w+#-]*\n(.*?)(```|\Z)", text, re.S)
        if fence and len(fence[1]) > 250 and int(digest(text)[:2], 16) % 2:
            return fence[1].rstrip()
        return text.strip()
    if not finished:
        ends = [m.end() for m in SENTENCE_END.finditer(text)]
        text = text[:ends[-1]] if ends else ""
    return text.strip()


def fault(name, form, text):
    """Why a text is left out, or None."""
    short = 150 if form in ("code", "question") else 200
    if len(text.encode()) < short:
        return "short"
    if "\ufffd" in text or SEPARATOR in text or re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text):
        return "characters"
    if FOREIGN.search(text):
        return "foreign"
    if REFUSAL.search(text):
        return "refusal"
    if ratio(text) > (5.5 if form == "code" else 3.3 if name in ("mathematics", "markdown") else 2.8 if name not in LANGUAGES else 3.4):
        return "repetition"
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 8]
    if len(lines) > 4 and len(set(lines)) < (0.6 if form == "code" else 0.75) * len(lines):
        return "repetition"
    if name in LANGUAGES:
        mark = LANGUAGES[name][0]
        letters = re.findall(r"[^\W\d_]", text)
        if " " not in mark:
            if sum(bool(re.match(f"[{mark}]", c)) for c in letters) < 0.7 * len(letters):
                return "language"
        else:
            words = re.findall(r"[^\W\d_]+", text.lower())
            if sum(word in mark.split() for word in words) < 0.06 * len(words):
                return "language"
    return None


def shingles(text):
    words = text.split() if text.count(" ") * 12 > len(text) else list(text)
    return {tuple(words[i:i + 6]) for i in range(len(words) - 5)}


def written(form, number, prompt, text):
    """The document, with the prompt where a reader would see it."""
    if form == "dialogue":
        user, assistant = DIALOGUES[number % len(DIALOGUES)]
        return f"{user}{prompt}\n\n{assistant}{text}"
    if form == "instruction":
        return f"### Instruction\n{prompt}\n\n### Response\n{text}"
    if form == "question":
        prompt = prompt.removesuffix(" Answer in one paragraph.")
        return f"Question: {prompt}\nAnswer: {text}" if number % 2 else f"{prompt}\n\n{text}"
    return text


def generated(cache):
    """(class, document) of the answers worth keeping, up to each class's budget."""
    done = {model: answers(cache, model) for model in MODELS}
    documents, faults, seen = [], {}, set()
    for name, model, budget, form, _, _ in CLASSES:
        used = 0
        for _, number, request in (row for row in requests(model) if row[0] == name):
            answer = done[model].get(request["id"])
            if answer is None:
                faults["not generated"] = faults.get("not generated", 0) + 1
                continue
            text = cut(answer["text"], form, answer["finish_reason"] == "stop")
            why = fault(name, form, text)
            pieces = shingles(text)
            if why is None and len(pieces & seen) > 0.3 * len(pieces):
                why = "duplicate"
            if why is None and used + len(text.encode()) > budget * 1.02:
                why = "over budget"
            if why is not None:
                faults[why] = faults.get(why, 0) + 1
                continue
            seen |= pieces
            document = written(form, number, request["prompt"], text)
            used += len(document.encode())
            documents.append((name, document))
    print(f"left out: {faults}", file=sys.stderr)
    return documents


def excerpts():
    """(class, document) of this repository's own text, cut at empty lines."""
    def git(*args):
        return subprocess.run(["git", "-C", str(ROOT), *args], check=True, capture_output=True, text=True).stdout

    pieces = []
    for path in git("ls-tree", "-r", "--name-only", SOURCE_COMMIT).splitlines():
        if not SOURCES.search(path) or NOT_SOURCES.search(path):
            continue
        text, piece, start = git("show", f"{SOURCE_COMMIT}:{path}"), "", 0
        kind = "own documentation" if path.endswith(".md") else "own code"
        for paragraph in text.split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) > 2_200:
                pieces.append((digest(path, start), kind, path, piece.strip("\n")))
                start, piece = start + len(piece), ""
        if len(piece) > 600:
            pieces.append((digest(path, start), kind, path, piece.strip("\n")))
    used, per_file, documents = dict.fromkeys(SOURCE_BYTES, 0), {}, []
    for _, kind, path, text in sorted(pieces):
        size = len(text.encode())
        most = 12 if kind == "own documentation" else 2
        if size > 5_000 or ratio(text) > 4.5 or per_file.get(path, 0) >= most or used[kind] + size > SOURCE_BYTES[kind]:
            continue
        used[kind] += size
        per_file[path] = per_file.get(path, 0) + 1
        documents.append((kind, text))
    return documents


def tokens(marlin, model, texts):
    """Tokens of the texts joined, by a model's tokenizer."""
    command = [marlin, "tokenize", "-m", str(model), "--json", "--file", "-"]
    answer = subprocess.run(command, input="\n".join(texts).encode(), check=True, capture_output=True).stdout
    return len(json.loads(answer)["ids"])


def assemble(args):
    documents = generated(args.cache) + excerpts()
    documents.sort(key=lambda row: digest(row[1]))
    text = f"\n{SEPARATOR}\n".join(document for _, document in documents) + "\n"
    if len(text.encode()) > LIMIT:
        raise SystemExit(f"{len(text.encode())} bytes, at most {LIMIT} wanted; lower a budget in prompts.py")
    (HERE / "calibration.txt").write_text(text, encoding="utf-8", newline="\n")
    counters = [args.models / file for file in MODELS.values()] if args.marlin else []
    names = ["SmolLM2 tokens", "Qwen2.5 tokens"][:len(counters)]
    print("| class | documents | bytes |" + "".join(f" {name} |" for name in names))
    print("| --- | ---: | ---: |" + " ---: |" * len(names))
    kinds = [row[0] for row in CLASSES] + list(SOURCE_BYTES)
    for kind in kinds + ["all"]:
        texts = [document for name, document in documents if kind in (name, "all")]
        size = sum(len(t.encode()) for t in texts)
        counts = [tokens(args.marlin, model, texts) for model in counters]
        print(f"| {kind} | {len(texts):,} | {size:,} |" + "".join(f" {n:,} |" for n in counts))
    print(f"sha256 {hashlib.sha256(text.encode()).hexdigest()}, {len(text.encode())} bytes", file=sys.stderr)


def main():
    home = pathlib.Path.home() / ".cache/marlin"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=pathlib.Path, default=pathlib.Path(os.environ.get("MARLIN_TEST_MODELS") or home / "test-models"))
    parser.add_argument("--cache", type=pathlib.Path, default=home / "calibration", help="answers (default: %(default)s)")
    verbs = parser.add_subparsers(dest="verb", required=True)
    asking = verbs.add_parser("generate")
    asking.add_argument("--threads", type=int, default=1)
    asking.add_argument("--batch", type=int, default=16)
    asking.add_argument("--generator", nargs="+", help="command instead of cargo run")
    joining = verbs.add_parser("assemble")
    joining.add_argument("--marlin", help="the binary, to count tokens")
    args = parser.parse_args()
    {"generate": generate, "assemble": assemble}[args.verb](args)


if __name__ == "__main__":
    main()
