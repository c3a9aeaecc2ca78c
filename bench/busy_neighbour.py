#!/usr/bin/env python3
"""What a busy neighbour costs: `marlin bench` alone and beside processes that only burn time, in turns.

    python3 bench/busy_neighbour.py [--marlin target/release/marlin] [--model FILE] [--rounds 5] [--neighbours 0,1,2] [--threads N]

Every round measures every test beside every number of neighbours; medians count. `fair` is what is left where the system
shares the cores evenly among all threads: cores / (threads + neighbours). Kernels whose threads wait for each other by spinning fall
far below it. Without --model the embedded model is measured. Linux; standard library only.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys

import pairs

ROOT = pathlib.Path(__file__).resolve().parent.parent
# As long as the parent lives, so that none is left behind when it is killed.
BURN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(100000): pass\n"
TESTS = [["-p", "512", "-n", "0"], ["-p", "0", "-n", "64"], ["-p", "0", "-n", "32", "--batch", "8"]]


def measure(args, test, neighbours):
    burning = [subprocess.Popen([sys.executable, "-c", BURN]) for _ in range(neighbours)]
    try:
        model = ["-m", args.model] if args.model else []
        (row,) = pairs.bench(args.marlin, [*model, *test, "-r", "3", "--threads", str(args.threads)])
    finally:
        for process in burning:
            process.kill()
            process.wait()
    return pairs.name_of(row), row["tokens_per_second"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--marlin", default=str(ROOT / "target/release/marlin"))
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--neighbours", default="0,1,2", help="how many (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    counts = sorted({int(n) for n in args.neighbours.split(",")} | {0})
    if args.rounds < 1 or args.threads < 1 or counts[0] < 0:
        parser.error("--rounds and --threads are at least 1, --neighbours no less than 0")
    found = {}
    for _ in range(args.rounds):
        for test in TESTS:
            for count in counts:
                name, speed = measure(args, test, count)
                found.setdefault((name, count), []).append(speed)
    print("| test | neighbours | tokens/s | of alone | fair |\n| --- | ---: | ---: | ---: | ---: |")
    for (name, count), speeds in found.items():
        median, alone = statistics.median(speeds), statistics.median(found[name, 0])
        fair = min(1, os.cpu_count() / (args.threads + count))
        print(f"| {name} | {count} | {median:.0f} ({min(speeds):.0f}–{max(speeds):.0f}) | {median / alone:.2f} | {fair:.2f} |")


if __name__ == "__main__":
    main()
