"""The CPU kernels of `argmax`."""

from kuiperllm.backends.cpu.rowwise import first_equal, largest
from kuiperllm.backends.cpu.simd import f32p, i32p, offset


def argmax_chunks(
    x: f32p, values: f32p, places: i32p, width: int, stride: int, chunk: int, chunks: int,
    begin, end, thread,
):  # fmt: skip
    for item in range(begin, end):
        first = (item % chunks) * chunk
        part = offset(x, (item // chunks) * stride + first)
        size = min(chunk, width - first)
        best = largest(part, size)
        place = first_equal(part, size, best)
        values[item] = best
        places[item] = first + place if place >= 0 else -1


def argmax_winners(values: f32p, places: i32p, out: i32p, chunks: int, begin, end, thread):
    for row in range(begin, end):
        best = -1
        for item in range(row * chunks, (row + 1) * chunks):
            if places[item] >= 0 and (best < 0 or values[item] > values[best]):
                best = item
        out[row] = places[best] if best >= 0 else 0
