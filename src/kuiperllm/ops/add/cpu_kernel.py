"""The CPU kernel of `add`."""

from kuiperllm.backends.cpu.simd import add, f32p, load, offset, store


def add_rows(
    x: f32p, y: f32p, out: f32p, width: int, x_stride: int, y_stride: int, out_stride: int, begin, end, thread
):
    whole = width & -16
    for row in range(begin, end):
        xr, yr, to = offset(x, row * x_stride), offset(y, row * y_stride), offset(out, row * out_stride)
        for i in range(0, whole, 16):
            store(to, i, add(load(xr, i), load(yr, i)))
        for i in range(whole, width):
            to[i] = xr[i] + yr[i]
