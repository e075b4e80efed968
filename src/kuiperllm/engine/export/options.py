"""What an export is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kuiperllm.checkpoint.writing.llama2c import FLOAT_VERSIONS, INT8_VERSIONS
from kuiperllm.config.engine import is_whole
from kuiperllm.core import DType
from kuiperllm.errors import UsageError
from kuiperllm.quant import Scheme, q4, q8

FORMATS = ("safetensors", "gguf", "llama2c")
DTYPES = ("auto", "float32", "float16", "bfloat16")
KEEP, NONE = "keep", "none"
_GROUP_SIZES = (32, 64, 128)
_SUFFIXES = {".gguf": "gguf", ".bin": "llama2c"}


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What an export is asked for; see `export`.

    Raises:
        UsageError: a value is unknown, or two contradict each other.
    """

    format: str
    quant: str = KEEP
    group_size: int | None = None
    zero_point: bool = False
    version: int | None = None
    dtype: str = "auto"
    search: bool = False
    calibrates: bool = False
    """Whether there is a text to calibrate with; implies `search` for what is not calibrated."""

    @classmethod
    def of(cls, out: Path, format: str | None, version: int | None, **others: object) -> ExportOptions:
        """The options, with a format that the name of the output or the version suggests if none is given."""
        _require("\0" not in str(out), f"{str(out)!r} is not the name of a file")
        if format is None:
            format = _SUFFIXES.get(out.suffix.lower(), "safetensors" if version is None else "llama2c")
        return cls(format, version=version, **others)  # type: ignore[arg-type]  # checked in __post_init__

    def __post_init__(self) -> None:
        _require(
            self.format in FORMATS, f"format {self.format!r} is unknown; choose one of {', '.join(FORMATS)}"
        )
        _require(self.dtype in DTYPES, f"dtype {self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        _require(isinstance(self.quant, str), f"quant must be a name, not {self.quant!r}")
        object.__setattr__(self, "quant", self.quant.lower())
        size = self.group_size
        _require(
            size is None or (is_whole(size) and size > 0), f"group_size must be a whole number, not {size!r}"
        )
        _require(not (self.zero_point and (self.format, self.quant) != ("safetensors", "q4")),
                 "zero points belong to quant q4 in the format safetensors")  # fmt: skip
        {"safetensors": self._check_safetensors, "gguf": self._check_gguf, "llama2c": self._check_llama2c}[
            self.format
        ]()
        _require(not (self.search and self.quant in (KEEP, NONE)),
                 f"there are no scales to search with quant {self.quant}")  # fmt: skip
        _require(not (self.calibrates and self.quant in (KEEP, NONE)),
                 f"there is nothing to calibrate with quant {self.quant}")  # fmt: skip
        _require(not (self.calibrates and self.format == "llama2c"),
                 "calibrating is possible for safetensors and gguf, not for llama2c")  # fmt: skip

    def _check_safetensors(self) -> None:
        self._refuse_version()
        known = (KEEP, NONE, "q8", "q4")
        _require(
            self.quant in known, f"quant {self.quant!r} is unknown in safetensors; choose {', '.join(known)}"
        )
        if self.group_size is not None:
            _require(self.quant in ("q8", "q4"), f"there are no groups with quant {self.quant}")
            _require(
                self.group_size in _GROUP_SIZES,
                f"group_size {self.group_size} is not possible; choose 32, 64 or 128",
            )

    def _check_gguf(self) -> None:
        from kuiperllm.checkpoint.writing.gguf_types import find_mixture

        self._refuse_version()
        if self.quant not in (KEEP, NONE):
            find_mixture(self.quant)
        sizes = (None, 32) if self.quant[:2] in ("q8", "q4") else (None,)
        _require(self.group_size in sizes,
                 "GGUF types have groups of their own; leave --group-size out")  # fmt: skip

    def _check_llama2c(self) -> None:
        versions = (*FLOAT_VERSIONS, *INT8_VERSIONS)
        _require(
            self.version in (None, *versions), f"llama2c has no version {self.version!r}; choose 0, 1, 2 or 3"
        )
        known = (KEEP, NONE, "q8")
        _require(
            self.quant in known, f"quant {self.quant!r} is unknown in llama2c; choose {', '.join(known)}"
        )
        _require(self.dtype in ("auto", "float32"), f"llama2c has no {self.dtype}; leave --dtype out")
        if self.version is not None:
            fits = {NONE: self.version in FLOAT_VERSIONS, "q8": self.version in INT8_VERSIONS, KEEP: True}
            holds = "float32" if self.version in FLOAT_VERSIONS else "int8"
            _require(fits[self.quant], f"llama2c version {self.version} is {holds}, not {self.quant}")
        if self.group_size is not None:
            _require(self.llama2c_version in INT8_VERSIONS, "float32 versions of llama2c have no groups")
        # The version alone says what matrices become.
        object.__setattr__(self, "quant", "q8" if self.llama2c_version in INT8_VERSIONS else NONE)

    def _refuse_version(self) -> None:
        _require(self.version is None, f"only the format llama2c has versions, not {self.format}")

    @property
    def llama2c_version(self) -> int:
        """The version to write: 0, what most programs read, or 2 with int8, unless it is given."""
        if self.version is not None:
            return self.version
        return 2 if self.quant == "q8" else 0

    @property
    def float_type(self) -> DType | None:
        """What floating-point matrices are stored in; None: what the source has."""
        return None if self.dtype == "auto" else DType(self.dtype)

    @property
    def scheme(self) -> Scheme | None:
        """What matrices are rounded to in safetensors, if they are."""
        if self.quant == "q8":
            return q8(self.groups)
        return q4(self.groups, symmetric=not self.zero_point) if self.quant == "q4" else None

    @property
    def groups(self) -> int:
        """Weights that share a scale where this can be chosen."""
        return self.group_size or (32 if self.quant == "q4" else 64)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)
