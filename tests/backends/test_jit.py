"""The cache of compiled kernels: what makes it build, what it survives, and where it lives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kuiperllm
from kuiperllm.backends import kernel_cache
from kuiperllm.backends.cpu import jit
from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.config import settings
from kuiperllm.core import DType, Tensor
from kuiperllm.errors import KernelError

HERE = Path(__file__).resolve().parent

# Adds 2 to five numbers and says whether Numba was needed.
SCRIPT = """
import logging, sys
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch, set_num_threads
from kuiperllm.core import DType, Tensor
set_num_threads(1)
x = Tensor.zeros((5,), DType.int64)
launch(Kernel("simd_kernels", "count_items"), x, items=5)
print(x.tolist(), "compiled" if "numba" in sys.modules else "cached")
"""


def start(cache: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "KUIPER_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path[1:]]),
    }
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def outcome(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert not errors
    return output.strip()


COMPILED, CACHED = "[2, 2, 2, 2, 2] compiled", "[2, 2, 2, 2, 2] cached"


def only_entry(cache: Path) -> Path:
    entries = list((cache / "cpu").iterdir())
    assert len(entries) == 1, entries
    return entries[0]


def test_second_process_needs_no_compiler(tmp_path: Path) -> None:
    assert outcome(start(tmp_path)) == COMPILED
    assert outcome(start(tmp_path)) == CACHED
    assert only_entry(tmp_path).name.startswith("count_items-")


@pytest.mark.parametrize("damage", ["flip", "truncate", "header-only", "empty", "extend", "other-key"])
def test_damaged_entry_is_built_again_silently(tmp_path: Path, damage: str) -> None:
    assert outcome(start(tmp_path)) == COMPILED
    entry = only_entry(tmp_path)
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
    assert outcome(start(tmp_path)) == COMPILED
    assert outcome(start(tmp_path)) == CACHED
    assert only_entry(tmp_path).read_bytes()[:10] == good[:10]


def test_processes_may_fill_an_empty_cache_at_once(tmp_path: Path) -> None:
    processes = [start(tmp_path) for _ in range(3)]
    assert {outcome(process) for process in processes} <= {COMPILED, CACHED}
    only_entry(tmp_path)
    assert outcome(start(tmp_path)) == CACHED


def test_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    lines = outcome(start(in_the_way)).splitlines()
    assert lines[0] == f"WARNING cannot keep compiled kernels in {in_the_way / 'cpu'}: Not a directory"
    assert lines[1:] == [COMPILED]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_cache_costs_a_warning(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    lines = outcome(start(tmp_path)).splitlines()
    assert lines[0].endswith(": Permission denied")
    assert lines[1:] == [COMPILED]


def test_cache_is_never_inside_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(kuiperllm.__file__).parent
    monkeypatch.delenv("KUIPER_CACHE_DIR")
    for home in (None, "/somewhere/else"):
        if home is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", home)
        settings.cache_clear()
        assert package not in jit.cache_dir().parents
    monkeypatch.undo()
    settings.cache_clear()
    assert package not in jit.cache_dir().parents
    assert not list(package.rglob("*.o"))


def run_count_items(kernel: Kernel) -> list[int]:
    x = Tensor.zeros((3,), DType.int64)
    launch(kernel, x, items=3)
    return x.tolist()


def test_template_parameters_make_different_kernels() -> None:
    assert run_count_items(Kernel("simd_kernels", "count_items")) == [2, 2, 2]
    assert run_count_items(Kernel("simd_kernels", "count_items", FACTOR=5)) == [5, 5, 5]
    assert run_count_items(Kernel("simd_kernels", "count_items")) == [2, 2, 2]


def test_callbacks_hear_of_compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUIPER_CACHE_DIR", str(tmp_path))
    settings.cache_clear()
    heard: list[str] = []
    monkeypatch.setattr(kernel_cache, "on_compile", [heard.append])
    assert run_count_items(Kernel("simd_kernels", "count_items", FACTOR=7)) == [7, 7, 7]
    assert heard == ["count_items"]
    monkeypatch.undo()
    settings.cache_clear()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wants_a_library", r"^kernel wants_a_library calls sin, which compiled kernels may not$"),
        ("lacks_a_type", r"^kernel lacks_a_type: parameter x needs a type of vectors.KINDS$"),
        ("lacks_items", r"^kernel lacks_items must end in the parameters begin, end, thread$"),
        ("adds_text", r"^kernel adds_text does not compile: "),
    ],
)
def test_refused_kernels_say_why(name: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        Kernel("simd_kernels", name).address  # noqa: B018


def test_unknown_parameter_and_module() -> None:
    with pytest.raises(KernelError, match=r"^count_items has no template parameter SIZE$"):
        Kernel("simd_kernels", "count_items", SIZE=1).address  # noqa: B018
    with pytest.raises(KernelError, match=r"^kernel module no_such_kernels is not installed$"):
        Kernel("no_such_kernels", "count_items").address  # noqa: B018
