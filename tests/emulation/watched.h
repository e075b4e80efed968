// Memory that kernels work on: red zones around it, and what the kernels in front may still be writing.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

namespace emulated {

constexpr size_t RED_BYTES = 512;
// What red zones are filled with: no number in float32, float16 and bfloat16, and none that arithmetic on it leaves
// as it is. A few variants, so that copies from one red zone to another are noticed.
constexpr uint16_t RED = 0x7fa0;
constexpr unsigned RED_VARIANTS = 31;

inline const char* red(unsigned variant) {
    static uint16_t patterns[RED_VARIANTS][512];
    uint16_t* pattern = patterns[variant];
    if (!pattern[0])
        for (int i = 0; i < 512; i++) pattern[i] = RED + 1 + variant;
    return reinterpret_cast<char*>(pattern);
}

inline void fill_red(char* p, size_t bytes, unsigned variant = 0) { memcpy(p, red(variant), bytes); }
inline bool is_red(const char* p, size_t bytes, unsigned variant = 0) { return memcmp(p, red(variant), bytes) == 0; }

struct Range {
    size_t start, bytes;
};

// A piece of memory with RED_BYTES on either side.
struct Block {
    size_t bytes;
    unsigned variant;
    // What it held after the last kernel, and which of that was written by kernels that may still run when the next one
    // starts; only of blocks that kernels are given.
    std::vector<char> shadow;
    std::vector<bool> dirty_words;
    std::vector<Range> dirty;
};

inline std::map<uintptr_t, Block>& blocks() {
    static std::map<uintptr_t, Block> all;
    return all;
}

inline const char* damaged_block() {
    static char text[160];
    for (auto& [address, block] : blocks()) {
        auto p = reinterpret_cast<char*>(address);
        unsigned variant = block.variant;
        bool before = is_red(p - RED_BYTES, RED_BYTES, variant), after = is_red(p + block.bytes, RED_BYTES, variant);
        if (before && after) continue;
        snprintf(text, sizeof text, "wrote outside its memory: just %s a piece of %zu bytes at %p",
                 before ? "behind" : "in front of", block.bytes, static_cast<void*>(p));
        if (!before) fill_red(p - RED_BYTES, RED_BYTES, variant);
        if (!after) fill_red(p + block.bytes, RED_BYTES, variant);
        return text;
    }
    return nullptr;
}

// --- dependent launch ------------------------------------------------------------------------------------------------
//
// Before it waits for the kernel in front, a kernel may run while that one, and the ones before it, still do: what
// they write is unknown. So until every thread of a block that can has reached wait_for_previous(), the bytes that
// those kernels wrote are taken away (0xff), and nothing may be written.

constexpr size_t MAX_SHADOW = 64 << 20;
constexpr size_t WORD = 4;
constexpr size_t HIDDEN_BYTES_PER_LAUNCH = 64 << 20;

inline std::vector<char> hidden;
inline size_t hidden_budget;
inline bool is_hidden;

template <typename Action> void for_each_dirty(Action action) {
    for (auto& [address, block] : blocks())
        for (auto& range : block.dirty) action(reinterpret_cast<char*>(address) + range.start, range.bytes);
}

// Before a block, while it need not have waited.
inline void hide() {
    size_t bytes = 0;
    for_each_dirty([&](char*, size_t n) { bytes += n; });
    is_hidden = bytes <= hidden_budget;
    if (!is_hidden) return;
    hidden_budget -= bytes;
    hidden.resize(bytes);
    char* saved = hidden.data();
    for_each_dirty([&](char* p, size_t n) {
        memcpy(saved, p, n);
        memset(p, 0xff, n);
        saved += n;
    });
}

// Give the bytes back. With `check`, which asks for memory to be as it was before the kernel: whether any was written.
inline bool reveal(bool check) {
    if (!is_hidden) return false;
    is_hidden = false;
    bool written = false;
    const char* saved = hidden.data();
    for_each_dirty([&](char* p, size_t n) {
        for (size_t i = 0; check && i < n; i++) written |= p[i] != char(0xff);
        memcpy(p, saved, n);
        saved += n;
    });
    if (!check) return false;
    for (auto& [address, block] : blocks())
        if (!block.shadow.empty()) written |= memcmp(reinterpret_cast<char*>(address), block.shadow.data(), block.bytes) != 0;
    return written;
}

// Before a kernel: what memory holds.
inline void remember() {
    for (auto& [address, block] : blocks())
        if (!block.shadow.empty()) memcpy(block.shadow.data(), reinterpret_cast<char*>(address), block.bytes);
}

// After a kernel: what it changed is unknown to the next one, unless all kernels end before that starts (`drain`).
inline void mark_changes() {
    for (auto& [address, block] : blocks()) {
        auto p = reinterpret_cast<char*>(address);
        if (block.shadow.empty() || memcmp(p, block.shadow.data(), block.bytes) == 0) continue;
        size_t words = (block.bytes + WORD - 1) / WORD;
        block.dirty_words.resize(words);
        for (size_t i = 0; i < block.bytes; i++)
            if (p[i] != block.shadow[i]) block.dirty_words[i / WORD] = true;
        block.dirty.clear();
        for (size_t word = 0; word < words; word++) {
            if (!block.dirty_words[word]) continue;
            size_t start = word * WORD;
            while (word < words && block.dirty_words[word]) word++;
            size_t end = word * WORD < block.bytes ? word * WORD : block.bytes;
            block.dirty.push_back({start, end - start});
        }
    }
}

inline void drain() {
    for (auto& [address, block] : blocks()) block.dirty.clear(), block.dirty_words.clear();
}

}  // namespace emulated
