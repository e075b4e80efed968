"""Runs the operators' cases on a GPU under NVIDIA's compute-sanitizer, some processes at a time.

    python tools/sanitize.py memcheck racecheck [--processes 8] [--seconds 90] [--dtype bfloat16]

Kernels are compiled first, all at once. Each process takes every so manieth case, in an order of its own, and
ends by itself after `--seconds`, so that the sanitizer says what it found in whatever was done by then.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from kuiperllm.backends.cuda.launch import collecting, compile_all
from kuiperllm.core import Device, DType
from kuiperllm.errors import KernelError
from kuiperllm.ops.cases import Case, all_cases
from kuiperllm.ops.dispatch import implementation

_LARGE_BYTES = 4 << 20
_MOST_PLACES = 20


def cases(dtype: DType) -> list[Case]:
    """Those that a GPU can compute with activations of this type, apart from large ones."""
    found = []
    for case in all_cases():
        size = sum(getattr(value, "nbytes", 0) for value in case.arguments().values())
        kind = dtype if case.activations else DType.float32
        with suppress(KernelError):
            implementation(case.function.__module__.rpartition(".")[2], Device("cuda:0"), kind)
            if size <= _LARGE_BYTES:
                found.append(case)
    return found


def run(case: Case, dtype: DType) -> None:
    """Compute a case and compare."""
    kind = dtype if case.activations else DType.float32
    arguments = case.arguments(dtype=kind)
    found = case.run(case.tensors(arguments, "cuda:0"))
    case.compare(found, case.expected(arguments, "cuda:0"), kind)


def work(dtype: DType, shard: int, shards: int, seconds: float) -> None:
    """Some of the cases, until time is up."""
    chosen = cases(dtype)[shard::shards]
    random.Random(shard).shuffle(chosen)
    started, done = time.monotonic(), 0
    for case in chosen:
        if time.monotonic() - started > seconds:
            break
        run(case, dtype)
        done += 1
    print(f"done {done} of {len(chosen)}", flush=True)


def prepare(dtype: DType) -> None:
    """Compile what the cases need."""
    device = Device("cuda:0")
    with collecting(device) as kernels:
        for case in cases(dtype):
            kind = dtype if case.activations else DType.float32
            case.run(case.tensors(case.arguments(dtype=kind), device))
    compile_all(list(kernels), device)


def places(log: str) -> Counter[str]:
    """Where in kernels something was found, each with how often; addresses are left out."""
    lines = re.findall(r"^=+ +(.*\+0x[0-9a-f]+.*)$", log, re.MULTILINE)
    return Counter(re.sub(r"\+0x[0-9a-f]+", "", line).strip() for line in lines)


def main() -> int:
    """Start the processes, and add up what they say; the exit code is 1 if something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("tools", nargs="*", default=["memcheck", "racecheck"])
    parser.add_argument("--processes", type=int, default=8, help="of each tool")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtype = DType(options.dtype)
    if options.shard is not None:
        work(dtype, options.shard, options.processes, options.seconds)
        return 0
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        sys.exit("compute-sanitizer is not installed: it comes with the CUDA toolkit")
    prepare(dtype)
    is_clean = True
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for tool in options.tools:
            for shard in range(options.processes):
                log = Path(folder) / f"{tool}-{shard}.txt"
                command = [sanitizer, "--tool", tool, "--print-limit", "20", sys.executable, __file__, tool]
                command += ["--shard", str(shard), "--processes", str(options.processes)]
                command += ["--seconds", str(options.seconds), "--dtype", options.dtype]
                with log.open("w") as output:
                    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
                started.append((tool, log, process))
        for tool in options.tools:
            done = total = findings = 0
            found: Counter[str] = Counter()
            for _, log, process in (item for item in started if item[0] == tool):
                process.wait()
                text = log.read_text()
                for match in re.finditer(r"done (\d+) of (\d+)", text):
                    done, total = done + int(match[1]), total + int(match[2])
                summaries = re.findall(r"SUMMARY: (\d+) (?:errors?|hazards?)", text)
                findings += sum(map(int, summaries))
                found += places(text)
                if process.returncode or not summaries:
                    is_clean = False
                    print(f"--- {log.name}, exit code {process.returncode}\n{text[-3000:]}")
            is_clean = is_clean and findings == 0
            for place, count in found.most_common(_MOST_PLACES):
                print(f"{tool}: {count:4} times {place}")
            print(
                f"{tool}: {findings} findings in {done} of {total} cases with {dtype} activations", flush=True
            )
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
