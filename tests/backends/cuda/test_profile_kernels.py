"""The program behind docs/profiling.md: its versions, what it reads from Nsight Compute, its tables."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from paper import paper_gpus

from kuiperllm.backends.cuda.launch import collecting
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.ops.rms_norm import rms_norm

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"

# As `ncu --csv --print-units base --metrics ...` writes it: its own lines, a row for each metric of a launch.
LOG = """\
==PROF== Connected to process 4711 (/usr/bin/python3.11)
==PROF== Profiling "rms_norm" - 0: 0%....50%....100% - 8 passes
==PROF== Profiling "gemv" - 1: 0%....50%....100% - 8 passes
==PROF== Disconnected from process 4711
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size",\
"Device","CC","Section Name","Metric Name","Metric Unit","Metric Value"
"0","4711","python3.11","127.0.0.1","rms_norm","1","13","(512, 1, 1)","(8192, 1, 1)","0","9.0",\
"Command line profiler metrics","dram__bytes_read.sum","byte","67,239,936"
"0","4711","python3.11","127.0.0.1","rms_norm","1","13","(512, 1, 1)","(8192, 1, 1)","0","9.0",\
"Command line profiler metrics","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","81.25"
"1","4711","python3.11","127.0.0.1","gemv(const int *, int)","1","13","(256, 1, 1)","(132, 1, 1)","0","9.0",\
"Command line profiler metrics","dram__bytes_read.sum","byte","n/a"
"1","4711","python3.11","127.0.0.1","gemv(const int *, int)","1","13","(256, 1, 1)","(132, 1, 1)","0","9.0",\
"Command line profiler metrics","l1tex__t_sector_hit_rate.pct","%","nan"
"""

# Knows no `launch__grid_size`, and counts the number of the launch as the time.
NCU = """\
#!{python}
import sys
from pathlib import Path

if "--version" in sys.argv[1:2]:
    print("NVIDIA (R) Nsight Compute Command Line Profiler\\nVersion 2025.3.1.0 (build 1) (public-release)")
    sys.exit()
log = Path(sys.argv[sys.argv.index("--log-file") + 1])
metrics = sys.argv[sys.argv.index("--metrics") + 1].split(",")
assert "none" == sys.argv[sys.argv.index("--clock-control") + 1]
assert sys.argv[sys.argv.index("--launches") + 1] == "3"
if "launch__grid_size" in metrics:
    log.write_text("==ERROR== Failed to find metric regex:^launch__grid_size(\\\\.|$)\\n")
    sys.exit(1)
