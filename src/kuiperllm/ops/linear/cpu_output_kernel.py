"""How CPU kernels of the linear operator begin and end with 16 outputs."""

from kuiperllm.backends.cpu.simd import add, load, load_first, store, store_first, zeros
from kuiperllm.backends.cpu.unroll import inline


@inline
def start_value(bias, y, column, n, has_bias, accumulate):
    """What the sums of 16 outputs begin with."""
    value = load(bias, column) if has_bias else zeros()
    if accumulate:
        value = add(value, load_first(y, column, n - column))
    return value


@inline
def write(y, column, n, value):
    """Store 16 outputs, fewer at the end of a row."""
    if column + 16 <= n:
        store(y, column, value)
    else:
        store_first(y, column, value, n - column)
