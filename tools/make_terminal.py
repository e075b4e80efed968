"""Record a session in a terminal as docs/figures/terminal.svg: real commands, on the demo model.

python tools/make_terminal.py
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "docs" / "figures" / "terminal.svg"
COLUMNS = 92

SESSION = (
    'kuiper generate "ROMEO:" --temperature 0 --max-tokens 24',
    "kuiper info -m demo.gguf | head -7",
    "kuiper export -m demo.gguf --quant q4 --search demo-q4 | tail -5",
    'kuiper generate -m demo-q4 "JULIET:" --seed 5 --max-tokens 40',
)


def record() -> str:
    """The session as a drawing."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "src" / "kuiperllm" / "data" / "demo.gguf", folder)
        for command in SESSION:
            output = _run(command, folder)
            console.print(Text("$ ", "bold green") + Text(command, "bold"))
            console.print(Text(output.strip("\n")), end="\n\n")
    drawing = console.export_svg(title="KuiperLLM", theme=DIMMED_MONOKAI, unique_id="terminal")
    return _without_fonts(drawing)


def _run(command: str, folder: str) -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": path, "COLUMNS": str(COLUMNS), "NO_COLOR": "1"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def _without_fonts(drawing: str) -> str:
    """Nothing that would be fetched: the reader's own monospaced font will do."""
    drawing = re.sub(r"@font-face \{.*?\}|<!--.*?-->", "", drawing, flags=re.DOTALL)
    drawing = drawing.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")
    return "\n".join(line.rstrip() for line in drawing.splitlines() if line.strip()) + "\n"


if __name__ == "__main__":
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(record(), encoding="utf-8")
