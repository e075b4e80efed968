"""Every CUDA kernel compiles for every chip, without warnings and without spilling registers; needs no GPU.

Which kernels there are, the operators say themselves: their cases run on GPUs on paper, which note what would
be launched. The tests compile a selection. All of them, and a table of what they take:

    python tests/backends/cuda/test_compile_everywhere.py [ARCH ...]
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout, suppress
from functools import lru_cache

import numpy as np
import pytest
from paper import CHIPS, paper_gpus

from kuiperllm.backends.cuda import bandwidth, copy, jit
from kuiperllm.backends.cuda.driver import Resources
from kuiperllm.backends.cuda.jit import Kernel
from kuiperllm.backends.cuda.launch import collecting
from kuiperllm.backends.cuda.sources import expand, isolate
from kuiperllm.errors import DeviceError, KernelError
from kuiperllm.ops.cases import all_cases

MAX_ARGUMENT_BYTES = 16 << 20
FEW_VALUES = 4
"""A parameter with more values than this is a size: one of them stands for all."""

SPILL_BYTES = 24
"""What a thread may spill: a few bytes, once, are no loss, and chips differ in that."""

FLOAT_SPILL_BYTES = 256
"""The same with float32 activations: such kernels are there to be exact, and nobody waits for them."""


@lru_cache(maxsize=1)
def wanted() -> dict[str, list[Kernel]]:
    """By chip, the kernels that the cases of all operators launch there."""
    with paper_gpus() as devices, ExitStack() as stack:
        found = {arch: stack.enter_context(collecting(device)) for arch, device in devices.items()}
        for case in all_cases():
            if importlib.util.find_spec(f"{case.function.__module__}.cuda") is None:
                continue
            taken = getattr(
                importlib.import_module(f"{case.function.__module__}.cuda"), "DTYPES", case.dtypes
            )
            for dtype in (dtype for dtype in case.dtypes if dtype in taken):
                arguments = case.arguments(dtype=dtype)
                arrays = [value for value in arguments.values() if isinstance(value, np.ndarray)]
                if sum(array.nbytes for array in arrays) <= MAX_ARGUMENT_BYTES:
                    for device in devices.values():
                        case.run(case.tensors(arguments, device))
    for arch, chip in CHIPS.items():
        found[arch].update(dict.fromkeys((*copy.kernels(chip), *bandwidth.kernels(chip))))
    return {arch: list(kernels) for arch, kernels in found.items()}


def selection(kernels: Sequence[Kernel], share: int, shares: int) -> list[Kernel]:
    """Every function once, and of the kernels in which a parameter first has one of its values, a share."""
    values = defaultdict(set)
    for kernel in kernels:
        for name, value in kernel.defined:
            values[kernel.source, kernel.name, name].add(value)
    seen: set[object] = set()
    chosen = []
    for index, kernel in enumerate(sorted(kernels, key=_first_choice)):
        function = (kernel.source, kernel.name)
        facts = {(*function, n, v) for n, v in kernel.defined if len(values[*function, n]) <= FEW_VALUES}
        if function not in seen or (not facts <= seen and index % shares == share):
            chosen.append(kernel)
            seen |= facts | {function}
    return chosen


def _first_choice(kernel: Kernel) -> bool:
    """bfloat16 comes first: it is what most models have."""
    return ("T", "bf16") not in kernel.defined


def complaints(kernel: Kernel, remarks: str, found: Resources | None) -> list[str]:
    """What is wrong with a kernel, by what compiler and assembler said."""
    wrong = [line for line in remarks.splitlines() if "warning" in line and "suppressed" not in line]
    if found is None:
        wrong.append("the assembler did not report on it")
    elif found.spill_bytes > (FLOAT_SPILL_BYTES if ("T", "float") in kernel.defined else SPILL_BYTES):
        wrong.append(f"{found.spill_bytes} bytes of local memory")
    return wrong


def compile_and_judge(kernels: Sequence[Kernel], arch: str) -> list[str]:
    """Compile kernels, print a table of what they take, and return what is wrong with them."""
    with suppress(KernelError):  # which comes again below
        jit.compile_all(kernels, arch)
    problems = []
    print(f"\n{arch:8} {'registers':>9} {'spills':>6} {'shared':>6}  kernel")
    for kernel in kernels:
        try:
            remarks = jit.binary(kernel, arch).text
        except KernelError as error:
            problems.append(str(error))
            continue
        found = jit.report(remarks, kernel.name)
        if found is None:  # many compilations at once can garble each other's logs (NVRTC 13.0)
            text = isolate(expand(kernel.source, kernel.defined), kernel.name)
            remarks = jit.compiler().compile(text, kernel.name, arch)[1]
            found = jit.report(remarks, kernel.name)
        name = f"{jit.label(kernel.source)} {kernel}"
        if found is not None:
            figures = f"{found.registers:9} {found.spill_bytes:6} {found.shared_bytes:6}"
            print(f"{arch:8} {figures}  {name}")
        problems += [f"{arch} {name}: {problem}" for problem in complaints(kernel, remarks, found)]
    return problems


@pytest.mark.parametrize("arch", CHIPS)
def test_kernels_compile(arch: str) -> None:
    try:
        jit.compiler()
    except DeviceError as error:
        pytest.skip(str(error))
    kernels = wanted()[arch]
    assert len(kernels) > 50
    chosen = selection(kernels, list(CHIPS).index(arch), len(CHIPS))
    assert {kernel.name for kernel in chosen} == {kernel.name for kernel in kernels}
    problems = compile_and_judge(chosen, arch)
    assert not problems, "\n".join(problems)


def main(archs: Sequence[str]) -> int:
    """Compile everything for some chips; problems go to stderr."""
    problems = []
    for arch in archs or CHIPS:
        problems += compile_and_judge(wanted()[arch], arch)
    with redirect_stdout(sys.stderr):
        print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
