// What becomes of one sequence of a batch between two decode steps.
#pragma once
#include "common.cuh"

// The operands of `advance_step`, in the order in which launchers give them.
struct BatchState {
    int *input_ids, *positions, *seq_lens;
    long long* slot_mapping;
    const int* block_table;
    int *history, *step;
    int width;
    long long table_stride;
    int block_size, rows;
    long long history_stride;

    // What does not depend on the token.
    struct Next {
        int position, length, now;
        long long slot;
        bool is_padding;  // with a slot below -1: it stays as it is
    };
    DEVICE Next next(int sequence) const { return next(sequence, *step); }
    // `now` is the step that ends, the same for all sequences.
    DEVICE Next next(int sequence, int now) const {
        int place = positions[sequence] + 1, block = place / block_size;
        long long slot = -1;
        if (block < width)
            slot = (long long)block_table[sequence * table_stride + block] * block_size + place % block_size;
        return {place, seq_lens[sequence] + 1, now, slot, slot_mapping[sequence] < -1};
    }
    DEVICE void advance(int sequence, int token, const Next& next) const {
        if (next.is_padding) return;
        input_ids[sequence] = token;
        positions[sequence] = next.position;
        seq_lens[sequence] = next.length;
        slot_mapping[sequence] = next.slot;
        history[next.now % rows * history_stride + sequence] = token;
    }
    // Once, when nobody needs the old one any more.
    DEVICE void count_step(int now) const { *step = (now + 1u) & 0x7fffffff; }
};
