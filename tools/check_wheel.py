"""Check that a wheel is pure Python, complete and small: `python tools/check_wheel.py dist/NAME.whl`."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

MAX_BYTES = 6_000_000
PACKAGE = Path(__file__).resolve().parents[1] / "src" / "kuiperllm"
MUST_HAVE = ("kuiperllm/py.typed", "kuiperllm/data/demo.gguf")
SOURCES = (".py", ".cu", ".cuh", ".json", ".html", ".css", ".js", ".svg")


def problems(wheel: Path) -> list[str]:
    """What is wrong with a wheel, one line each."""
    found = []
    if not wheel.name.endswith("-py3-none-any.whl"):
        found.append(f"{wheel.name} is not a pure Python wheel (py3-none-any)")
    if (size := wheel.stat().st_size) >= MAX_BYTES:
        found.append(f"{size} bytes; at most {MAX_BYTES} are allowed")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = [path for path in PACKAGE.rglob("*") if path.suffix in SOURCES]
    sources = {f"kuiperllm/{path.relative_to(PACKAGE).as_posix()}" for path in files}
    found += [f"{name} is missing" for name in sorted({*sources, *MUST_HAVE} - names)]
    found += [
        f"{name} does not belong there" for name in sorted(names) if name.endswith((".so", ".o", ".pyc"))
    ]
    top = {name.split("/")[0] for name in names}
    found += [f"{name}/ does not belong there" for name in sorted(top) if not name.startswith("kuiperllm")]
    return found


def main(paths: list[str]) -> int:
    """Check the wheels at these paths; the exit code."""
    if len(paths) != 1:
        print(f"one wheel is wanted, not {len(paths)}")
        return 2
    wheel = Path(paths[0])
    found = problems(wheel)
    for problem in found:
        print(f"{wheel.name}: {problem}")
    if not found:
        kernels = sum(len(list(PACKAGE.rglob(pattern))) for pattern in ("*_kernel.py", "*.cu"))
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {kernels} kernel modules, demo model, py.typed")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
