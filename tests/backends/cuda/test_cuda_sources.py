"""The text of kernels: includes, template parameters, places, signatures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kuiperllm.backends.cuda.launch import Kernel, argument_layout
from kuiperllm.backends.cuda.sources import definitions, expand, isolate, parse_signatures, signature
from kuiperllm.core import DType
from kuiperllm.errors import KernelError

TWO_KERNELS = """\
// extern "C" __global__ void commented(int a) {}
template <typename E> __device__ E twice(E x) { return x + x; }
extern "C" __global__ void __launch_bounds__(WARPS * (32 + 0))
first(const T* __restrict__ x, T *y /* out */, int n, long long stride,
      const float eps, const __grid_constant__ TensorMap map) {
    if (n) { y[0] = "}"[0]; } // }
    char brace = '}';
}
extern "C" __global__ void second() { ONLY_HERE }
__device__ int after;
"""


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        folder.joinpath(name.replace("_cu", ".cu")).write_text(text)
    return folder / "main.cu"


# --- parameters -------------------------------------------------------------------------------------------


def test_parameters_become_macros() -> None:
    given = {"WIDTH": 8, "T": DType.bfloat16, "FLAG": True, "SCALE": 0.5, "C": DType.int8, "EXTRA": "a + b"}
    assert definitions(given) == (
        ("C", "signed char"),
        ("EXTRA", "a + b"),
        ("FLAG", "1"),
        ("SCALE", "0.5f"),
        ("T", "bf16"),
        ("WIDTH", "8"),
    )


@pytest.mark.parametrize("given", [{"width": 8}, {"W": None}, {"W": "a\nb"}, {"W": [1]}])
def test_impossible_parameters(given: dict[str, object]) -> None:
    with pytest.raises(KernelError, match="template parameter"):
        definitions(given)  # type: ignore[arg-type]


def test_kernels_with_the_same_facts_are_equal() -> None:
    source = Path("a.cu")
    assert Kernel(source, "k", T=DType.float32, N=1) == Kernel(source, "k", N=1, T=DType.float32)
    assert len({Kernel(source, "k", N=1), Kernel(source, "k", N=1)}) == 1
    assert Kernel(source, "k", N=1) != Kernel(source, "k", N=2) != Kernel(source, "other", N=2)
    assert repr(Kernel(source, "k", N=1, T=DType.float16)) == "Kernel(k, N=1, T=f16)"


# --- includes ---------------------------------------------------------------------------------------------


def test_includes_are_taken_once_and_lines_stay(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        main_cu='int a;\n#include "b.cuh"\n#include "b.cuh"\nint line_4;\n',
        b_cuh='#pragma once\n#include "c.cuh"\nint b_line_3;\n',
        c_cuh="int c_line_1;\n",
    )
    text = expand(source, (("N", "3"),))
    assert text.count("c_line_1") == text.count("b_line_3") == text.count("line_4") == 1
    assert "pragma" not in text
    assert "#include" not in text
    assert text.startswith("#define N 3\n")
    for name, place in {"line_4": ("main.cu", 4), "b_line_3": ("b.cuh", 3), "c_line_1": ("c.cuh", 1)}.items():
        assert place_of(text, name) == place


def place_of(text: str, word: str) -> tuple[str, int]:
    """The file and the line that a compiler would name."""
    file, number = "", 0
    for line in text.splitlines():
        if word in line:
            return file, number
        if match := re.match(r'#line (\d+) "(.*)"', line):
            file, number = match[2], int(match[1])
        else:
            number += 1
    raise AssertionError(f"{word} is not there")


def test_vocabulary_comes_before_template_parameters(tmp_path: Path) -> None:
    source = write(
        tmp_path, main_cu='#include "own.cuh"\nT last;\n', own_cuh='#include "common.cuh"\nT own;\n'
    )
    text = expand(source, (("T", "float"),))
    assert text.index("template <typename T>") < text.index("#define T float") < text.index("T own;")
    assert place_of(text, "T own;") == ("own.cuh", 2)
    assert place_of(text, "shared_memory[]")[0] == "backends/cuda/common.cuh"


def test_includes_from_the_package(tmp_path: Path) -> None:
    source = write(tmp_path, main_cu='#include "backends/cuda/mma.cuh"\n')
    assert "backends/cuda/mma.cuh" in expand(source)


def test_missing_include_and_source(tmp_path: Path) -> None:
    source = write(tmp_path, main_cu='\n#include "nowhere.cuh"\n')
    with pytest.raises(KernelError, match=r'^main.cu:2: there is no "nowhere.cuh" beside it'):
        expand(source)
    with pytest.raises(KernelError, match=r"cannot read kernel source .*absent.cu: No such file"):
        expand(tmp_path / "absent.cu")


# --- kernels in a source ----------------------------------------------------------------------------------


def test_only_the_wanted_kernel_stays() -> None:
    text = isolate(TWO_KERNELS, "first")
    assert "ONLY_HERE" not in text
    assert "TensorMap map" in text
    assert text.splitlines()[-1] == "__device__ int after;"
    assert text.count("\n") == TWO_KERNELS.count("\n")
    text = isolate(TWO_KERNELS, "second")
    assert "TensorMap" not in text
    assert "ONLY_HERE" in text
    assert "twice" in text
    assert text.count("\n") == TWO_KERNELS.count("\n")


def test_unknown_kernel(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"no kernel 'third' in the source; there are: .*first, second"):
        isolate(TWO_KERNELS, "third")
    source = write(tmp_path, main_cu='extern "C" __global__ void k(int a) {}\n')
    assert signature(source, "k") == ("int",)
    with pytest.raises(KernelError, match=r"^main.cu: no kernel 'other'; there are: k$"):
        signature(source, "other")


def test_signatures() -> None:
    types = ("pointer", "pointer", "int", "long long", "float", "TensorMap")
    assert parse_signatures(TWO_KERNELS) == {"first": types, "second": ()}


@pytest.mark.parametrize("parameter", ["unsigned n", "double x", "T x", "long n", "bool b", "float4 v"])
def test_types_that_cannot_be_passed(parameter: str) -> None:
    with pytest.raises(KernelError, match=f"kernel k: parameter '{parameter}' has a type"):
        parse_signatures(f'extern "C" __global__ void k(int a, {parameter}) {{}}')


def test_arguments_are_aligned_as_in_c() -> None:
    layout, offsets = argument_layout(("int", "pointer", "float", "TensorMap", "int", "long long"))
    assert offsets == [0, 8, 16, 64, 192, 200]
    assert layout == "=i4xQf44x128si4xq"
    assert argument_layout(()) == ("=", [])
