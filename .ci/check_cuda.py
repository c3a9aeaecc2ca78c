#!/usr/bin/env python3
"""Compiles kernels for NVIDIA GPUs without one, for three generations; spilled registers are a failure.

Those written in CUDA C++ in every variant, by nvcc; those that CubeCL makes as `.ci/check_metal.py` has left them, by NVRTC as at run time.
NVIDIA's compilers come from PyPI into a directory that is kept between runs.
"""

import concurrent.futures
import ctypes
import itertools
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from check_metal import kernels

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "crates/gpu/src/ops"
TEXTS = {
    "few": ["ptx.cuh", "halves.cuh", "exl3/codes.cuh", "exl3/trellis.cu"],
    "trellis": ["ptx.cuh", "halves.cuh", "exl3/codes.cuh", "gemm/trellis.cuh", "gemm/common.cuh", "gemm/warpgroups.cuh", "gemm/wgmma.cu", "gemm/mma.cu"],
    "plain": ["ptx.cuh", "halves.cuh", "gemm/plain.cuh", "gemm/common.cuh", "gemm/warpgroups.cuh", "gemm/wgmma.cu", "gemm/mma.cu"],
    "integer": ["ptx.cuh", "halves.cuh", "integer.cu"],
    "flash": ["ptx.cuh", "halves.cuh", "flash.cuh", "flash.cu"],
    "latent": ["ptx.cuh", "halves.cuh", "flash.cuh", "flash_latent.cu"],
}
# The newest versions emit what the assembler of 13.0 refuses.
PACKAGES = [
    f"nvidia-{name}==13.0.*"
    for name in ("cuda-nvcc", "cuda-nvrtc", "cuda-crt", "cuda-runtime", "cuda-cccl", "nvvm")
]
GENERATIONS = ["sm_80", "sm_90a", "sm_120"]
# From this one on a launch may start before the one before it has ended.
OVERLAPPING = 90
# Others whose registers the products of many rows fill.
OTHERS = ["sm_86", "sm_89"]
CODEBOOKS = {"mul1": (1, 0x83DCD12D, 0), "mcg": (0, 0xCBAC1FED, 0), "3inst": (0, 89226354, 64248484)}
# Bits of codes and above them, scales, and the zero or the groups that share a scale, of formats of `integer.cu`, each that differs.
INTEGERS = [(4, 0, 0, 8), (4, 1, 0, 16), (8, 0, 0, 0), (4, 0, 1, 1), (4, 1, 1, 1), (2, 0, 3, 1), (2, 1, 4, 1), (4, 0, 5, 1), (4, 1, 5, 1), (4, 2, 6, 1), (4, 0, 2, 4), (8, 0, 2, 4)]
# Rows of a tile, outputs of a warp, warps and blocks of a multiprocessor.
CUTS = [(1, 1, 32, 1), (1, 1, 16, 2), (1, 2, 16, 2), (2, 4, 16, 1), (4, 4, 16, 1), (8, 4, 8, 1)]
# Bytes that the assembler may spill of a kernel: outside its loop it gives up a few registers for one more block at a time.
TOLERATED = 32
# Sets of four rows, and whether the kernel rotates its one row itself.
ROWS = [(1, 1), (1, 0), (2, 0)]
# Columns of products of many rows by single warps, and how many a row has.
MMA = [(32, 2), (64, 2), (64, 1), (128, 1)]


