"""What tools/sanitize.py reads in the logs of compute-sanitizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PATH = Path(__file__).parents[1] / "tools" / "sanitize.py"
_LOG = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at gemv_codes+0x1230 in gemv_codes.cu:120
=========     and Read access at gemv_codes+0x15a0 in gemv_codes.cu:214 [64 hazards]
=========
========= Error: Race reported between Write access at gemv_codes+0x1270 in gemv_codes.cu:120
=========     and Read access at gemv_codes+0x15a0 in gemv_codes.cu:214 [64 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""


def test_places_of_findings() -> None:
    spec = importlib.util.spec_from_file_location("sanitize", _PATH)
    assert spec is not None
    assert spec.loader is not None
    sanitize = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sanitize)
    assert sanitize.places(_LOG) == {
        "Error: Race reported between Write access at gemv_codes in gemv_codes.cu:120": 2,
        "and Read access at gemv_codes in gemv_codes.cu:214 [64 hazards]": 2,
    }
