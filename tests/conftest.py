"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared" / "fixtures"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real weights, tokenizers and golden vectors that may lie beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared/fixtures is not there")
    return SHARED
