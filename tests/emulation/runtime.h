// What emulated kernels ask of the runtime that runs their threads as fibers (runtime.cpp).
#pragma once

using size_t = decltype(sizeof(0));

struct uint3 { unsigned x, y, z; };

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulated {

// Where in a source something is called: the default of a last parameter.
struct Place {
    const char* file;
    int line;
    static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

constexpr unsigned MAX_SHARED = 227 * 1024;
constexpr unsigned MAX_THREADS = 1024;

// The dynamic shared memory of the block that is running.
extern char (&dynamic_shared)[MAX_SHARED];

// The place of the thread that is running in its warp.
extern unsigned lane;

// Called once all lanes of `mask` have arrived, with what each of them brought (null for lanes that do not exist).
using Complete = void (*)(void** operands, unsigned mask);

// Wait for the lanes of `mask`; the last one runs `complete`, then all go on.
void collective(unsigned mask, void* operands, Complete complete, const char* what, Place place);

// Wait at barrier `id` for `threads` threads (0: all of the block); or count as one of them without waiting.
void barrier(int id, int threads, bool wait, const char* what, Place place);

// A point at which another thread may go first.
void preempt();

// Asynchronous copies of the running thread: the first `bytes` of `size` bytes, zeros behind them. They happen at the
// latest when they are waited for.
void copy_async(void* shared, const void* global, int size, int bytes, Place place);
void commit_copies();
void wait_for_copies(int groups_left);

// Wait for the end of the kernel in front.
void wait_for_previous(Place place);

// Whether the whole of [p, p + bytes) is shared memory of this block.
bool is_shared(const void* p, size_t bytes);

// End the launch with an error.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulated
