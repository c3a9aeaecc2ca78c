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
TEXT = ROOT / "crates/gpu/src/ops/exl3/trellis.cu"
# The newest versions emit what the assembler of 13.0 refuses.
PACKAGES = [
    f"nvidia-{name}==13.0.*"
    for name in ("cuda-nvcc", "cuda-nvrtc", "cuda-crt", "cuda-runtime", "cuda-cccl", "nvvm")
]
GENERATIONS = ["sm_80", "sm_90a", "sm_120"]
CODEBOOKS = {"mul1": (1, 0x83DCD12D, 0), "mcg": (0, 0xCBAC1FED, 0), "3inst": (0, 89226354, 64248484)}
# Bytes that the assembler may spill of a kernel of CubeCL: it gives up a register or two for one more block at a time.
TOLERATED = 16
# Sets of four rows, and whether the kernel rotates its one row itself.
ROWS = [(1, 1), (1, 0), (2, 0), (4, 0)]


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
    """Every rate once, every number of rows and codebook with four bits."""
    for twice_bits in range(2, 17):
        yield "sm_90a", "mul1", twice_bits, (4, 0)
    for generation, rows in itertools.product(GENERATIONS, ROWS):
        yield generation, "mul1", 8, rows
    for generation, codebook in itertools.product(GENERATIONS, ("mcg", "3inst")):
        yield generation, codebook, 8, (1, 1)


def emitted() -> list[Path]:
    """What CubeCL made of our kernels, one file for each that differs."""
    names = {re.sub(r"-\d+$", "", path.stem): path for path in sorted(kernels().glob("nvidia/*.cu"))}
    return list(names.values())


def at_run_time(nvcc: Path, path: Path, generation: str, directory: str) -> tuple[int, int, str]:
    """Registers, bytes spilled and what was said, of one kernel for one generation."""
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
        return 0, 0, said.value.decode(errors="replace")
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, text)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    ptx = Path(directory) / f"{path.stem}.{generation}.ptx"
    ptx.write_bytes(text.value)
    run = subprocess.run([nvcc.parent / "ptxas", f"-arch={generation}", "-v", ptx, "-o", "/dev/null"], capture_output=True, text=True)
    said = run.stdout + run.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
    spills = sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))
    return (registers[0] if registers and not run.returncode else 0), spills, said


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
            most = max(most, registers)
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
    failed = count = 0
    most = 0
    with tempfile.TemporaryDirectory() as directory:
        for generation, codebook, twice_bits, (sets, inline) in cases():
            mul1, multiplier, addend = CODEBOOKS[codebook]
            defines = {
                "K_TILES": 256, "N_TILES": 896, "INPUTS": 4096, "OUTPUTS": 14336, "TWICE_BITS": twice_bits,
                "MUL1": mul1, "MULTIPLIER": f"{multiplier}u", "ADDEND": f"{addend}u", "SETS": sets,
                "INLINE": inline, "ENTRIES": inline, "SHARE": 1, "BIAS": 1, "RANGES": 1056, "WARPS": 8,
                "NT": 4, "RESIDENT": 2,
            }
            command = [
                nvcc, f"-arch={generation}", "-std=c++17", "-cubin", "-Xptxas", "-v", "-o",
                Path(directory) / "out.cubin", *(f"-D{k}={v}" for k, v in defines.items()), TEXT,
            ]
            run = subprocess.run(command, capture_output=True, text=True)
            said = run.stdout + run.stderr
            spills = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
            registers = [int(n) for n in re.findall(r"Used (\d+) registers", said)]
            count += 1
            most = max([most, *registers])
            if run.returncode or spills or len(registers) != 3:
                failed += 1
                print(f"{codebook} {twice_bits / 2} sets {sets} inline {inline} {generation}: "
                      f"{spills} bytes spilled\n{said if run.returncode else ''}")
    if failed:
        sys.exit(f"{failed} of {count} kernels do not compile, or spill")
    print(f"{count} variants of {TEXT.name} compile for {', '.join(GENERATIONS)}: no spills, at most {most} registers")


if __name__ == "__main__":
    main()