lines = ['"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
for index, kernel in enumerate({kernels!r}):
    lines += [f'"{{index}}","{{kernel}}","{{name}}","","{{index}}"' for name in metrics]
log.write_text("\\n".join(lines))
"""


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def ncu(benchmarks: None) -> ModuleType:
    return importlib.import_module("ncu")


@pytest.fixture
def program(benchmarks: None) -> ModuleType:
    return importlib.import_module("profile_kernels")


@pytest.fixture
def versions(benchmarks: None) -> ModuleType:
    return importlib.import_module("profile_versions")


@pytest.fixture
def h200() -> Iterator[Device]:
    with paper_gpus() as devices:
        yield devices["sm_90a"]


# --- reading ncu ------------------------------------------------------------------------------------------


def test_log_of_ncu_is_read(ncu: ModuleType) -> None:
    first, second = ncu.parse(LOG)
    assert first == ncu.Launch(
        "rms_norm",
        {"dram__bytes_read.sum": 67239936, "dram__throughput.avg.pct_of_peak_sustained_elapsed": 81.25},
    )
    assert second == ncu.Launch("gemv", {"dram__bytes_read.sum": None, "l1tex__t_sector_hit_rate.pct": None})


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "administrators"),
        ("==PROF== Connected\n==ERROR== The application returned an error code (1).", "error code"),
        ("==WARNING== No kernels were profiled.", "No kernels"),
        ("", "nothing"),
    ],
)
def test_log_without_a_table_has_a_reason(ncu: ModuleType, log: str, reason: str) -> None:
    with pytest.raises(ncu.ProfilerError, match=reason) as caught:
        ncu.parse(log)
    assert "\n" not in str(caught.value)


def test_missing_ncu_is_one_line(
    program: ModuleType, ncu: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(ncu, "_FOLDERS", ("/nowhere/*",))
    with pytest.raises(SystemExit, match=r"^ncu is not on PATH nor in /nowhere/\*: install .*$"):
        program.main(["--ncu"])


def test_newest_ncu_is_found(ncu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for version in ("2024.3.2", "2025.10.0", "2025.9.1"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "ncu").touch(mode=0o755)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(ncu, "_FOLDERS", (f"{tmp_path}/*",))
    assert ncu.find() == str(tmp_path / "2025.10.0" / "ncu")


# --- the versions -----------------------------------------------------------------------------------------


def test_versions_launch_what_they_say(versions: ModuleType, h200: Device) -> None:
    bench = versions.Bench.__new__(versions.Bench)
    bench.device, bench.bandwidth, bench.uncached_bytes = h200, 4e12, 1 << 16
    bench.filled = lambda shape, dtype: Tensor.empty(shape, dtype, h200)
    setting = versions.Setting(bench, versions.Sizes())
    named = {version.name: version for version in versions.VERSIONS}
    assert len(named) == len(versions.VERSIONS)
    launched = {}
    for name, version in named.items():
        with collecting(h200):
            work = version.build(setting)
        with collecting(h200) as kernels:
            work.call(0)
        assert tuple(kernel.name for kernel in kernels) == work.kernels, name
        launched[name] = list(kernels)
        assert (version.against is None) == (version.predicted is None)
        if version.against is not None:
            assert f"{version.example}/{version.against}" in named
            same = launched[name] == launched[f"{version.example}/{version.against}"]
            assert same == (version.label in ("serial", "shared")), name
    product = setting.products["qkv"]
    alone, shared = (versions.ring(None, product, setting, alone=alone) for alone in (True, False))
    assert shared.shared < h200.backend.driver.chip.shared_bytes_per_multiprocessor // 2 < alone.shared + 1025


@pytest.mark.parametrize(("rows", "width", "warps"), [(8192, 4096, 4), (1, 2048, 8)])
def test_norms_are_those_of_the_operator(
    versions: ModuleType, h200: Device, rows: int, width: int, warps: int
) -> None:
    with collecting(h200) as kernels:
        x = Tensor.empty((rows, width), DType.bfloat16, h200)
        rms_norm(x, Tensor.empty((width,), DType.float32, h200), 1e-5)
    assert list(kernels) == [versions.norm_kernel(width, 8, warps)]


# --- the whole program, on an emulated GPU ----------------------------------------------------------------


def test_list_needs_no_gpu(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    program.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [version.name for version in program.VERSIONS]


def test_unknown_version_is_one_line(program: ModuleType) -> None:
    with pytest.raises(SystemExit, match="there is no version nothing; --list shows all"):
        program.main(["--version", "nothing"])


def test_launches_only(
    program: ModuleType, emulated_cuda: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    program.main(["--tiny", "--launches", "2", "--version", "norm-decode/planned", "gemv-qkv/serial"])
    assert not capsys.readouterr().out


def test_times_and_counters(
    program: ModuleType, emulated_cuda: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["norm-prefill/add-apart", "norm-prefill/add-fused", "gemv-qkv/plain"]
    kernels = ["add", "rms_norm"] * 3 + ["add_rms_norm"] * 3 + ["rms_norm", "gemv_any"] * 3
    document = run_with(program, names, kernels, tmp_path, monkeypatch)
    assert document["ncu"] == "2025.3.1.0"
    results = document["results"]
    assert [result["name"] for result in results] == names
    assert all(result["us"] > 0 and result["bytes"] > 0 for result in results)
    counted = [kernel for result in results for kernel in result["kernels"]]
    assert [kernel["name"] for kernel in counted] == [
        "add",
        "rms_norm",
        "add_rms_norm",
        "rms_norm",
        "gemv_any",
    ]
    medians = [kernel["counters"]["gpu__time_duration.sum"] for kernel in counted]
    assert medians == [2, 3, 7, 11, 12]
    assert all(kernel["counters"]["launch__grid_size"] is None for kernel in counted)


def test_times_are_kept_if_counting_fails(
    program: ModuleType, emulated_cuda: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=r"times only: ncu counted 2 launches where 3 .* expected"):
        run_with(program, ["norm-decode/planned"], ["rms_norm"] * 2, tmp_path, monkeypatch)
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert result["us"] > 0
    assert result["kernels"] == [{"name": "rms_norm", "counters": {}}]


def run_with(
    program: ModuleType, names: list[str], kernels: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Of these versions with an ncu that pretends to have counted these kernels."""
    script = folder / "ncu"
    script.write_text(NCU.format(python=sys.executable, kernels=kernels))
    script.chmod(0o755)
    monkeypatch.setattr(program.ncu, "find", lambda: str(script))
    output = folder / "results.json"
    program.main(["--tiny", "--ncu", "--json", str(output), "--version", *names])
    return json.loads(output.read_text())
