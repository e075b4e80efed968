"""What the threads of a `Team` run between kernels: hand out work, wait for each other, go to sleep.

All functions share one control block of int64 slots, each group on cache lines of its own. The threads walk
the same list of launches. For each launch they claim ranges of work items, numbered by a counter, until none
are left, and go on when all items are done. Nobody waits for a thread, only for work: one that the operating
system has put aside, or that is still waking up, holds up no more than the range it claimed.
"""

from kuiperllm.backends.cpu.atomics import (
    atomic_add,
    atomic_load,
    atomic_store,
    atomic_swap,
    call_kernel,
    pause,
    yield_processor,
)
from kuiperllm.backends.cpu.simd import i64p, i64p_at, offset
from kuiperllm.backends.cpu.unroll import inline

# Slots of the control block, eight to a cache line.
SEQUENCE = 0  # grows by one for each program
CLOSED = 8  # 1 while no program may be entered
INSIDE = 16  # workers that are inside a program
PROGRAM = 24  # address of the launches, their number, address of their progress, number of workers
ASLEEP = 32  # how many workers the last `start` found asleep
STATES = 40  # per worker, a cache line each: its state, and whether its semaphore must be raised

AWAKE, SLEEPING = 0, 1

# A launch is five slots (kernel, arguments, items, grain, sharers); its progress is one line (claims, items
# done).
LAUNCH_SLOTS = 5
PROGRESS_SLOTS = 8

# A thread that waits polls, then yields the processor; a worker without work then sleeps. With these counts
# that is after about 0.1 ms and 1 ms.
POLLS = 4000
YIELDS = 1500


@inline
def claimed_range(number, items, grain, sharers):
    """First item and size of a claim, by its number.

    Claims have `grain` items. With sharers, so many threads, the first `sharers` claims are half of the work,
    the next ones half of what is left, and so forth down to claims of `grain`.
    """
    first, size = 0, items // (2 * sharers) if sharers > 0 else 0
    while size > grain:
        if number < sharers:
            return first + number * size, size
        first += sharers * size
        number -= sharers
        size //= 2
    return first + number * grain, grain


@inline
def run_launches(launches, count, progress, thread):
    for index in range(count):
        launch = offset(launches, index * LAUNCH_SLOTS)
        counters = offset(progress, index * PROGRESS_SLOTS)
        items = launch[2]
        while True:
            first, size = claimed_range(atomic_add(counters, 0, 1), items, launch[3], launch[4])
            if first >= items:
                break
            after = min(first + size, items)
            call_kernel(launch[0], launch[1], first, after, thread)
            atomic_add(counters, 1, after - first)
        polls = 0
        while atomic_load(counters, 1) < items:
            pause()
            polls += 1
            if polls > POLLS:
                yield_processor()


def start(control: i64p, launches: int, count: int, progress: int, workers: int, begin, end, thread):
    """Publish a program; `ASLEEP` then says how many workers must be woken before `finish`."""
    for index in range(count):
        counters = offset(i64p_at(progress), index * PROGRESS_SLOTS)
        counters[0] = 0
        counters[1] = 0
    control[PROGRAM] = launches
    control[PROGRAM + 1] = count
    control[PROGRAM + 2] = progress
    control[PROGRAM + 3] = workers
    atomic_store(control, CLOSED, 0)
    atomic_add(control, SEQUENCE, 1)
    asleep = 0
    for worker in range(workers):
        state = STATES + 8 * worker
        if atomic_swap(control, state, AWAKE) == SLEEPING:
            control[state + 1] = 1
            asleep += 1
    control[ASLEEP] = asleep


def finish(control: i64p, begin, end, thread):
    """Work on the published program until it is done and every worker has left it."""
    run_launches(i64p_at(control[PROGRAM]), control[PROGRAM + 1], i64p_at(control[PROGRAM + 2]), 0)
    atomic_store(control, CLOSED, 1)
    polls = 0
    while atomic_load(control, INSIDE) > 0:
        pause()
        polls += 1
        if polls > POLLS:
            yield_processor()


def work(control: i64p, worker: int, begin, end, thread):
    """A worker's life until it falls asleep."""
    state = STATES + 8 * worker
    seen = atomic_load(control, SEQUENCE) - 1  # whatever is open now is news to a worker that just woke
    polls = 0
    while True:
        sequence = atomic_load(control, SEQUENCE)
        if sequence != seen:
            seen = sequence
            atomic_add(control, INSIDE, 1)
            if atomic_load(control, CLOSED) == 0 and worker < control[PROGRAM + 3]:
                run_launches(
                    i64p_at(control[PROGRAM]), control[PROGRAM + 1], i64p_at(control[PROGRAM + 2]), worker + 1
                )
            atomic_add(control, INSIDE, -1)
            polls = 0
        elif polls < POLLS:
            polls += 1
            pause()
        elif polls < POLLS + YIELDS:
            polls += 1
            yield_processor()
        else:
            atomic_swap(control, state, SLEEPING)
            if atomic_load(control, SEQUENCE) == seen:
                break
            if atomic_swap(control, state, AWAKE) != SLEEPING:
                break  # the program's owner saw the sleeper and has raised its semaphore: take that
            polls = 0