def compiler() -> Path:
    """nvcc, installed if it is not there."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "marlin-ci" / "cuda-13.0"
    if not (home / "bin" / "python").exists():
        venv.create(home, with_pip=True)
    found = list(home.glob("lib/python*/site-packages/nvidia/cu13/bin/nvcc"))
    if not found or not list(found[0].parent.parent.glob("lib/libnvrtc.so*")):
        pip = [home / "bin" / "python", "-m", "pip", "install", "-q", *PACKAGES]
        subprocess.run(pip, check=True)
        found = list(home.glob("lib/python*/site-packages/nvidia/cu13/bin/nvcc"))
    if not found:
        sys.exit(f"no nvcc under {home}: delete it and run again")
    return found[0]


def cases():
    """Text, generation and macros: every rate once, every number of rows, matrices and codebook with four bits."""
    def few(generation, codebook, twice_bits, sets, inline, matrices, grouped=0, resident=2, beside=1):
        tiles = {f"N_TILES_{i}": 896 if i < matrices else 0 for i in range(3)} | {f"OUTPUTS_{i}": 14336 if i < matrices else 0 for i in range(3)}
        wide = (8 if codebook == "mul1" and twice_bits in (2, 4, 6, 8) else 4) // sets
        return "few", generation, trellis(codebook, twice_bits) | tiles | {
            "MATRICES": matrices, "SETS": sets, "INLINE": inline, "ENTRIES": int(grouped or inline and matrices < 3), "GROUPED": grouped, "SHARE": 1, "BIAS": 1,
            "RANGES": 132 * resident * wide // beside, "NT": wide, "BESIDE": beside, "TOUCHED": 3, "GROUPS": 16, "RESIDENT": resident}

    def trellis(codebook, twice_bits):
        mul1, multiplier, addend = CODEBOOKS[codebook]
        return {"K_TILES": 256, "INPUTS": 4096, "TWICE_BITS": twice_bits, "MUL1": mul1, "MULTIPLIER": f"{multiplier}u", "ADDEND": f"{addend}u"}

    def many(columns, parts, brain=0, wgmma=1, grouped=0, heads=0):
        return {"GROUPED": grouped, "SHARE": 8, "HEADS": heads, "WGMMA": wgmma, "N_TILES": 896, "OUTPUTS": 14336, "WIDTH": 14336, "N": columns, "PARTS": parts, "BIAS": 1, "BRAIN": brain}

    for twice_bits in range(2, 17):
        for sets, inline in [(1, 1), (1, 0), (2, 0)]:
            yield few("sm_90a", "mul1", twice_bits, sets, inline, 1)
        for columns, parts in [(64, 2), (64, 1), (128 if twice_bits == 8 else 96, 1)]:
            yield "trellis", "sm_90a", trellis("mul1", twice_bits) | many(columns, parts)
        for columns, parts in MMA:
            yield "trellis", GENERATIONS[twice_bits % 3], trellis("mul1", twice_bits) | many(columns, parts, wgmma=0)
    for generation, (sets, inline), matrices in itertools.product(GENERATIONS, ROWS, (1, 2, 3)):
        yield few(generation, "mul1", 8, sets, inline, matrices)
        # As tuning may have one matrix parted.
        if matrices == 1:
            yield few(generation, "mul1", 8, sets, inline, matrices, resident=1)
    for generation, inline in itertools.product(GENERATIONS, (0, 1)):
        text, _, defines = few(generation, "mul1", 8, 1, inline, 1)
        yield text, generation, defines | {"ACTIVATION": 1}
        if inline:
            for beside in (2, 8):
                yield few(generation, "mul1", 8, 1, 1, 1, beside=beside)
    for generation, formats, (rows, outputs, warps, resident), inline in integers():
        defines = {"MATRICES": len(formats), "GROUPS": 128, "M": rows, "R": outputs, "INLINE": inline, "ENTRIES": int(rows < 8), "GROUPED": int(rows == 4),
                   "SHARE": 1, "BIAS": 1, "WARPS": warps, "RESIDENT": resident, "ACTIVATION": int(len(formats) == 1)}
        for i in range(3):
            values = (14336 if i < len(formats) else 0, *formats[min(i, len(formats) - 1)])
            defines |= dict(zip((f"{name}_{i}" for name in ("OUTPUTS", "CODES", "HIGH", "SCALES", "SPAN")), values))
        yield "integer", generation, defines
    for generation, codebook, sets in itertools.product(GENERATIONS, ("mul1", "mcg"), (1, 2)):
        yield few(generation, codebook, 8, sets, 0, 2, 1)
    for generation, codebook in itertools.product(GENERATIONS, ("mcg", "3inst")):
        yield few(generation, codebook, 8, 1, 1, 1)
        yield few(generation, codebook, 8, 2, 0, 1)
    for codebook in ("mcg", "3inst"):
        yield "trellis", "sm_90a", trellis(codebook, 8) | many(128, 1)
    for columns, codebook in itertools.product((64, 128), CODEBOOKS):
        yield "trellis", "sm_90a", trellis(codebook, 8) | many(columns, 1, grouped=1) | {"ACTIVATION": 1}
        for generation in GENERATIONS:
            yield "trellis", generation, trellis(codebook, 8) | many(columns, 1, wgmma=0, grouped=1) | {"ACTIVATION": 0}
    for twice_bits in range(2, 17):
        yield "trellis", "sm_90a", trellis("mul1", twice_bits) | many(64, 1, grouped=1)
    for (columns, parts), brain in itertools.product([(64, 2), (64, 1), (96, 1)], (0, 1)):
        yield "plain", "sm_90a", {"K_TILES": 256, "INPUTS": 4096} | many(columns, parts, brain)
        if (columns, parts) == (64, 2):
            yield "plain", "sm_90a", {"K_TILES": 256, "INPUTS": 4096} | many(columns, parts, brain, heads=20)
            for generation in GENERATIONS:
                yield "plain", generation, {"K_TILES": 256, "INPUTS": 4096} | many(columns, parts, brain, wgmma=0, heads=20)
    for generation, (columns, parts) in itertools.product(GENERATIONS + OTHERS, MMA):
        for codebook, twice_bits in [("mul1", 8), ("mcg", 8), ("3inst", 8), ("mcg", 7)]:
            if codebook == "mul1" or generation in GENERATIONS:
                yield "trellis", generation, trellis(codebook, twice_bits) | many(columns, parts, wgmma=0)
        for brain in (0, 1):
            yield "plain", generation, {"K_TILES": 256, "INPUTS": 4096} | many(columns, parts, brain, wgmma=0)
    halves = itertools.product([(128, 128), (96, 80), (64, 64)], [(16, 16)], (0, 1))
    codes = itertools.product([(128, 128), (96, 96), (64, 64)], [(8, 8), (4, 4), (8, 4)], (0,))
    for generation, ((key, value), bits, brain) in itertools.product(GENERATIONS, [*halves, *codes]):
        yield "flash", generation, {"HEADS": 32, "KV_HEADS": 8, "KEY": key, "VALUE": value, "KEY_BITS": bits[0], "VALUE_BITS": bits[1], "BRAIN": brain,
                                    "BLOCK_SIZE": 16, "SCALE": "1e-1f", "WINDOW": "4096u", "CAPPED": 1, "CAP": "3e1f"}
    for generation, (key, value), brain in itertools.product(GENERATIONS, [(576, 512), (192, 128)], (0, 1)):
        yield "latent", generation, {"HEADS": 20, "KEY": key, "VALUE": value, "BRAIN": brain, "BLOCK_SIZE": 16, "SCALE": "1e-1f", "WINDOW": "0u", "CAPPED": 0, "CAP": "1e0f"}


def integers():
    """Every format with every cut on Hopper, a few elsewhere; inputs prepared before where many do not fit a block."""
    for generation, cut in itertools.product(GENERATIONS, CUTS):
        inline = int(cut[0] < 8)
        for coding in INTEGERS if generation == "sm_90a" else INTEGERS[9:11]:
            yield generation, [coding], (4, 2, *cut[2:]) if cut[0] == 4 and coding[1] == 2 else cut, inline
        if cut[0] in (1, 8):
            yield generation, [INTEGERS[7], INTEGERS[7], INTEGERS[9]], cut, inline


def written(case, directory: Path) -> Path:
    """The text with its macros before it, as it is compiled at run time."""
    text, generation, defines = case
    path = directory / ("-".join(map(str, [text, generation, *defines.values()])) + ".cu")
    path.write_text("".join(f"#define {k} {v}\n" for k, v in defines.items()) + "".join((FOLDER / part).read_text() for part in TEXTS[text]))
    return path


def emitted() -> list[Path]:
    """What CubeCL made of our kernels, one file for each that differs."""
    names = {re.sub(r"-\d+$", "", path.stem): path for path in sorted(kernels().glob("nvidia/*.cu"))}
    return list(names.values())


def at_run_time(nvcc: Path, path: Path, generation: str, directory: str) -> tuple[list[int], int, str]:
    """Registers of every kernel, bytes spilled and what was said, of one text for one generation."""
    home = nvcc.parent.parent
    # The compiler finds its own second library only if that is there already.
    ctypes.CDLL(str(sorted(home.glob("lib/libnvrtc-builtins.so*"))[0]), mode=ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(sorted(home.glob("lib/libnvrtc.so*"))[0]))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), path.read_bytes(), b"kernel.cu", 0, None, None)
    options = [f"--gpu-architecture=compute_{generation[3:]}", f"--include-path={home}/include", f"--include-path={home}/include/cccl"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*[o.encode() for o in options]))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    said = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, said)
    if status:
        return [], 0, said.value.decode(errors="replace")
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, text)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if (wrong := begins_wrongly(text.value.decode(), generation, path.parent.name == "nvidia")):
        return [], 0, f"{path}: {wrong}"
    ptx = Path(directory) / f"{path.stem}.{generation}.ptx"
    ptx.write_bytes(text.value)
    run = subprocess.run([nvcc.parent / "ptxas", f"-arch={generation}", "-v", ptx, "-o", "/dev/null"], capture_output=True, text=True)
    said = run.stdout + run.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    spills = sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))
    return (registers if not run.returncode else []), spills, said


def begins_wrongly(ptx: str, generation: str, emitted: bool) -> str | None:
    """What is wrong with how kernels wait for the launches before them, which from a generation on may not have ended."""
    if int(re.search(r"\d+", generation)[0]) < OVERLAPPING:
        return None
    for entry in ptx.split(".entry ")[1:]:
        name, before, waits = entry.split("(")[0], *entry.partition("griddepcontrol.wait")[:2]
        if not waits:
            return f"{name} does not wait for the launches before it"
        # Others read weights before they wait.
        if re.search(r"\b(st|atom|red)\.(global|relaxed|release)" + (r"|\bld\.global" if emitted else ""), before):
            return f"{name} uses memory before it waits for the launches before it"
    return None


def check_emitted(nvcc: Path) -> None:
    texts = emitted()
    if not texts:
        print("no kernels of CubeCL: .ci/check_metal.py makes them")
        return
    failed = most = 0
    with tempfile.TemporaryDirectory() as directory, concurrent.futures.ProcessPoolExecutor() as pool:
        work = list(itertools.product(texts, GENERATIONS))
        done = pool.map(at_run_time, itertools.repeat(nvcc), *zip(*work), itertools.repeat(directory))
        for (path, generation), (registers, spills, said) in zip(work, done):
            most = max([most, *registers])
            if spills:
                print(f"note: {path.stem} {generation} stores {spills} bytes of registers")
            if not registers or spills > TOLERATED:
                failed += 1
                print(said)
    if failed:
        sys.exit(f"{failed} of {len(work)} kernels of CubeCL do not compile, or spill")
    print(f"{len(texts)} kernels of CubeCL compile for {', '.join(GENERATIONS)}: at most {most} registers")


def main() -> None:
    nvcc = compiler()
    check_emitted(nvcc)
    work = list(cases())
    failed = most = 0
    with tempfile.TemporaryDirectory() as directory, concurrent.futures.ProcessPoolExecutor() as pool:
        paths = [written(case, Path(directory)) for case in work]
        generations = [generation for _, generation, _ in work]
        done = pool.map(at_run_time, itertools.repeat(nvcc), paths, generations, itertools.repeat(directory))
        for (text, generation, defines), (registers, spills, said) in zip(work, done):
            most = max([most, *registers])
            functions = {"few": 1 if defines.get("INLINE") else 3, "integer": 2 - defines.get("INLINE", 0), "flash": 1, "latent": 1}.get(text, 2)
            if len(registers) != functions or spills > TOLERATED or "serialized" in said:
                failed += 1
                print(f"{text} {generation} {defines}: {spills} bytes spilled\n{said}")
    if failed:
        sys.exit(f"{failed} of {len(work)} kernels do not compile, spill, or wait for every product")
    print(f"{len(work)} variants of our own texts compile for {', '.join(GENERATIONS + OTHERS)}: at most {most} registers")


if __name__ == "__main__":
    main()
