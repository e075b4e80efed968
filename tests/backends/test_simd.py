"""The vector vocabulary at the best level of this host; `ops/test_levels.py` checks the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import simd_checks


@pytest.mark.parametrize("check", simd_checks.CHECKS, ids=lambda check: check.__name__)
def test_agrees_with_numpy(check: Callable[[], None]) -> None:
    check()
