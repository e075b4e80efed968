// Stacks of their own for the threads of a kernel, and switching between them.
#pragma once
#include <cstddef>
#if defined(__x86_64__) && !defined(EMULATED_UCONTEXT)
#define EMULATED_ASSEMBLY
#else
#include <ucontext.h>
#endif
#include <cstdlib>
#include <sys/mman.h>

namespace emulated {

#ifdef EMULATED_ASSEMBLY
struct Stack {
    void* pointer;
    char *bottom, *top;
};

extern "C" void emulated_switch(void** save, void* load);
asm(R"(
.text
.globl emulated_switch
.hidden emulated_switch
.type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulated_switch, .-emulated_switch
)");

inline void switch_stacks(Stack& from, Stack& to) { emulated_switch(&from.pointer, to.pointer); }

// Let `start` run, from its beginning, when the stack is switched to. It never returns.
inline void prepare(Stack& stack, void (*start)()) {
    auto top = reinterpret_cast<void**>(stack.top);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(start);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    stack.pointer = top;
}
#else
struct Stack {
    ucontext_t context;
    char *bottom, *top;
};

inline void switch_stacks(Stack& from, Stack& to) { swapcontext(&from.context, &to.context); }

inline void prepare(Stack& stack, void (*start)()) {
    getcontext(&stack.context);
    stack.context.uc_stack.ss_sp = stack.bottom;
    stack.context.uc_stack.ss_size = stack.top - stack.bottom;
    stack.context.uc_link = nullptr;
    makecontext(&stack.context, start, 0);
}
#endif

// Reserve the memory of stack `number`; below it lies a page that cannot be touched.
inline void reserve(Stack& stack, unsigned number) {
    constexpr size_t BYTES = 128 * 1024, PAGE = 4096;
    void* memory = mmap(nullptr, BYTES + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) abort();
    mprotect(memory, PAGE, PROT_NONE);
    stack.bottom = static_cast<char*>(memory) + PAGE;
    stack.top = stack.bottom + BYTES - number % 13 * 320;  // so that stacks use different lines of the processor's cache
}

}  // namespace emulated
