#!/usr/bin/env python3
"""What each choice of the quantizer is worth: one model per choice and seed, evaluated against the source.

    python bench/ablations.py MODEL --calibration FILE --text FILE [--rows defaults,search ...] [--threads N]

Makes `marlin quantize MODEL --bits 3.0 --calibration-tokens 65536 --set ...` for every row of `ROWS`, evaluates it with `marlin eval
compare` and throws it away. Every figure is kept at once in WORK/ablations.json, so the same command goes on after an interruption.
"""

import argparse
import datetime
import json
import os
import pathlib
import shlex
import shutil
import statistics
import sys
import time

from rate_distortion import ROOT, WINDOW, SCORE_FROM, machine, marlin, note, read_json, sha256, write_json

# Name -> (options, seeds). Differences below that between seeds are noise.
ROWS = {
    "defaults": ([], [0, 1, 2]),
    "search": (["--set", "search=128"], [0, 1, 2]),
    "refit": (["--set", "refit=false"], [0, 1, 2]),
    "passes": (["--set", "passes=1"], [0, 1, 2]),
    "source": (["--set", "calibration.through=source"], [0, 1, 2]),
    "pooled": (["--set", "calibration.moments=pooled"], [0, 1, 2]),
    "random": (["--set", "calibration.moments=random"], [0]),
    "feedback": (["--set", "feedback=false"], [0]),
    "measure": (["--measure"], [0, 1, 2]),
    "damping 0.001": (["--set", "damping=0.001"], [0]),
    "damping 0.1": (["--set", "damping=0.1"], [0]),
    "scales": (["--set", "scales.exponent=0.5", "--set", "scales.hessian_exponent=0.25"], [0]),
    "mcg": (["--codebook", "mcg"], [0]),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--calibration", type=pathlib.Path, required=True)
    parser.add_argument("--text", type=pathlib.Path, required=True, help="text to evaluate on")
    parser.add_argument("--bits", default="3.0")
    parser.add_argument("--tokens", type=int, default=65536, help="calibration tokens (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=80)
    parser.add_argument("--rows", default=",".join(ROWS), help="any of %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of a row at most (default: %(default)s)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "target/ablations")
    parser.add_argument("--marlin", default=shutil.which("marlin") or str(ROOT / "target/release/marlin"))
    args = parser.parse_args()
    if unknown := [row for row in args.rows.split(",") if row not in ROWS]:
        parser.error(f"--rows: {', '.join(unknown)}")
    args.work.mkdir(parents=True, exist_ok=True)
    file, made = args.work / "ablations.json", args.work / "model"
    place = ["--threads", args.threads] if args.threads else []
    base = ["--bits", args.bits, "--calibration", args.calibration, "--calibration-tokens", args.tokens]
    settings = " ".join(map(str, [*base[:2], *base[4:], args.windows, sha256(args.model), sha256(args.text), sha256(args.calibration)]))
    kept = read_json(file)
    if kept and kept["settings"] != settings:
        parser.error(f"{file} holds another experiment; name another --work")
    kept |= dict(
        what="what each choice of the quantizer is worth", command="python bench/ablations.py " + shlex.join(sys.argv[1:]), settings=settings,
        machine=machine(), date=datetime.date.today().isoformat(), marlin=marlin(args, "--version").strip())
    rows = kept.setdefault("rows", {})
    for name in args.rows.split(","):
        options, seeds = ROWS[name]
        row = rows.setdefault(name, dict(options=shlex.join(options), runs={}))
        for seed in seeds[: args.seeds]:
            if str(seed) in row["runs"]:
                continue
            start, before = time.time(), os.times()
            report = json.loads(marlin(
                args, "quantize", args.model, "-o", made, *base, *options, "--seed", seed, "--fresh", "--json", *place))
            after = os.times()
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
            seconds = time.time() - start
            evaluated = json.loads(marlin(
                args, "eval", "compare", made, "--reference", args.model, "--text", args.text, "--window", WINDOW,
                "--score-from", SCORE_FROM, "--windows", args.windows, "--json", *place))
            own = evaluated["models"][1]
            proxy = [t["proxy_error"] for t in report["tensors"]]
            row["runs"][str(seed)] = dict(
                kl_divergence=own["kl_divergence"], perplexity=own["perplexity"], top1_agreement=own["top1_agreement"],
                stored_bits=report["all_stored_bits"], file_bytes=own["file_bytes"], mean_proxy_error=statistics.fmean(proxy),
                seconds=round(seconds, 1), cpu_seconds=round(cpu, 1), encoder_seconds=round(report["encoder_seconds"], 1),
                encoder=report["encoder"])
            write_json(file, kept)
            note(f"{name}, seed {seed}: KL {own['kl_divergence']:.5f}, {cpu:.0f} CPU seconds")
            shutil.rmtree(made)
    print(f"| choice | KL by seed | mean KL | perplexity | mean proxy error | CPU seconds |\n| --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        if runs := list(row["runs"].values()):
            mean = lambda field: statistics.fmean(run[field] for run in runs)
            kls = ", ".join(f"{run['kl_divergence']:.4f}" for run in runs)
            print(f"| `{row['options'] or 'the defaults'}` | {kls} | {mean('kl_divergence'):.4f} | {mean('perplexity'):.3f} |"
                  f" {mean('mean_proxy_error'):.5f} | {mean('cpu_seconds'):.0f} |")


if __name__ == "__main__":
    main()
