"""What the tests of the documentation share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools" / "site"))


@pytest.fixture
def solution() -> Callable[[str], ModuleType]:
    """Loads a solution of the course by its name, such as "chapter1_exercise2"."""

    def load(name: str) -> ModuleType:
        path = ROOT / "docs" / "course" / "solutions" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"solution_{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load
