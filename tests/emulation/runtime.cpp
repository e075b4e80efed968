// Runs CUDA kernels on a processor: blocks one after the other, the threads of a block as fibers.
//
// A fiber runs until it has to wait for others; then the next one that can go on does. A block in which nobody can
// is a deadlock and ends the launch with an error that says who waits where, as do accesses to memory that is not
// there. Everything here belongs to one launch at a time.
#include "runtime.h"
#include "stacks.h"
#include "watched.h"

#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <pthread.h>
#include <string>
#include <sys/time.h>
#include <utility>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulated {

unsigned lane;

// The dynamic shared memory between two red zones.
static struct alignas(1024) {
    char before[1024];
    char data[MAX_SHARED];
    char after[1024];
} dynamic_memory;
char (&dynamic_shared)[MAX_SHARED] = dynamic_memory.data;

namespace {

constexpr int BARRIERS = 16;

struct Copy {
    char* shared;
    const char* global;
    int size, bytes;  // of `size` bytes all but the first `bytes` become zero
};

struct Fiber {
    Stack stack;
    uint3 index;
    unsigned warp, lane;
    bool ended, waited;
    // What it waits for.
    const char* what;
    Place place;
    void* operands;
    unsigned mask;
    Complete complete;
    Fiber* next_waiting;
    // Asynchronous copies: groups in the order of their commits, the last one still open.
    std::vector<std::vector<Copy>> groups;
};

struct Warp {
    unsigned exists, ready, arrived;
};

struct Barrier {
    unsigned arrived, expected;
    Fiber* waiting;
};

struct Launch {
    void (*entry)(void**);
    void** arguments;
    const char* name;
    unsigned threads;
    uint64_t random;  // 0: the plain schedule
    bool late_copies;
    bool chained, overlap;
    unsigned dynamic_bytes;
    char* static_shared;
    size_t static_bytes;
    int max_seconds;
};

Fiber fibers[MAX_THREADS];
Warp warps[MAX_THREADS / 32];
Barrier barriers[BARRIERS];
Launch launch;
Fiber* current;
Fiber main_fiber;
unsigned ready_warps;
unsigned num_ended;
bool is_first_block, previous_ended;
Fiber* waiting_for_previous;
std::string failure;
bool failed;

void go_to(Fiber& next) {
    Fiber& from = *current;
    if (&next == &from) return;
    current = &next;
    threadIdx = next.index;
    lane = next.lane;
    switch_stacks(from.stack, next.stack);
}

unsigned random_below(unsigned n) {
    launch.random ^= launch.random << 13;
    launch.random ^= launch.random >> 7;
    launch.random ^= launch.random << 17;
    return static_cast<unsigned>((launch.random >> 32) * n >> 32);
}

unsigned random_bit(unsigned mask) {
    unsigned start = random_below(32);
    unsigned above = mask >> start << start;
    return __builtin_ctz(above ? above : mask);
}

void go_on_after_previous();

// The thread to go on with; the launching one if none can. Mostly stays in one warp for as long as it can go on.
Fiber& pick() {
    if (!ready_warps) go_on_after_previous();
    if (!ready_warps) return main_fiber;
    unsigned w = current->warp, l;
    bool stay = ready_warps >> w & 1;
    if (launch.random) {
        if (!stay || random_below(16) == 0) w = random_bit(ready_warps);
        l = random_bit(warps[w].ready);
    } else {
        if (!stay) w = __builtin_ctz(ready_warps);
        l = __builtin_ctz(warps[w].ready);
    }
    warps[w].ready &= ~(1u << l);
    if (!warps[w].ready) ready_warps &= ~(1u << w);
    return fibers[w * 32 + l];
}

void make_ready(unsigned warp, unsigned lanes) {
    warps[warp].ready |= lanes;
    if (lanes) ready_warps |= 1u << warp;
}

void fiber_main() {
    for (;;) {
        launch.entry(launch.arguments);
        if (launch.chained && !current->waited)
            fail("thread (%u, %u, %u) ended without wait_for_previous()", threadIdx.x, threadIdx.y, threadIdx.z);
        for (const auto& group : current->groups)
            if (!group.empty())
                fail("thread %u ends while a copy that it did not wait for is on its way to shared memory", current->index.x);
        current->ended = true;
        num_ended++;
        go_to(pick());
    }
}

// --- one block ---------------------------------------------------------------------------------------------

void check_early_writes() {
    if (!reveal(is_first_block) || failed) return;
    failure = "wrote to memory before wait_for_previous()";
    failed = true;
}

// No thread can do more before the kernel in front has ended: let it end.
void go_on_after_previous() {
    if (!waiting_for_previous) return;
    check_early_writes();
    if (failed) return;
    for (Fiber* fiber = waiting_for_previous; fiber; fiber = fiber->next_waiting) make_ready(fiber->warp, 1u << fiber->lane);
    waiting_for_previous = nullptr;
    previous_ended = true;
}

void start_block() {
    memset(dynamic_shared, 0xff, launch.dynamic_bytes);
    memset(launch.static_shared, 0xff, launch.static_bytes);
    memset(barriers, 0, sizeof barriers);
    num_ended = ready_warps = 0;
    waiting_for_previous = nullptr;
    previous_ended = !launch.overlap;
    if (launch.overlap) hide();
    unsigned width = blockDim.x, height = blockDim.y;
    for (unsigned i = 0; i < launch.threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.index = {i % width, i / width % height, i / (width * height)};
        fiber.ended = fiber.waited = false;
        fiber.what = nullptr;
        if (fiber.groups.size() != 1 || !fiber.groups[0].empty()) fiber.groups.assign(1, {});
    }
    for (unsigned w = 0; w * 32 < launch.threads; w++) {
        unsigned left = launch.threads - w * 32;
        warps[w].exists = left >= 32 ? ~0u : (1u << left) - 1;
        warps[w].ready = warps[w].arrived = 0;
        make_ready(w, warps[w].exists);
    }
}

// Bytes behind the dynamic shared memory in use that are watched.
size_t slack_bytes() {
    size_t left = MAX_SHARED - launch.dynamic_bytes;
    return left < 1024 ? left : 1024;
}

void describe_deadlock() {
    std::map<std::pair<std::string, int>, std::pair<unsigned, unsigned>> waiting;  // where: how many, the first
    for (unsigned i = 0; i < launch.threads; i++) {
        Fiber& fiber = fibers[i];
        if (fiber.ended) continue;
        auto& [count, first] = waiting[{std::string(fiber.what) + " at " + fiber.place.file, fiber.place.line}];
        if (count++ == 0) first = i;
    }
    std::string text = "its threads wait for each other forever: ";
    for (auto& [where, who] : waiting)
        text += std::to_string(who.first) + " in " + where.first + ":" + std::to_string(where.second) +
                " (the first is thread " + std::to_string(who.second) + "), ";
    text += std::to_string(num_ended) + " have ended";
    failure = text;
    failed = true;
}

void run_block() {
    start_block();
    current = &main_fiber;
    go_to(pick());
    check_early_writes();
    is_first_block = false;
    if (failed) return;
    if (num_ended != launch.threads) return describe_deadlock();
    if (!is_red(dynamic_memory.before, 1024)) failure = "wrote in front of its dynamic shared memory", failed = true;
    if (!is_red(dynamic_shared + launch.dynamic_bytes, slack_bytes()) || !is_red(dynamic_memory.after, 1024))
        failure = "wrote behind its dynamic shared memory", failed = true;
}

// --- signals -----------------------------------------------------------------------------------------------

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGVTALRM};
constexpr int NUM_SIGNALS = sizeof SIGNALS / sizeof *SIGNALS;
pthread_t launching_thread;
bool running;

