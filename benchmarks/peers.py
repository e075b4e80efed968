"""Install the peers that benchmarks compare with into a scratch environment, built for this machine.

llama.cpp comes from the source package of llama-cpp-python: a prebuilt wheel would leave out the newer vector
instructions. `GGML_NATIVE` compiles for this very processor, and pip's cache is not used, because it may hold
a wheel that another processor built.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

LLAMA_CPP_PYTHON = "0.3.36"
CMAKE_ARGS = (
    "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DGGML_LLAMAFILE=ON "
    "-DGGML_CPU_REPACK=ON -DLLAVA_BUILD=OFF"
)
HERE = Path(__file__).parent


class Peers:
    """A scratch folder: a virtual environment with the peers, model files, logs, compiled helpers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.python = self.folder / "bin" / "python"
        self.logs = self.folder / "logs"
        self.models = self.folder / "models"

    def prepare(self) -> None:
        """Create the environment where it is missing or of another version. Takes minutes the first time."""
        wanted = f"llama-cpp-python=={LLAMA_CPP_PYTHON}\n{CMAKE_ARGS}\n"
        marker = self.folder / "installed.txt"
        for folder in (self.logs, self.models):
            folder.mkdir(parents=True, exist_ok=True)
        if not marker.exists() or marker.read_text() != wanted:
            log = self.logs / "install.log"
            say(f"building llama.cpp from source in {self.folder}; several minutes; progress in {log}")
            packages = [f"llama-cpp-python=={LLAMA_CPP_PYTHON}", "gguf"]
            options = ["-v", "--no-cache-dir", "--force-reinstall", "--no-binary", "llama-cpp-python"]
            with log.open("w") as output:
                run([sys.executable, "-m", "venv", self.folder], output)
                run(
                    [self.python, "-m", "pip", "install", *options, *packages],
                    output,
                    CMAKE_ARGS=CMAKE_ARGS,
                    CMAKE_BUILD_PARALLEL_LEVEL=str(os.cpu_count() or 1),
                )
            marker.write_text(wanted)
        self._compile_read_bandwidth()

    def gguf(self, config: Path, kind: str) -> Path:
        """A GGUF file of random weights in the shape of a config, written at the first call."""
        path = self.models / f"{config.stem}-{kind}.gguf"
        if not path.exists() or path.stat().st_mtime < config.stat().st_mtime:
            say(f"writing {path}")
            with (self.logs / "gguf.log").open("w") as output:
                run([self.python, HERE / "random_gguf.py", config, kind, path], output)
        return path

    @property
    def read_bandwidth_library(self) -> Path:
        """The compiled `read_bandwidth.c`."""
        return self.folder / "read_bandwidth.so"

    def _compile_read_bandwidth(self) -> None:
        source = HERE / "read_bandwidth.c"
        if self.read_bandwidth_library.exists() and (
            self.read_bandwidth_library.stat().st_mtime > source.stat().st_mtime
        ):
            return
        compiler = os.environ.get("CC", "cc")
        with (self.logs / "read_bandwidth.log").open("w") as output:
            flags = ["-O3", "-march=native", "-shared", "-fPIC"]
            run([compiler, *flags, source, "-o", self.read_bandwidth_library], output)


def run(command: Sequence[object], output: IO[str], **env: str) -> None:
    """Run a command with its output in a log; on failure, one line that names the log."""
    words = [str(word) for word in command]
    try:
        subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, check=True, env=os.environ | env)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise SystemExit(f"{' '.join(words[:4])} ... failed ({error}); see {output.name}") from None


def say(text: str) -> None:
    """Progress goes to stderr, so that stdout holds the result alone."""
    print(text, file=sys.stderr, flush=True)
