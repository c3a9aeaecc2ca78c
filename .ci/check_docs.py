#!/usr/bin/env python3
"""Checks that what the pages say can be done.

Reads README.md, CONTRIBUTING.md, docs/**/*.md and bench/**/*.md, in the repository root, with `marlin` on PATH:

* a block fenced ```sh is run by bash and must succeed;
* a block fenced ```sh manual (needs a model, a GPU, minutes) is not run, but every
  `marlin VERB --flag` in it must exist in `marlin VERB --help`, and every script and crate
  example it starts must exist;
* other names of shells are refused, so that no command escapes both;
* relative links, and the headings they point at, must exist;
* README.md names every verb.

    check_docs.py [--ran COMMAND]

COMMAND has been run already: lines of README.md equal to it are skipped, and it must be there.
"""
import argparse
import functools
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

BLOCK_SECONDS = 900
FENCE = re.compile(r"^(\s*)(`{3,})\s*(.*?)\s*$")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")


def pages():
    """Every checked page, as paths relative to the root."""
    front = [Path("README.md"), Path("CONTRIBUTING.md")]
    below = [page for folder in ("docs", "bench") for page in sorted(Path(folder).rglob("*.md"))]
    return [p for p in front if p.exists()] + below


def blocks(text):
    """(line number, language, code) of every fenced block; unfenced text as language None."""
    found, prose, inside = [], [], None
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if inside is None and fence:
            inside = (number, fence[3], fence[2], len(fence[1]), [])
        elif inside is not None and fence and fence[2] == inside[2] and not fence[3]:
            found.append((inside[0], inside[1], "\n".join(inside[4])))
            inside = None
        elif inside is not None:
            inside[4].append(line[inside[3]:])
        else:
            prose.append((number, line))
    if inside is not None:
        found.append((inside[0], "unclosed", ""))
    return found, prose


def run(code, ran):
    """Output of a failing block, or None. Lines equal to `ran` are left out."""
    lines = [line for line in code.splitlines() if line.strip() != ran]
    if not any(line.strip() for line in lines):
        return None
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", timeout=BLOCK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"still running after {BLOCK_SECONDS} s"
    return None if done.returncode == 0 else f"exit {done.returncode}\n{done.stdout[-4000:]}"


@functools.cache
def help_of(verbs):
    """Help of `marlin VERBS`, or None when there is no such verb."""
    done = subprocess.run(["marlin", *verbs, "--help"], capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


def subcommands(text):
    section = re.search(r"^Commands:\n((?:[ \t]+.*\n?|\n)*)", text, re.M)
    return re.findall(r"^  (\w[\w-]*)", section[1], re.M) if section else []


def check_marlin(words):
    """Complaints about one command line `marlin …`."""
    verbs, text = (), help_of(())
    complaints = []
    for word in words:
        if word == "--":
            break
        if word in subcommands(text):
            verbs += (word,)
            text = help_of(verbs)
            continue
        if not verbs and not word.startswith("-"):
            return [f"marlin has no verb {word!r}"]
        if not word.startswith("-") or word == "-" or re.fullmatch(r"-[\d.]+", word):
            continue
        flag = word.split("=", 1)[0]
        if not flag.startswith("--"):
            flag = flag[:2]
        if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text):
            complaints.append(f"marlin {' '.join(verbs)} has no {flag}")
    return complaints


def check_manual(code):
    """Complaints about the commands of a block that is not run."""
    complaints = []
    joined = re.sub(r"\\\n\s*", " ", code)
    for line in joined.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            complaints.append(f"{line!r}: {error}")
            continue
        command = []
        for word in words + [";"]:
            if word not in ("|", ";", "&&", "||", ">", ">>", "&"):
                command.append(word)
                continue
            while command and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", command[0]):
                command.pop(0)
            complaints += check_command(command)
            command = []
    return complaints


def check_command(command):
    if not command:
        return []
    if command[0] == "marlin":
        return check_marlin(command[1:])
    if command[:2] == ["cargo", "run"] and "--" in command:
        end = command.index("--")
        if "--example" not in command:
            return check_marlin(command[end + 1:])
    if "--example" in command:
        name = command[command.index("--example") + 1]
        return [] if list(Path("crates").glob(f"*/examples/{name}.rs")) else [f"no example {name}"]
    if command[0] in ("python3", "bash") and len(command) > 1 and not command[1].startswith("-"):
        return [] if Path(command[1]).exists() else [f"{command[1]} does not exist"]
    if "/" in command[0] and not Path(command[0]).exists():
        return [f"{command[0]} does not exist"]
    return []


def anchors(path):
    """Anchors that a page's headings get on the usual web views."""
    _, prose = blocks(path.read_text(encoding="utf-8"))
    titles = [line.lstrip("#").strip() for _, line in prose if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


def check_links(path, prose):
    complaints = []
    for number, line in prose:
        for target in LINK.findall(re.sub(r"`[^`]*`", "", line)):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = path if not name else Path(os.path.normpath(path.parent / name))
            if not file.exists():
                complaints.append(f"{path}:{number}: {target} does not exist")
            elif anchor and file.suffix == ".md" and anchor not in anchors(file):
                complaints.append(f"{path}:{number}: {file} has no heading #{anchor}")
    return complaints


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--ran", help="command of README.md that has been run already")
    ran = arguments.parse_args().ran
    if help_of(()) is None:
        sys.exit("marlin --help fails; put the built binary on PATH")
    complaints, executed, read = [], 0, 0
    listed = [line.strip() for line in Path("README.md").read_text(encoding="utf-8").splitlines()]
    if ran and ran not in listed:
        complaints.append(f"README.md: the test command {ran!r} is not there")
    readme = "\n".join(listed)
    for verb in subcommands(help_of(())):
        if verb != "help" and f"`{verb}" not in readme:
            complaints.append(f"README.md: `{verb}` is not in the table of verbs")
    for path in pages():
        found, prose = blocks(path.read_text(encoding="utf-8"))
        complaints += check_links(path, prose)
        for number, language, code in found:
            where = f"{path}:{number}"
            if language == "sh":
                start = time.monotonic()
                failure = run(code, ran)
                executed += 1
                print(f"{where}: {'failed' if failure else 'ok'}, {time.monotonic() - start:.1f} s")
                if failure:
                    complaints.append(f"{where}: {failure}")
            elif language == "sh manual":
                read += 1
                complaints += [f"{where}: {c}" for c in check_manual(code)]
            elif language in ("bash", "shell", "console", "unclosed"):
                complaints.append(f"{where}: a block is `sh` or `sh manual`, not {language!r}")
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    print(f"{len(pages())} pages, {executed} blocks run, {read} blocks read, {len(complaints)} complaints")
    sys.exit(1 if complaints else 0)


if __name__ == "__main__":
    main()
