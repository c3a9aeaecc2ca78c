#!/usr/bin/env python3
"""Every kernel as Metal text, and those in CUDA C++ as they are: made, compiled and run on the processor by the tests of crates/gpu; Metal text is held
to what it was before.

    .ci/check_metal.py [--update]

Metal texts are compared by digests, in crates/gpu/tests/metal_text.txt: a kernel that was not to change has not. --update
writes that file. Needs cargo and a C++20 compiler ($CXX or c++).
"""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "crates/gpu/tests/metal_text.txt"


def kernels() -> Path:
    """Where the tests of crates/gpu leave the texts of kernels, a folder for each maker of GPUs."""
    found = subprocess.run(["cargo", "metadata", "--format-version", "1", "--no-deps"], cwd=ROOT, check=True, capture_output=True, text=True)
    return Path(re.search(r'"target_directory":"([^"]+)"', found.stdout).group(1)) / "tmp/kernels"


def canonical(text: str) -> str:
    """The text without what CubeCL draws: parameters in order of their attributes, values numbered as they come, no number in the name."""
    text = re.sub(r"(\[\[kernel\]\] void \w+?)_[0-9a-f]{8}\(", r"\1(", text)
    head, parameters, rest = re.fullmatch(r"(.*\[\[kernel\]\] void \w+\()(.*?)(\) \{\n.*)", text, re.DOTALL).groups()
    given = sorted(parameters.split(", "), key=lambda p: ("[[buffer" not in p, re.sub(r"v\d+", "", p)))
    numbers = {}
    return re.sub(r"\bv\d+\b|(?<=_)v\d+\b", lambda m: f"v{numbers.setdefault(m[0], len(numbers))}", head + ", ".join(given) + rest)


def main() -> None:
    folder = kernels()
    shutil.rmtree(folder, ignore_errors=True)
    # With what serves an NVIDIA GPU, whose own tests need none.
    command = "cargo test --release --locked -p marlin-gpu --features cuda,emulated".split()
    subprocess.run(command, cwd=ROOT, check=True)
    digests = set()
    for path in folder.glob("apple/*.metal"):
        name = re.sub(r"_[0-9a-f]{8}-\d+$", "", path.stem)
        text = canonical(path.read_text())
        digests.add(f"{name} {len(text.splitlines())} {hashlib.sha256(text.encode()).hexdigest()[:16]}\n")
    found = "# kernel, lines of its Metal text, digest; `.ci/check_metal.py --update` writes this\n" + "".join(sorted(digests))
    if "--update" in sys.argv:
        KEPT.write_text(found)
    kept = set(KEPT.read_text().splitlines()) if KEPT.exists() else set()
    for line in sorted(set(found.splitlines()) ^ kept):
        print(("new  " if line not in kept else "gone ") + line)
    if set(found.splitlines()) != kept:
        sys.exit("the Metal text of kernels has changed: look at it in tmp/kernels of the target folder, then run this with --update")
    print(f"{len(digests)} kernels as Metal text: compiled, run, and as they were")


if __name__ == "__main__":
    main()
