"""The cache of compiled CUDA kernels: what makes it build, what it survives, what errors say."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kuiperllm.backends import cuda, kernel_cache
from kuiperllm.backends.cuda import jit
from kuiperllm.backends.cuda.driver import Compiler, Resources
from kuiperllm.backends.cuda.jit import Kernel
from kuiperllm.config import settings
from kuiperllm.errors import DeviceError, KernelError

SOURCE = 'extern "C" __global__ void k(float* x) { x[0] = VALUE; }\nextern "C" __global__ void l() {}\n'


class CountingCompiler(Compiler):
    """Code is the source itself."""

    version = "1"

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def compile(self, source: str, name: str, arch: str) -> tuple[bytes, str]:
        self.compiled.append(name)
        if "WRONG" in source:
            raise KernelError(f"{name} does not compile")
        return f"{arch} {source}".encode(), f"about {name}"


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[CountingCompiler]:
    made = CountingCompiler()
    monkeypatch.setattr(cuda, "platform", cuda.Platform(open_compiler=lambda: made))
    monkeypatch.setenv("KUIPER_CACHE_DIR", str(tmp_path / "cache"))
    settings.cache_clear()
    jit._fresh.clear()
    yield made
    monkeypatch.undo()
    settings.cache_clear()
    jit._fresh.clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "k.cu"
    path.write_text(SOURCE)
    return path


def another_process() -> None:
    """Forget what this process remembers."""
    jit._fresh.clear()
    jit.expand.cache_clear()


def entries() -> list[Path]:
    return sorted(jit.cache_dir().iterdir())


# --- keys -------------------------------------------------------------------------------------------------


def test_compiled_once(compiler: CountingCompiler, source: Path) -> None:
    kernel = Kernel(source, "k", VALUE=1)
    first = jit.binary(kernel, "sm_80")
    assert first.text == "about k"
    assert b"#define VALUE 1" in first.code
    assert b"void l" not in first.code
    another_process()
    assert jit.binary(kernel, "sm_80") == first
    assert compiler.compiled == ["k"]
    assert [path.suffix for path in entries()] == [".cubin"]


def test_what_makes_it_compile_again(compiler: CountingCompiler, source: Path, tmp_path: Path) -> None:
    def compiles() -> bool:
        before = len(compiler.compiled)
        another_process()
        jit.binary(kernel, arch)
        return len(compiler.compiled) > before

    kernel, arch = Kernel(source, "k", VALUE=1), "sm_80"
    assert compiles()
    assert not compiles()
    kernel = Kernel(source, "k", VALUE=2)
    assert compiles()
    kernel = Kernel(source, "l", VALUE=2)
    assert compiles()
    arch = "sm_90a"
    assert compiles()
    compiler.version = "2"
    assert compiles()
    source.write_text("// changed\n" + SOURCE)
    assert compiles()
    (tmp_path / "header.cuh").write_text("int a;\n")
    source.write_text('#include "header.cuh"\n' + SOURCE)
    assert compiles()
    (tmp_path / "header.cuh").write_text("int b;\n")
    assert compiles()
    assert not compiles()


def test_moved_sources_keep_their_entries(compiler: CountingCompiler, source: Path, tmp_path: Path) -> None:
    jit.binary(Kernel(source, "k", VALUE=1), "sm_80")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "k.cu").write_text(SOURCE)
    another_process()
    jit.binary(Kernel(moved / "k.cu", "k", VALUE=1), "sm_80")
    assert compiler.compiled == ["k"]


# --- damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "truncate", "header-only", "empty", "extend", "other-key"])
def test_damaged_entry_is_built_again_silently(
    compiler: CountingCompiler, source: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    kernel = Kernel(source, "k", VALUE=1)
    right = jit.binary(kernel, "sm_80")
    [entry] = entries()
    good = entry.read_bytes()
    middle = len(good) // 2
    entry.write_bytes(
        {
            "flip": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "truncate": good[:middle],
            "header-only": good[:20],
            "empty": b"",
            "extend": good + b"\0",
            "other-key": good[:42] + bytes(32) + good[74:],
        }[damage]
    )
    another_process()
    with caplog.at_level(logging.WARNING):
        assert jit.binary(kernel, "sm_80") == right
    assert not caplog.records
    assert compiler.compiled == ["k", "k"]
    assert entry.read_bytes() == good


def test_a_folder_that_cannot_be_made(
    compiler: CountingCompiler, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    kernel = Kernel(source, "k", VALUE=1)
    assert jit.compile_all([kernel], "sm_80") == 1
    assert jit.binary(kernel, "sm_80").text == "about k"
    assert compiler.compiled == ["k"], "this process remembers what it cannot keep"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


FILL = """
import sys
from pathlib import Path
from kuiperllm.backends import cuda
from kuiperllm.backends.cuda import jit
from kuiperllm.backends.cuda.jit import Kernel
from test_cuda_jit import CountingCompiler
cuda.platform = cuda.Platform(open_compiler=CountingCompiler)
kernels = [Kernel(Path(sys.argv[1]), "k", VALUE=i, PAD="x" * 100_000) for i in range(40)]
jit.compile_all(kernels, "sm_80")
print(sum(len(jit.binary(kernel, "sm_80").code) for kernel in kernels))
"""


def test_processes_that_fill_it_at_once(compiler: CountingCompiler, source: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-W", "error", "-c", FILL, str(source)]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = {process.communicate(timeout=120) for process in processes}
    assert len(outputs) == 1, outputs
    assert outputs.pop()[1] == ""
    assert len(entries()) == 40
    assert all(path.suffix == ".cubin" for path in entries()), "no temporary file is left"


# --- many at once -----------------------------------------------------------------------------------------


def test_all_at_once(compiler: CountingCompiler, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    monkeypatch.setattr(kernel_cache, "on_compile", [heard.append])
    kernels = [Kernel(source, "k", VALUE=i) for i in range(5)]
    jit.binary(kernels[0], "sm_80")
    seen: list[tuple[int, int]] = []
    assert jit.compile_all([*kernels, kernels[1]], "sm_80", lambda *done: seen.append(done)) == 4
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert heard == ["k"] * 5
    assert jit.compile_all(kernels, "sm_80") == 0
    assert len(compiler.compiled) == 5


def test_one_that_fails(compiler: CountingCompiler, source: Path) -> None:
    kernels = [Kernel(source, "k", VALUE=i) for i in (0, "WRONG", 2)]
    with pytest.raises(KernelError, match="k does not compile"):
        jit.compile_all(kernels, "sm_80")
    assert not any(thread.name.startswith("kuiper-nvrtc") for thread in threading.enumerate())


# --- the assembler's report -------------------------------------------------------------------------------

REMARKS = """\
ptxas info    : 4 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
ptxas         .     16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes stack, 2048 bytes smem
ptxas info    : Compile time = 9.243 ms
ptxas info    : Compiling entry function 'other' for 'sm_90a'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, 380 bytes cmem[0]
"""


def test_report() -> None:
    assert jit.report(REMARKS, "k") == Resources(40, 16, 2048)
    assert jit.report(REMARKS, "other") == Resources(8, 0, 0)
    assert jit.report(REMARKS, "absent") is None


# --- NVRTC ------------------------------------------------------------------------------------------------


@pytest.fixture
def nvrtc() -> Compiler:
    if any(importlib.util.find_spec(name) is None for name in ("cuda", "cuda.bindings")):
        pytest.skip("cuda.bindings is not installed")
    from kuiperllm.backends.cuda.nvrtc import NvidiaCompiler

    try:
        return NvidiaCompiler()
    except DeviceError as error:
        pytest.skip(str(error))


def test_nvrtc_compiles(nvrtc: Compiler) -> None:
    source = (
        'extern "C" __global__ void k(float* x) { __shared__ float s[64]; s[threadIdx.x] = *x; *x = s[1]; }'
    )
    code, remarks = nvrtc.compile(source, "k", "sm_90a")
    assert code.startswith(b"\x7fELF")
    found = jit.report(remarks, "k")
    assert found is not None
    assert 4 <= found.registers <= 32
    assert (found.spill_bytes, found.shared_bytes) == (0, 256)


def test_nvrtc_errors_name_the_place(nvrtc: Compiler, tmp_path: Path) -> None:
    (tmp_path / "bad.cu").write_text(
        'extern "C" __global__ void l() { THIS IS IGNORED }\n\nextern "C" __global__ void k(float* x) {\n'
        "    x[0] = nonsense;\n    x[1] = more;\n}\n"
    )
    kernel = Kernel(tmp_path / "bad.cu", "k")
    text = jit.isolate(jit.expand(kernel.source, ()), "k")
    message = (
        r'^bad.cu:4: identifier "nonsense" is undefined \(and 1 more\): kernel k does not compile for sm_80$'
    )
    with pytest.raises(KernelError, match=message):
        nvrtc.compile(text, "k", "sm_80")


def test_nvrtc_does_not_know_every_chip(nvrtc: Compiler) -> None:
    with pytest.raises(KernelError, match=r"^NVRTC \d+\.\d+ cannot compile for sm_10: "):
        nvrtc.compile(SOURCE, "k", "sm_10")


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    from kuiperllm.backends.cuda.nvrtc import NvidiaCompiler

    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DeviceError, match=r"is missing .*: pip install 'kuiperllm\[cuda\]'$"):
        NvidiaCompiler()
