"""Barriers, warp calls and the order of threads of the emulated device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kuiperllm.errors import DeviceError, KernelError

LANES = np.arange(32)
SEEDS = range(6)


def _ints(n: int) -> np.ndarray[Any, Any]:
    return np.zeros(n, np.int32)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_thread_of_every_block_runs_once(run: Any, emulator: Any, seed: int) -> None:
    emulator.seed = seed
    body = """
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    atomicAdd(&a[block * blockDim.x + threadIdx.x], 1 + block * 1000 + (int)threadIdx.x);
    """
    (found,) = run(body, 70, _ints(5 * 3 * 2 * 70), grid=(5, 3, 2))
    blocks, threads = np.divmod(np.arange(2100), 70)
    np.testing.assert_array_equal(found, 1 + blocks * 1000 + threads)


@pytest.mark.parametrize("seed", SEEDS)
def test_block_barriers_order_shared_memory(run: Any, emulator: Any, seed: int) -> None:
    emulator.seed = seed
    body = """
    __shared__ int row[256];
    for (int round = 0; round < 5; round++) {
        row[threadIdx.x] = (int)threadIdx.x * round;
        __syncthreads();
        a[threadIdx.x] += row[(threadIdx.x * 7 + 3) % 256];
        __syncthreads();
    }
    """
    (found,) = run(body, 256, _ints(256))
    np.testing.assert_array_equal(found, (np.arange(256) * 7 + 3) % 256 * 10)


@pytest.mark.parametrize(
    "missing", ["before the read", "after the read"], ids=lambda missing: missing.replace(" ", "-")
)
def test_a_missing_barrier_shows(run: Any, emulator: Any, missing: str) -> None:
    barriers = ["__syncthreads();"] * 2
    barriers[missing.startswith("after")] = ""
    body = f"""
    __shared__ int row[128];
    for (int round = 0; round < 4; round++) {{
        row[threadIdx.x] = threadIdx.x + round;
        {barriers[0]}
        a[round * 128 + threadIdx.x] = row[127 - threadIdx.x];
        {barriers[1]}
    }}
    """
    right = (127 - np.arange(128) + np.arange(4)[:, None]).ravel()
    wrong = []
    for emulator.seed in (0, 1):
        (found,) = run(body, 128, _ints(512))
        wrong.append(not np.array_equal(found, right))
    assert any(wrong)


def test_a_missing_warp_barrier_shows(run: Any, emulator: Any) -> None:
    body = """
    __shared__ int row[32];
    row[threadIdx.x] = threadIdx.x;
    a[threadIdx.x] = row[31 - threadIdx.x];
    """
    (found,) = run(body, 32, _ints(32))
    assert not np.array_equal(found, 31 - LANES)
    (found,) = run(body.replace("a[", "__syncwarp();\na["), 32, _ints(32))
    np.testing.assert_array_equal(found, 31 - LANES)


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barriers_hold_back_only_their_threads(run: Any, emulator: Any, seed: int) -> None:
    """Two consumer warps wait at barrier 1 for a producer that only arrives; a fourth warp takes no part."""
    emulator.seed = seed
    body = """
    __shared__ int value;
    int warp = threadIdx.x / 32;
    if (warp == 3) return;
    if (warp == 0) {
        value = 42;
        __syncwarp();
        emulated::barrier(1, 96, false, "arrive", emulated::Place::here());
        return;
    }
    emulated::barrier(1, 96, true, "sync", emulated::Place::here());
    a[threadIdx.x] = value;
    """
    (found,) = run(body, 128, _ints(128))
    np.testing.assert_array_equal(found, [0] * 32 + [42] * 64 + [0] * 32)


SHUFFLES = {
    "__shfl_sync(~0u, v, 5, W)": lambda w: LANES // w * w + 5 % w,
    "__shfl_sync(~0u, v, lane * 3, W)": lambda w: LANES // w * w + LANES * 3 % w,
    "__shfl_up_sync(~0u, v, 3, W)": lambda w: np.where(LANES % w < 3, LANES, LANES - 3),
    "__shfl_down_sync(~0u, v, 3, W)": lambda w: np.where(LANES % w + 3 >= w, LANES, LANES + 3),
    "__shfl_xor_sync(~0u, v, 3, W)": lambda w: np.where((LANES | (w - 1)) < (LANES ^ 3), LANES, LANES ^ 3),
}


@pytest.mark.parametrize("width", [4, 8, 32])
@pytest.mark.parametrize("expression", SHUFFLES)
def test_shuffles(run: Any, emulator: Any, expression: str, width: int) -> None:
    emulator.seed = width
    head = f"#define W {width}"
    body = f"int lane = threadIdx.x & 31; float v = 100 + (float)threadIdx.x; a[threadIdx.x] = {expression};"
    (found,) = run(body, 64, np.zeros(64, np.float32), head=head)
    source = SHUFFLES[expression](width)
    np.testing.assert_array_equal(found, np.concatenate([100 + source, 132 + source]))


def test_shuffles_of_eight_bytes_in_half_a_warp(run: Any) -> None:
    body = """
    long long v = (long long)threadIdx.x << 33;
    if (threadIdx.x < 16) a[threadIdx.x] = __shfl_xor_sync(0xffffu, v, 1);
    else a[threadIdx.x] = __shfl_sync(0xffff0000u, v, 20);
    """
    (found,) = run(body, 32, np.zeros(32, np.int64))
    np.testing.assert_array_equal(found, np.where(LANES < 16, LANES ^ 1, 20).astype(np.int64) << 33)


def test_votes_and_reductions(run: Any) -> None:
    body = """
    int lane = threadIdx.x;
    a[lane] = __ballot_sync(~0u, lane % 3 == 0);
    a[32 + lane] = __any_sync(~0u, lane == 31) * 10 + __any_sync(~0u, 0);
    a[64 + lane] = __all_sync(~0u, lane < 31) * 10 + __all_sync(~0u, 5);
    a[96 + lane] = __reduce_add_sync(~0u, lane);
    a[128 + lane] = __reduce_max_sync(~0u, -lane) - __reduce_min_sync(~0u, -lane);
    a[160 + lane] = (int)__reduce_xor_sync(~0u, (unsigned)lane * 5u);
    """
    (found,) = run(body, 32, _ints(192))
    ballot = sum(1 << lane for lane in range(0, 32, 3))
    xor = int(np.bitwise_xor.reduce(LANES * 5))
    expected = [ballot - (1 << 32 if ballot >= 1 << 31 else 0), 10, 1, 496, 31, xor]
    np.testing.assert_array_equal(found.reshape(6, 32), np.repeat(expected, 32).reshape(6, 32))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_block_sees_what_the_others_wrote(run: Any, emulator: Any, seed: int) -> None:
    emulator.seed = seed
    body = """
    __shared__ int last;
    if (threadIdx.x == 0) {
        a[blockIdx.x] = blockIdx.x + 1;
        __threadfence();
        last = atomicAdd(b, 1) == (int)gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) for (int i = 0; i < (int)gridDim.x; i++) b[1] += a[i];
    """
    _, found = run(body, 64, _ints(20), _ints(2), grid=20)
    np.testing.assert_array_equal(found, [20, 210])


@pytest.mark.parametrize("seed", [0, 1])
def test_threads_that_do_not_reach_a_barrier(run: Any, emulator: Any, seed: int) -> None:
    emulator.seed = seed
    message = (
        r"kernel probe, block \(0, 0, 0\): its threads wait for each other forever: "
        r"63 in __syncthreads at .*probe0.cu:6 \(the first is thread 1\), 1 have ended"
    )
    with pytest.raises(DeviceError, match=message):
        run("if (threadIdx.x == 0) return;\n__syncthreads();", 64, _ints(1))


def test_lanes_that_do_not_reach_a_warp_call(run: Any) -> None:
    with pytest.raises(
        DeviceError, match=r"wait for each other forever: 20 in __shfl_xor_sync at .*:6 .*12 have"
    ):
        run("if (threadIdx.x >= 20) return;\na[0] = __shfl_xor_sync(~0u, 1, 1);", 32, _ints(1))


def test_lanes_in_different_warp_calls(run: Any) -> None:
    with pytest.raises(
        DeviceError, match=r"meet in different calls: lane 31 in __shfl_.* lane 0 in __ballot_sync at"
    ):
        run("if (threadIdx.x < 9) __ballot_sync(~0u, 1); else __shfl_sync(~0u, 1, 0);", 32, _ints(1))


def test_a_mask_without_the_caller(run: Any) -> None:
    with pytest.raises(
        DeviceError, match=r"thread 1 calls __syncwarp with a mask \(0x1\) that leaves it out"
    ):
        run("__syncwarp(1);", 32, _ints(1))


def test_a_kernel_that_never_ends(run: Any, emulator: Any) -> None:
    emulator.max_seconds = 1
    with pytest.raises(DeviceError, match=r"kernel probe, block .* ran for more than 1 seconds"):
        run("while (((volatile int*)a)[0] == 0) {}", 1, _ints(1))
    (found,) = run("a[0] = 7;", 1, _ints(1))
    assert found[0] == 7


def test_launch_limits(run: Any) -> None:
    with pytest.raises(KernelError, match="1025 threads, but it is compiled for at most 1024"):
        run("", 1025, _ints(1))
    with pytest.raises(KernelError, match="233472 bytes of shared memory are more than there are"):
        run("", 32, _ints(1), shared=228 * 1024)
    with pytest.raises(KernelError, match=r"(?s)does not compile: .*probe\d.cu:5:.*'?nonsense'?"):
        run("nonsense;", 32, _ints(1))