void on_signal(int number, siginfo_t* info, void*) {
    if (!running || !pthread_equal(pthread_self(), launching_thread)) {
        if (number == SIGVTALRM) {
            if (running) pthread_kill(launching_thread, number);
            return;
        }
        signal(number, SIG_DFL);  // not ours: happens again, as if we were not here
        return;
    }
    if (current == &main_fiber) abort();
    switch (number) {
        case SIGFPE: fail("divided by zero");
        case SIGVTALRM: fail("ran for more than %d seconds", launch.max_seconds);
        case SIGILL: fail("ran into a trap");
        default: fail("accessed memory that is not there, at %p", info->si_addr);
    }
}

class Guard {
  public:
    Guard() {
        static char* stack = static_cast<char*>(malloc(64 * 1024));
        launching_thread = pthread_self();
        stack_t alternative = {};
        alternative.ss_sp = stack;
        alternative.ss_size = 64 * 1024;
        sigaltstack(&alternative, &old_stack_);
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        for (int i = 0; i < NUM_SIGNALS; i++) sigaction(SIGNALS[i], &action, &old_actions_[i]);
        itimerval limit = {{0, 0}, {launch.max_seconds, 0}};
        setitimer(ITIMER_VIRTUAL, &limit, nullptr);
        running = true;
    }
    ~Guard() {
        running = false;
        itimerval none = {};
        setitimer(ITIMER_VIRTUAL, &none, nullptr);
        for (int i = 0; i < NUM_SIGNALS; i++) sigaction(SIGNALS[i], &old_actions_[i], nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

  private:
    stack_t old_stack_;
    struct sigaction old_actions_[NUM_SIGNALS];
};

void prepare_fibers() {
    for (unsigned i = 0; i < launch.threads; i++) {
        Fiber& fiber = fibers[i];
        if (!fiber.stack.bottom) {
            reserve(fiber.stack, i);
            fiber.warp = i / 32;
            fiber.lane = i % 32;
        }
        prepare(fiber.stack, fiber_main);
    }
}

uint64_t greatest_common_divisor(uint64_t a, uint64_t b) { return b ? greatest_common_divisor(b, a % b) : a; }

void run_grid() {
    uint64_t count = uint64_t(gridDim.x) * gridDim.y * gridDim.z, start = 0, step = 1;
    if (launch.random && count > 1) {  // a random order of the blocks
        start = random_below(unsigned(count));
        step = 1 + random_below(unsigned(count - 1));
        while (greatest_common_divisor(step, count) != 1) step++;
    }
    for (uint64_t i = 0; i < count && !failed; i++) {
        uint64_t block = (start + i * step) % count;
        blockIdx = {unsigned(block % gridDim.x), unsigned(block / gridDim.x % gridDim.y), unsigned(block / gridDim.x / gridDim.y)};
        run_block();
    }
}

}  // namespace

// --- what kernels call -------------------------------------------------------------------------------------

void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    failure = text;
    failed = true;
    go_to(main_fiber);
    __builtin_unreachable();
}

