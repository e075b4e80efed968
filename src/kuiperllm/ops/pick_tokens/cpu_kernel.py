"""The CPU kernel of `pick_tokens`."""

from kuiperllm.backends.cpu.simd import i32p


def pick_tokens(given: i32p, source: i32p, newest: i32p, out: i32p, begin, end, thread):
    for t in range(begin, end):
        out[t] = newest[source[t]] if source[t] >= 0 else given[t]
