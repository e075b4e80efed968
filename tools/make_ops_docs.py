"""Write docs/ops.md from the packages of the operators; with `--check`, only say whether it is current."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import kuiperllm.backends
import kuiperllm.ops
from kuiperllm.core import DType
from kuiperllm.ops.cases import Case

OUTPUT = Path(__file__).resolve().parents[1] / "docs" / "ops.md"
SOURCES = "../src/kuiperllm/ops"
WEIGHTS = "float32, float16, bfloat16, quantized"
KERNELS = {"cpu": "*_kernel.py", "cuda": "*.cu"}
"""By back end, what files with kernels are named."""

HEADER = """\
# Operators

Made by `tools/make_ops_docs.py` from the packages in [`src/kuiperllm/ops`](../src/kuiperllm/ops); do not
edit. What an operator is made of, and how the kernels work, is in [architecture.md](architecture.md).

## What there is

For each device: the types that activations may have, and in brackets the number of test cases; a case counts
once for each of these types that its arguments can have. Weight formats are those of the matrices that an
operator multiplies by or looks rows up in; every format goes with every type of activations. Quantized ones
have codes of 2, 3, 4, 5, 6 or 8 bits or FP8 (e4m3), as `quant.Scheme` describes them.
"""

KERNELS_HEADER = """\
## Where the kernels are

An operator without a file of its own on a device calls kernels of other operators.
"""


def document() -> str:
    """The whole page."""
    devices, operators = _packages(kuiperllm.backends), _packages(kuiperllm.ops)
    names = [f"`{device}`" for device in devices]
    summary = _table(
        ["operator", "what it does", *names, "weights"], (_summary(op, devices) for op in operators)
    )
    kernels = _table(["operator", *names], (_kernels(op, devices) for op in operators))
    return "\n\n".join([HEADER.strip(), summary, KERNELS_HEADER.strip(), kernels]) + "\n"


def _packages(parent: ModuleType) -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(parent.__path__) if module.ispkg)


def _table(head: list[str], rows: Iterator[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _summary(op: str, devices: list[str]) -> list[str]:
    package = importlib.import_module(f"kuiperllm.ops.{op}")
    first_line = (package.__doc__ or "").strip().partition("\n")[0].replace("|", "\\|")
    weights = WEIGHTS if _takes_weights(package, op) else "-"
    link = f"[`{op}`]({SOURCES}/{op}/__init__.py)"
    return [link, first_line, *(_support(op, device, package.CASES) for device in devices), weights]


def _takes_weights(package: ModuleType, op: str) -> bool:
    parameters = inspect.signature(getattr(package, op)).parameters.values()
    return any("LinearWeight" in str(parameter.annotation) for parameter in parameters)


def _support(op: str, device: str, cases: list[Case]) -> str:
    """The types that a device's kernels take, with the number of cases in these types."""
    if not (Path(kuiperllm.ops.__path__[0]) / op / f"{device}.py").exists():
        return "-"
    module = importlib.import_module(f"kuiperllm.ops.{op}.{device}")
    taken: tuple[DType, ...] = getattr(module, "DTYPES", (DType.float32,))
    count = sum(dtype in taken for case in cases for dtype in case.dtypes)
    return f"{', '.join(map(str, taken))} ({count})"


def _kernels(op: str, devices: list[str]) -> list[str]:
    folder = Path(kuiperllm.ops.__path__[0]) / op
    found = (sorted(path.name for path in folder.glob(KERNELS[device])) for device in devices)
    links = (", ".join(f"[`{name}`]({SOURCES}/{op}/{name})" for name in names) for names in found)
    return [f"`{op}`", *(link or "-" for link in links)]


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` say whether it is current; the exit code."""
    text = document()
    if arguments == ["--check"]:
        current = OUTPUT.is_file() and OUTPUT.read_text(encoding="utf-8") == text
        print("docs/ops.md is current" if current else "docs/ops.md is stale: run tools/make_ops_docs.py")
        return 0 if current else 1
    OUTPUT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