void collective(unsigned mask, void* operands, Complete complete, const char* what, Place place) {
    Fiber& self = *current;
    Warp& warp = warps[self.warp];
    unsigned bit = 1u << self.lane;
    if (!(mask & bit)) fail("%s:%d: thread %u calls %s with a mask (%#x) that leaves it out", place.file, place.line, threadIdx.x, what, mask);
    mask &= warp.exists;
    self.operands = operands, self.mask = mask, self.complete = complete, self.what = what, self.place = place;
    warp.arrived |= bit;
    if ((warp.arrived & mask) != mask) return go_to(pick());
    void* all[32] = {};
    Fiber* first = &fibers[self.warp * 32];
    for (unsigned rest = mask; rest; rest &= rest - 1) {
        Fiber& other = first[__builtin_ctz(rest)];
        if (other.complete != complete || other.mask != mask)
            fail("the lanes of a warp meet in different calls: lane %u in %s at %s:%d (mask %#x), lane %u in %s at %s:%d (mask %#x)",
                 self.lane, what, place.file, place.line, mask, other.lane, other.what, other.place.file, other.place.line, other.mask);
        all[other.lane] = other.operands;
    }
    warp.arrived &= ~mask;
    complete(all, mask);
    make_ready(self.warp, mask & ~bit);
    preempt();
}

void barrier(int id, int threads, bool wait, const char* what, Place place) {
    if (id < 0 || id >= BARRIERS) fail("%s:%d: there is no barrier %d", place.file, place.line, id);
    if (threads % 32) fail("%s:%d: barrier %d is for %d threads, not a multiple of 32", place.file, place.line, id, threads);
    unsigned expected = threads ? threads : launch.threads;
    Barrier& barrier = barriers[id];
    Fiber& self = *current;
    if (barrier.arrived && barrier.expected != expected)
        fail("%s:%d: barrier %d is for %u threads here and for %u elsewhere", place.file, place.line, id, expected, barrier.expected);
    barrier.expected = expected;
    self.what = what, self.place = place;
    if (++barrier.arrived < expected) {
        if (!wait) return;
        self.next_waiting = barrier.waiting;
        barrier.waiting = &self;
        return go_to(pick());
    }
    for (Fiber* fiber = barrier.waiting; fiber; fiber = fiber->next_waiting) make_ready(fiber->warp, 1u << fiber->lane);
    barrier = {};
    if (launch.random) return preempt();
    make_ready(self.warp, 1u << self.lane);
    go_to(pick());
}

void preempt() {
    if (!launch.random) return;
    make_ready(current->warp, 1u << current->lane);
    go_to(pick());
}

bool is_shared(const void* p, size_t bytes) {
    auto inside = [=](char* start, size_t length) {
        return p >= start && static_cast<const char*>(p) + bytes <= start + length;
    };
    return inside(dynamic_shared, launch.dynamic_bytes) || inside(launch.static_shared, launch.static_bytes);
}

static void perform(const Copy& copy) {
    memcpy(copy.shared, copy.global, copy.bytes);
    memset(copy.shared + copy.bytes, 0, copy.size - copy.bytes);
}

