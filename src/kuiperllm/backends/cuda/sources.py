"""The text of kernels: includes, template parameters, signatures.

Kernel sources include nothing but headers of this package, so that a compiler needs no include path and the
text alone says what a binary was made of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from kuiperllm.core.dtype import DType
from kuiperllm.errors import KernelError

PACKAGE = Path(__file__).resolve().parents[2]
VOCABULARY = Path(__file__).resolve().parent
"""The folder of the headers that all kernels are written with. They do not see template parameters."""

Parameter = DType | int | float | bool | str

_CPP_TYPES = {
    DType.float32: "float",
    DType.float16: "f16",
    DType.bfloat16: "bf16",
    DType.int8: "signed char",
    DType.uint8: "unsigned char",
    DType.int32: "int",
    DType.int64: "long long",
}

_INCLUDE = re.compile(r'\s*#\s*include\s*"([^"]+)"')
_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ATTRIBUTE = r"(?:__\w+__\s*\((?:[^()]|\([^()]*\))*\)\s*)*"
_KERNEL = re.compile(
    rf'extern\s+"C"\s+__global__\s+{_ATTRIBUTE}void\s+{_ATTRIBUTE}(?P<name>\w+)\s*\((?P<parameters>[^()]*)\)'
)
# What brace counting has to step over, and what it counts.
_BRACE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'|[{}]', re.DOTALL)
_VALUE_TYPES = ("int", "long long", "float", "TensorMap")


# --- parameters -------------------------------------------------------------------------------------------


def definitions(parameters: Mapping[str, Parameter]) -> tuple[tuple[str, str], ...]:
    """Template parameters as C++ text, sorted by name.

    Raises:
        KernelError: a name is not upper case, or there is no C++ for a value.
    """
    for name in parameters:
        if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise KernelError(f"template parameter {name!r}: names are upper case")
    return tuple((name, _cpp(name, parameters[name])) for name in sorted(parameters))


def _cpp(name: str, value: Parameter) -> str:
    if isinstance(value, DType):
        return _CPP_TYPES[value]
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return f"{value!r}f"
    if isinstance(value, str) and "\n" not in value:
        return value
    raise KernelError(f"template parameter {name}={value!r}: use a DType, a number or one line of C++")


# --- includes ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def expand(source: Path, defined: tuple[tuple[str, str], ...] = ()) -> str:
    """One text for the compiler: vocabulary headers, template parameters as macros, everything else.

    Each file is taken once, wherever it is included again. `#line` directives keep places right; they name
    files from the package's folder on, so the text does not depend on where that lies.

    Raises:
        KernelError: a file cannot be found or read.
    """
    vocabulary: list[str] = []
    body: list[str] = []
    _add(source.resolve(), vocabulary, body, set(), is_header=False)
    macros = [f"#define {name} {value}" for name, value in defined]
    return "\n".join((*vocabulary, *macros, *body)) + "\n"


def _add(path: Path, vocabulary: list[str], body: list[str], seen: set[Path], *, is_header: bool) -> None:
    seen.add(path)
    lines = vocabulary if is_header and path.parent == VOCABULARY else body
    place = label(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise KernelError(f"cannot read kernel source {path}: {error.strerror}") from None
    own = [f'#line 1 "{place}"']
    for number, line in enumerate(text.splitlines(), 1):
        if match := _INCLUDE.match(line):
            header = _find(match[1], path, number)
            if header not in seen:
                # What is in front of an include stays in front of it.
                lines.extend(own)
                _add(header, vocabulary, body, seen, is_header=True)
                own = [f'#line {number + 1} "{place}"']
                continue
        own.append("" if match or _ONCE.match(line) else line)
    lines.extend(own)


def _find(name: str, includer: Path, number: int) -> Path:
    for folder in (includer.parent, VOCABULARY, PACKAGE):
        path = (folder / name).resolve()
        if path.is_file():
            return path
    raise KernelError(
        f'{label(includer)}:{number}: there is no "{name}" beside it, in backends/cuda or in the package'
    )


def label(path: Path) -> str:
    """How messages name a source: from the package's folder on."""
    return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name


def isolate(text: str, name: str) -> str:
    """The text without the kernels that have other names; every line stays where it is.

    A source may hold several kernels with different template parameters. Only the one that is wanted is
    compiled, which also saves the time for the others.

    Raises:
        KernelError: there is no such kernel.
    """
    pieces, end, found = [], 0, False
    for match in _KERNEL.finditer(text):
        if match["name"] == name:
            found = True
            continue
        if match.start() < end or (stop := _end_of_body(text, match.end())) is None:
            continue
        pieces.append(text[end : match.start()])
        pieces.append("\n" * text.count("\n", match.start(), stop))
        end = stop
    if not found:
        raise KernelError(f"there is no kernel {name!r} in the source; there are: {_listed(text)}")
    return "".join((*pieces, text[end:]))


def _end_of_body(text: str, start: int) -> int | None:
    depth = 0
    for token in _BRACE.finditer(text, start):
        if token[0] == "{":
            depth += 1
        elif token[0] == "}":
            depth -= 1
            if depth == 0:
                return token.end()
    return None


def _listed(text: str) -> str:
    return ", ".join(match["name"] for match in _KERNEL.finditer(text)) or "none"


# --- signatures -------------------------------------------------------------------------------------------


def parse_signatures(text: str) -> dict[str, tuple[str, ...]]:
    """The parameter types of every kernel in a source: `pointer`, `int`, `long long`, `float`, `TensorMap`.

    Raises:
        KernelError: a kernel has a parameter of another type.
    """
    return {
        match["name"]: _types(match["name"], match["parameters"])
        for match in _KERNEL.finditer(_COMMENT.sub(" ", text))
    }


@lru_cache(maxsize=256)
def signature(source: Path, name: str) -> tuple[str, ...]:
    """The parameter types of one kernel of a source file.

    Raises:
        KernelError: there is no such kernel, or a parameter has a type that kernels may not take.
    """
    text = expand(source)
    types = parse_signatures(text).get(name)
    if types is None:
        raise KernelError(f"{label(source.resolve())}: no kernel {name!r}; there are: {_listed(text)}")
    return types


def _types(kernel: str, parameters: str) -> tuple[str, ...]:
    declarations = [" ".join(declaration.split()) for declaration in parameters.split(",")]
    if declarations in ([""], ["void"]):
        return ()
    return tuple(_type(kernel, declaration) for declaration in declarations)


def _type(kernel: str, declaration: str) -> str:
    if "*" in declaration:
        return "pointer"
    words = [word for word in declaration.split() if word not in ("const", "__grid_constant__")]
    kind = " ".join(words[:-1])
    if kind not in _VALUE_TYPES:
        raise KernelError(
            f"kernel {kernel}: parameter {declaration!r} has a type that launch() cannot pass; "
            f"use a pointer, {', '.join(_VALUE_TYPES)}"
        )
    return kind
