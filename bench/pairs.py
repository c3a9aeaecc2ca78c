#!/usr/bin/env python3
"""Two builds of marlin beside each other: `marlin bench` in turns, for machines whose speed drifts.

    python3 bench/pairs.py OLD NEW [--pairs 5] [--out RESULT.json] -- -m model.gguf -p 512 -n 128 -r 2 --threads 1 --batch 1,8

OLD and NEW are two binaries. A pair is a run of each, the one that goes first alternating. For every test the table has the
medians of tokens/s, the ratio of these, the least and the most of the ratios pair by pair, and the median of these ratios.
The last row is processor time of whole processes (loading included, so its ratio is the smaller one): what other programs take does not count there, which on
a busy machine with one thread makes it the figure to read. Standard library only.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess


def bench(binary, arguments):
    """Rows of `marlin bench --json`."""
    command = [binary, "bench", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout)


def name_of(row):
    """Test and sequences of a row, as in pp512 and tg32x8."""
    return row["test"] + (f"x{row['batch']}" if row["batch"] > 1 else "")


def run(binary, arguments):
    """Tokens per second of every test, and the processor time that the process took."""
    before = os.times()
    rows = bench(binary, arguments)
    after = os.times()
    threads = lambda row: f", {row['threads']} threads" if row["threads"] > 1 else ""
    found = {name_of(row) + threads(row): row["tokens_per_second"] for row in rows}
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return found | {"processor seconds": seconds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, help="all runs as JSON")
    parser.add_argument("arguments", nargs="+", help="of `marlin bench`, behind --")
    args = parser.parse_args()
    if args.pairs < 1:
        parser.error("--pairs is at least 1")
    pairs = []
    for number in range(args.pairs):
        order = [args.old, args.new] if number % 2 == 0 else [args.new, args.old]
        runs = [run(binary, args.arguments) for binary in order]
        pairs.append(tuple(runs if number % 2 == 0 else runs[::-1]))
    if args.out:
        args.out.write_text(json.dumps(dict(arguments=args.arguments, pairs=pairs), indent=1) + "\n")
    print("| test | old | new | ratio | pair by pair |\n| --- | ---: | ---: | ---: | ---: |")
    for name in pairs[0][0]:
        old, new = (statistics.median(pair[side][name] for pair in pairs) for side in (0, 1))
        ratios = [pair[1][name] / pair[0][name] for pair in pairs]
        print(f"| {name} | {old:.4g} | {new:.4g} | {new / old:.3f} | {statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f}) |")


if __name__ == "__main__":
    main()
