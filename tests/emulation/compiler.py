"""Compiles CUDA C++ for the processor with g++."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from kuiperllm.backends.cuda.driver import Compiler
from kuiperllm.errors import KernelError

HERE = Path(__file__).parent
FLAGS = [
    "-std=c++17",
    "-O1",
    "-pipe",
    "-fPIC",
    "-w",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
]
"""With -O1, tests spend the least time on compiling and running together."""
CHECKS = ["-fsanitize=alignment,bounds,integer-divide-by-zero"]
"""Calls of `__ubsan_handle_*`, which the runtime has functions of its own for."""

_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\((?P<bounds>[^()]*(?:\([^()]*\)[^()]*)*)\)\s*)?'
    r"(?P<name>\w+)\s*\("
)
_DYNAMIC_SHARED = re.compile(
    r"extern\s+__shared__\s+(?:__align__\s*\(\s*\d+\s*\)\s*)?(?P<type>[\w ]+?)\s+(?P<name>\w+)\s*\[\s*\]\s*;"
)
_LEFT_OUT = "#ifndef KUIPER_EMULATED"
_SHARED_RANGE = """
extern "C" {
extern char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));
__attribute__((visibility("default"))) void emulated_shared_range(char** range) {
    range[0] = __start_emulated_shared, range[1] = __stop_emulated_shared;
}
}"""


def gxx() -> str | None:
    """Where g++ is; None if there is none, or it does not make ELF files."""
    return shutil.which("g++") if sys.platform == "linux" else None


class EmulatedCompiler(Compiler):
    """Code is a shared library. For each kernel it has `emulated_entry_<kernel>` and a description of it."""

    def __init__(self) -> None:
        self._gxx = gxx() or "g++"
        digest = hashlib.sha256(_version_of(self._gxx).encode())
        for path in sorted([*HERE.glob("*.h"), HERE / "runtime.cpp", HERE / "compiler.py"]):
            digest.update(path.read_bytes())
        self.version = f"emulated {digest.hexdigest()[:16]}"

    def compile(self, source: str, name: str, arch: str) -> tuple[bytes, str]:
        """A shared library with every kernel of the source.

        Raises:
            KernelError: the source does not compile; the message quotes the compiler and the line.
        """
        with tempfile.TemporaryDirectory(prefix="kuiper-emulated-") as folder:
            text, built, library = (Path(folder) / f"kernel.{kind}" for kind in ("cpp", "o", "so"))
            text.write_text(_translation_unit(source, name))
            _run([self._gxx, *FLAGS, *CHECKS, f"-I{HERE}", "-c", str(text), "-o", str(built)], name)
            # Linked without the compiler, which would bring its own handlers of the checks. The library of
            # mathematics comes with the runtime.
            _run(["ld", "-shared", str(built), "-o", str(library)], name)
            return library.read_bytes(), ""


def build_runtime(folder: Path, version: str) -> Path:
    """The library that kernels run on, built if the folder does not have it."""
    library = folder / f"{version.replace(' ', '-')}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            built = Path(temporary) / "runtime.so"
            flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wl,--no-as-needed"]
            _run([gxx() or "g++", *flags, str(HERE / "runtime.cpp"), "-o", str(built), "-lm"], "runtime")
            built.replace(library)
    return library


def _translation_unit(source: str, name: str) -> str:
    kernels = list(_KERNEL.finditer(source))
    # The device's own functions come to stand where common.cuh leaves its own out; the line numbers stay.
    twins = '#include "twins.h"' if _LEFT_OUT in source else ""
    body = source
    if twins:
        body = source.replace(_LEFT_OUT, f"{twins}\n#line {_line_of(source, _LEFT_OUT)}\n{_LEFT_OUT}", 1)
    body = _DYNAMIC_SHARED.sub(
        lambda m: f"static {m['type']}* const {m['name']} = ({m['type']}*)emulated::dynamic_shared;", body
    )
    parts = ['#include "emulated.h"', "namespace {", f'#line 1 "{name}.cu"', body, "}", '#line 1 "entries"']
    for kernel in kernels:
        parts.append(_entry(kernel["name"], kernel["bounds"], chained=bool(twins)))
    parts.append(_SHARED_RANGE)
    return "\n".join(parts) + "\n"


def _line_of(source: str, what: str) -> int:
    """The line of its file that a text is on, by the `#line` directive before it."""
    before = source[: source.index(what)]
    directives = list(re.finditer(r"^#line (\d+)[^\n]*\n", before, re.MULTILINE))
    if not directives:
        return before.count("\n") + 1
    return int(directives[-1][1]) + before.count("\n", directives[-1].end())


def _entry(name: str, bounds: str | None, chained: bool) -> str:
    """Functions that call a kernel with an array of pointers to its arguments, and that describe it."""
    return f"""
extern "C" __attribute__((visibility("default"))) void emulated_entry_{name}(void** arguments) {{
    emulated::call(&{name}, arguments);
}}
extern "C" __attribute__((visibility("default"))) void emulated_describe_{name}(int* facts) {{
    const int bounds[] = {{{bounds or 1024}}};
    facts[0] = bounds[0];
    facts[1] = {int(chained)};
    emulated::list_sizes(&{name}, facts + 2);
}}"""


def _run(command: list[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if "error:" in line or "undefined reference" in line] or lines
        raise KernelError(f"{name} does not compile: " + "; ".join(errors[:5]))


@cache
def _version_of(compiler: str) -> str:
    if shutil.which(compiler) is None:
        return ""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