void copy_async(void* shared, const void* global, int size, int bytes, Place place) {
    if (bytes < 0 || bytes > size) fail("%s:%d: an asynchronous copy of %d of %d bytes", place.file, place.line, bytes, size);
    if (reinterpret_cast<uintptr_t>(shared) % size || (bytes && reinterpret_cast<uintptr_t>(global) % size))
        fail("%s:%d: an asynchronous copy from %p to %p: not %d-byte aligned", place.file, place.line, global, shared, size);
    if (!is_shared(shared, size))
        fail("%s:%d: an asynchronous copy to %p, which is not shared memory of this block", place.file, place.line, shared);
    Copy copy = {static_cast<char*>(shared), static_cast<const char*>(global), size, bytes};
    if (launch.late_copies) current->groups.back().push_back(copy);
    else perform(copy);
}

void commit_copies() { current->groups.emplace_back(); }

void wait_for_copies(int groups_left) {
    auto& groups = current->groups;
    size_t done = 0;
    for (; groups.size() - done > size_t(groups_left) + 1; done++)
        for (auto& copy : groups[done]) perform(copy);
    groups.erase(groups.begin(), groups.begin() + done);
}

void wait_for_previous(Place place) {
    Fiber& self = *current;
    self.waited = true;
    if (previous_ended) return;
    self.what = "wait_for_previous", self.place = place;
    self.next_waiting = waiting_for_previous;
    waiting_for_previous = &self;
    go_to(pick());
}

}  // namespace emulated

// --- what the driver calls -----------------------------------------------------------------------------------

extern "C" {

// Run a kernel; 0, or 1 with an error in `message`.
int emulated_launch(const char* name, void (*entry)(void**), void** arguments, unsigned x, unsigned y, unsigned z,
                    unsigned threads, unsigned dynamic_bytes, char* static_shared, size_t static_bytes, int chained,
                    int overlap, uint64_t seed, int seconds, char* message, size_t message_bytes) {
    using namespace emulated;
    launch = {entry, arguments, name, threads, seed * 0x9e3779b97f4a7c15u, seed % 2 == 0, bool(chained), chained && overlap,
              dynamic_bytes, static_shared, static_bytes, seconds};
    gridDim = {x, y, z};
    blockDim = {threads, 1, 1};
    failed = false;
    fill_red(dynamic_memory.before, 1024);
    fill_red(dynamic_shared + dynamic_bytes, slack_bytes());
    fill_red(dynamic_memory.after, 1024);
    prepare_fibers();
    if (launch.overlap) remember();
    is_first_block = true;
    is_hidden = false;
    hidden_budget = HIDDEN_BYTES_PER_LAUNCH;
    {
        Guard guard;
        run_grid();
    }
    if (launch.overlap && !failed) mark_changes();
    bool in_block = failed;
    if (!failed)
        if (const char* text = damaged_block()) failure = text, failed = true;
    if (!failed) return 0;
    if (in_block)
        snprintf(message, message_bytes, "kernel %s, block (%u, %u, %u): %s", name, blockIdx.x, blockIdx.y, blockIdx.z, failure.c_str());
    else
        snprintf(message, message_bytes, "kernel %s: %s", name, failure.c_str());
    return 1;
}

// Surround [address, address + bytes) with red zones, which lie inside the memory of whoever calls. `watched`: kernels are
// given it, so what they write to it is unknown to the kernel behind.
void emulated_guard(uintptr_t address, size_t bytes, int watched) {
    static unsigned variant;
    variant = (variant + 1) % emulated::RED_VARIANTS;
    auto p = reinterpret_cast<char*>(address);
    emulated::fill_red(p - emulated::RED_BYTES, emulated::RED_BYTES, variant);
    emulated::fill_red(p + bytes, emulated::RED_BYTES, variant);
    emulated::Block& block = emulated::blocks()[address];
    block = {bytes, variant, {}, {}, {}};
    if (watched && bytes <= emulated::MAX_SHADOW) block.shadow.resize(bytes);
}

// All kernels have ended.
void emulated_drain() { emulated::drain(); }

void emulated_unguard(uintptr_t address) { emulated::blocks().erase(address); }

// --- checks that the compiler puts into kernels (-fsanitize=alignment,bounds,integer-divide-by-zero) -----------------

struct Check { const char* file; unsigned line, column; };

void __ubsan_handle_type_mismatch_v1(Check* check, void* pointer) {
    emulated::fail("%s:%u: accessed %p, which is not aligned for its type", check->file, check->line, pointer);
}
void __ubsan_handle_out_of_bounds(Check* check, uintptr_t index) {
    emulated::fail("%s:%u: index %lld is outside its array", check->file, check->line, static_cast<long long>(index));
}
void __ubsan_handle_divrem_overflow(Check* check, uintptr_t, uintptr_t) {
    emulated::fail("%s:%u: division by zero or overflow", check->file, check->line);
}
}
