"""What `import kuiperllm` offers, and what it costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib.metadata import version

import pytest

import kuiperllm
from kuiperllm import errors


def test_all_is_sorted_and_complete() -> None:
    assert kuiperllm.__all__ == sorted(kuiperllm.__all__, key=_isort_key)
    assert len(set(kuiperllm.__all__)) == len(kuiperllm.__all__)
    exceptions = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert exceptions <= set(kuiperllm.__all__)
    expected = {
        "LLM",
        "SamplingParams",
        "EngineConfig",
        "ModelConfig",
        "Completion",
        "Chunk",
        "Device",
        "Tensor",
        "Perplexity",
        "Comparison",
        "compare",
        "AsyncLLM",
        "Delta",
        "Deltas",
        "EngineStats",
        "Guide",
        "ExportReport",
        "export",
    }
    assert expected | {"DType", "TokenLogprobs", "__version__"} == set(kuiperllm.__all__) - exceptions


def _isort_key(name: str) -> tuple[int, str]:
    """The order of ruff's RUF022: constants, classes, the rest."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("name", kuiperllm.__all__)
def test_every_name_is_there_and_is_what_it_says(name: str) -> None:
    value = getattr(kuiperllm, name)
    if name == "__version__":
        assert value == version("kuiperllm")
    else:
        assert value.__name__ == name
    assert name in dir(kuiperllm)


def test_names_that_do_not_exist_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        kuiperllm.no_such_name  # noqa: B018


def test_import_loads_nothing_else() -> None:
    before = _output("import sys, typing, __future__; print(*sys.modules)")
    after = _output("import sys, kuiperllm; print(*sys.modules)")
    assert set(after.split()) - set(before.split()) == {"kuiperllm"}


def test_import_is_quick() -> None:
    program = "import time; t = time.process_time(); import kuiperllm; print(time.process_time() - t)"
    assert min(float(_output(program)) for _ in range(3)) < 0.020


def _output(program: str) -> str:
    """What a Python program prints."""
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
