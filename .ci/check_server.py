#!/usr/bin/env python3
"""Checks `marlin serve` from outside, as its users meet it.

    check_server.py [--marlin FILE] [--model MODEL] [--only AREA[,AREA]] [--list] [--strict]

Starts the server on a free port with the embedded model (or --model), drives it with the clients that
people use (openai, anthropic, langchain-openai), with generated requests (schemathesis), and with
what operators do: keys, TLS, signals, settings. The model needs no network; the clients' packages, pinned in
requirements.txt, are installed into a virtual environment below target/ when they are missing.

One line per check. What a binary does not have yet (an endpoint that answers 404, a field that is refused
as `unsupported_parameter`) is skipped with the reason; --strict counts that as a failure.
"""
import argparse
import hashlib
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
REQUIREMENTS = HERE / "requirements.txt"
# In this order: the quick and basic first.
AREAS = ["openai", "structured", "anthropic", "langchain", "bodies", "schema", "answers", "access", "life", "settings", "kv_events", "traces", "page"]


def pinned():
    lines = (line.split("#")[0].strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if line)


def have_packages():
    try:
        return all(importlib.metadata.version(name) == version for name, version in pinned().items())
    except importlib.metadata.PackageNotFoundError:
        return False


def enter_environment():
    """Goes on in a Python that has the packages; makes one if there is none."""
    if have_packages():
        return
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    digest = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = target / f"check-server-{digest}"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if os.environ.get("MARLIN_CHECKS_VENV") == str(folder):
        sys.exit(f"{folder} lacks packages of {REQUIREMENTS}; remove it and try again")
    if not (folder / "complete").exists():
        print(f"installing {', '.join(pinned())} into {folder}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(REQUIREMENTS)]
        if subprocess.run(install).returncode != 0:
            sys.exit("the packages cannot be installed; see above")
        (folder / "complete").touch()
    environment = {**os.environ, "MARLIN_CHECKS_VENV": str(folder)}
    sys.exit(subprocess.run([str(python), *sys.argv], env=environment).returncode)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--marlin", default="marlin", metavar="FILE", help="the binary [default: from PATH]")
    parser.add_argument("-m", "--model", help="another model than the embedded one")
    parser.add_argument("--only", default="", metavar="AREA", help="areas, or parts of names of checks, with commas")
    parser.add_argument("--list", action="store_true", help="names the checks and ends")
    parser.add_argument("--strict", action="store_true", help="a skipped check is a failure")
    options = parser.parse_args()
    enter_environment()

    sys.path.insert(0, str(HERE))
    from server.harness import CHECKS, Context, Skip, failure

    for area in AREAS:
        importlib.import_module(f"server.{area}")
    wanted = [part for part in options.only.split(",") if part]
    checks = [c for c in CHECKS if not wanted or any(part in c.name for part in wanted)]
    if options.list:
        print("\n".join(check.name for check in checks))
        return 0
    marlin = shutil.which(options.marlin)
    if marlin is None:
        sys.exit(f"{options.marlin} is not there; build it, or name it with --marlin")
    begun, counts = time.monotonic(), {"ok": 0, "skipped": 0, "FAILED": 0}
    context = Context(os.path.abspath(marlin), options.model)
    try:
        for check in checks:
            start, outcome, note = time.monotonic(), "ok", None
            try:
                note = check.run(context)
            except Skip as skip:
                outcome, note = "skipped", str(skip)
            except Exception as error:
                outcome, note = "FAILED", failure(error)
            counts[outcome] += 1
            seconds = time.monotonic() - start
            print(f"{outcome:8} {check.name} ({seconds:.1f} s){': ' + note if note else ''}", flush=True)
            context.revive()
    finally:
        context.close()
    seconds = time.monotonic() - begun
    print(f"\n{counts['ok']} ok, {counts['skipped']} skipped, {counts['FAILED']} failed; {seconds:.0f} s")
    return int(counts["FAILED"] > 0 or options.strict and counts["skipped"] > 0)


if __name__ == "__main__":
    sys.exit(main())
