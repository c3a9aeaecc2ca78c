#!/usr/bin/env python3
"""Tables of what `marlin bench ops --json` measured of matrix kernels.

    marlin bench ops --ops 'linear *' --json > ops.json
    python3 bench/kernel_shares.py ops.json                      every kernel's share of the peak that bounds it
    MARLIN_CPU=scalar marlin bench ops --ops 'linear *' --json > scalar.json
    python3 bench/kernel_shares.py ops.json --beside scalar.json --formats fp8,nvfp4,tq1_0,tq2_0,iq1_s
                                                                 those formats' speed, and how often the other's

Weights of one row come from memory. Times are medians; with --least they are the least of each operator's turns, for a machine that
other programs use: there the peaks, of runs shorter than what a system gives a program at a time, are seldom interrupted and operators often.
Standard library only.
"""

import argparse
import json
import pathlib
import re


def read(path, least):
    """(format, rows) -> the row of the largest matrix; weights from memory where both were measured."""
    found = {}
    for row in json.loads(path.read_text())["ops"]:
        name, shape = re.fullmatch(r"linear (\S+)", row["operator"]), re.match(r"\[(\d+),(\d+)\]x\[(\d+)\]", row["shape"])
        if not name or not shape:
            continue
        if least:
            for value in ["gigabytes_per_second", "gigaflops_per_second", "share"]:
                row[value] *= row["median_us"] / row["least_us"]
            row["median_us"] = row["least_us"]
        key, size = (name[1], int(shape[1])), int(shape[2]) * int(shape[3])
        if key not in found or (size, row["cold"]) > found[key][0]:
            found[key] = ((size, row["cold"]), row)
    return {key: row for key, (_, row) in found.items()}


def heading(counts, *others):
    """The heading of a table with a speed for every count of rows, and what stands beside it."""
    titles = [title for n in counts for title in (f"{n} row{'s' * (n > 1)}, {'GFLOP/s' if n > 1 else 'GB/s'}", *others)]
    print("| kernel | " + " | ".join(titles) + " |\n| --- |" + " ---: |" * len(titles))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("ops", type=pathlib.Path)
    parser.add_argument("--beside", type=pathlib.Path, help="another result, to compare with")
    parser.add_argument("--formats", help="only these")
    parser.add_argument("--least", action="store_true", help="least times instead of medians")
    args = parser.parse_args()
    rows = read(args.ops, args.least)
    formats = args.formats.split(",") if args.formats else list(dict.fromkeys(name for name, _ in rows))
    if missing := [name for name in formats if not any(name == other for other, _ in rows)]:
        parser.error(f"{args.ops} has nothing of {', '.join(missing)}")
    counts = sorted({count for name, count in rows if name in formats})
    one = lambda row: f"{row['gigabytes_per_second']:.1f}" if row else "–"
    many = lambda row: f"{row['gigaflops_per_second']:.0f}" if row else "–"
    if args.beside:
        other = read(args.beside, args.least)
        heading(counts, "other", "times")
        for name in formats:
            cells = []
            for count in counts:
                ours, theirs, text = rows.get((name, count)), other.get((name, count)), one if count == 1 else many
                times = f"{theirs['median_us'] / ours['median_us']:.1f}" if ours and theirs else "–"
                cells += [text(ours), text(theirs), times]
            print(f"| {name} | " + " | ".join(cells) + " |")
        return
    heading(counts, "share")
    for name in formats:
        cells = []
        for count in counts:
            row, text = rows.get((name, count)), one if count == 1 else many
            cells += [text(row), f"{100 * row['share']:.0f} % of {row['bound']}" if row else "–"]
        print(f"| {next(rows[key]['kernel'] or name for key in rows if key[0] == name)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
