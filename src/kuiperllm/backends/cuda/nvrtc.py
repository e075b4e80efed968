"""The compiler of the CUDA back end: NVIDIA's run-time compiler (NVRTC) through `cuda.bindings`."""

from __future__ import annotations

import re
from typing import Any

from kuiperllm.backends.cuda.driver import Compiler
from kuiperllm.errors import DeviceError, KernelError

INSTALL = "pip install 'kuiperllm[cuda]'"
"""The command that brings everything that this back end needs but the driver."""

# -v: resource use. Line information lets profilers and checkers name source lines; it changes no code.
_OPTIONS = ("-std=c++17", "-lineinfo", "--ptxas-options=-v")
_DIAGNOSTIC = re.compile(
    r"^(?P<file>[^\n(]+)\((?P<line>\d+)\): (?P<fatal>catastrophic )?error:? (?P<text>[^\n]+)", re.MULTILINE
)


class NvidiaCompiler(Compiler):
    """NVRTC. Safe to use from several threads at once, which then compile at the same time.

    Raises:
        DeviceError: it is not installed.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import nvrtc

            code, major, minor = nvrtc.nvrtcVersion()
        except (ImportError, RuntimeError) as error:  # the package is missing, or the library that it wraps
            raise DeviceError(
                f"NVRTC, the compiler for GPUs, is missing ({_first_line(error)}): {INSTALL}"
            ) from None
        self._nvrtc = nvrtc
        self._check(code)
        self.version = f"{major}.{minor} {' '.join(_OPTIONS)}"
        self._name = f"NVRTC {major}.{minor}"

    def compile(self, source: str, name: str, arch: str) -> tuple[bytes, str]:
        """A cubin, and the log: resource use from the assembler, warnings.

        Raises:
            KernelError: the source does not compile, or NVRTC does not know the chip.
        """
        nvrtc = self._nvrtc
        code, program = nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], [])
        self._check(code)
        try:
            options = [f"-arch={arch}".encode(), *(option.encode() for option in _OPTIONS)]
            (outcome,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
            log = self._text(program)
            if outcome == nvrtc.nvrtcResult.NVRTC_ERROR_COMPILATION:
                raise _compile_error(log, name, arch)
            if outcome == nvrtc.nvrtcResult.NVRTC_ERROR_INVALID_OPTION:
                raise KernelError(
                    f"{self._name} cannot compile for {arch}: install another nvidia-cuda-nvrtc"
                )
            self._check(outcome)
            code, size = nvrtc.nvrtcGetCUBINSize(program)
            self._check(code)
            cubin = bytearray(size)
            self._check(*nvrtc.nvrtcGetCUBIN(program, cubin))
        finally:
            nvrtc.nvrtcDestroyProgram(program)
        return bytes(cubin), log

    def _text(self, program: Any) -> str:
        code, size = self._nvrtc.nvrtcGetProgramLogSize(program)
        self._check(code)
        log = bytearray(size)
        self._check(*self._nvrtc.nvrtcGetProgramLog(program, log))
        return log.rstrip(b"\0").decode(errors="replace").strip()

    def _check(self, code: Any) -> None:
        if int(code) != 0:
            raise KernelError(f"NVRTC failed: {code.name}")


def _compile_error(log: str, name: str, arch: str) -> KernelError:
    import logging

    logging.getLogger(__name__).debug("%s for %s:\n%s", name, arch, log)
    errors = list(_DIAGNOSTIC.finditer(log))
    if not errors:
        return KernelError(f"kernel {name} does not compile for {arch}: {' '.join(log.split())}")
    first = errors[0]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return KernelError(
        f"{first['file']}:{first['line']}: {first['text']}{more}: kernel {name} does not compile for {arch}"
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
