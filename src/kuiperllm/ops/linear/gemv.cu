// Matrix times vector: out = x W^T for one row of x, or a few, at the speed at which W can be read.
//
// One block runs on each multiprocessor and computes consecutive outputs. Each of its warps fetches rows of W (or chunks
// of rows), two at a time, through a ring of its own in shared memory, by asynchronous copies of which every lane reads
// back just what it copied: there is nothing to synchronize. The ring takes more than half of a multiprocessor's
// memory, so that no two blocks of one launch share one; it fills before the kernel in front of this one has ended,
// since W does not depend on it.
//
// The kernel behind this one may start when each warp has multiplied `launch_after` pairs of rows: at once, unless that is a
// small one that fits beside this one and would ask for memory too early.
//
// Parameters beside those of gemv.cuh: ROWS of x; W, the type of the matrix; STAGES of the ring; MIN_BLOCKS that must fit a
// multiprocessor's registers.
#include "gemv.cuh"

using Weight = W;
constexpr int W_VECTOR = VECTOR<Weight>, W_VECTORS = K / W_VECTOR;
constexpr int CHUNK = (W_VECTORS + CHUNKS - 1) / CHUNKS;  // vectors of a row that a warp multiplies
constexpr int STEPS = (CHUNK + 31) / 32;                  // of which a lane
constexpr long long ROW_BYTES = W_VECTORS * VECTOR_BYTES;
constexpr int SLOT_BYTES = CHUNK * VECTOR_BYTES, STAGE_BYTES = 2 * SLOT_BYTES;
constexpr bool X_IN_REGISTERS = ROWS == 1;
constexpr bool X_STAGED = !(X_IN_REGISTERS && PROLOGUE == PLAIN);  // x passes through shared memory, as floats
constexpr int SUMS = ROWS == 1 ? 2 : ROWS == 2 ? 4 : ROWS <= 4 ? 8 : 16;

// What a lane multiplies: vectors 32 apart of its warp's chunk of each row.
struct Lane {
    int lane, chunk;

    // Whether there is a vector number `step`. It is for most, which the compiler knows.
    DEVICE bool has(int step) const {
        int vector = step * 32 + lane;
        return ((step + 1) * 32 <= CHUNK || vector < CHUNK) && (W_VECTORS % CHUNKS == 0 || chunk * CHUNK + vector < W_VECTORS);
    }
    DEVICE int vector(int step) const { return chunk * CHUNK + step * 32 + lane; }
};

// Two rows of the matrix at a time, from memory to a slot of the ring.
struct Fetcher {
    Lane mine;
    const char* values;       // of the next row, where this lane begins
    long long next, second;   // bytes from there to the row after the next two, and to the second of these
    int pairs, rows;          // left to be fetched

    DEVICE void fetch(char* slot) {
        if (pairs > 0) {
            copy_row(slot, values);
            if (GATED || rows > 1) copy_row(slot + SLOT_BYTES, values + second);
            values += next, rows -= 2, pairs--;
        }
        commit_copies();
    }

    DEVICE void copy_row(char* slot, const char* from) {
#pragma unroll
        for (int step = 0; step < STEPS; step++)
            if (mine.has(step)) copy_async(slot + mine.lane * VECTOR_BYTES + step * 512, from + step * 512);
    }
};

// Where 4 neighbours of a row of x lie in shared memory, as float4: what lanes need at once (the first 4 elements of their
// vectors, the second, ...) are neighbours.
DEVICE int place_of_x(int vector, int part) { return part * W_VECTORS + vector; }

// x, as a lane needs it: in its registers if there is one row, else in shared memory.
struct Operand {
    float own[X_IN_REGISTERS ? STEPS * W_VECTOR : 1];
    const float* rows;

    DEVICE void get(Lane mine, int row, int step, float (&x)[W_VECTOR]) const {
        const float4* from = (const float4*)(rows + row * K);
        const int vector = mine.has(step) ? mine.vector(step) : 0;
#pragma unroll
        for (int e = 0; e < W_VECTOR; e++) {
            if (X_IN_REGISTERS) {
                x[e] = own[step * W_VECTOR + e];
            } else if (e % 4 == 0) {
                float4 four = from[place_of_x(vector, e / 4)];
                x[e] = four.x, x[e + 1] = four.y, x[e + 2] = four.z, x[e + 3] = four.w;
            }
        }
    }

    DEVICE void keep_row(Lane mine) {
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            const float4* from = (const float4*)rows;
#pragma unroll
            for (int e = 0; e < W_VECTOR; e += 4) {
                float4 four = mine.has(step) ? from[place_of_x(mine.vector(step), e / 4)] : make_float4(0.f, 0.f, 0.f, 0.f);
                own[step * W_VECTOR + e] = four.x, own[step * W_VECTOR + e + 1] = four.y;
                own[step * W_VECTOR + e + 2] = four.z, own[step * W_VECTOR + e + 3] = four.w;
            }
        }
    }

    DEVICE void load_row(const T* x, Lane mine) {
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int e = 0; e < W_VECTOR; e += VECTOR<T>) {
                float value[VECTOR<T>];
                unpack(mine.has(step) ? load_fresh(x + mine.vector(step) * W_VECTOR + e) : make_uint4(0, 0, 0, 0), value, T());
#pragma unroll
                for (int i = 0; i < VECTOR<T>; i++) own[step * W_VECTOR + e + i] = value[i];
            }
    }
};

// COUNT rows of the matrix (one or two) times the rows of x, for the vectors of one lane.
template <int COUNT> DEVICE void multiply(const char* slot, Lane mine, const Operand& x, float (&sum)[SUMS]) {
    constexpr int CHAINS = ROWS == 1 ? 4 : 1;  // sums that do not wait for each other
    float part[COUNT][ROWS][CHAINS];
#pragma unroll
    for (int i = 0; i < COUNT * ROWS * CHAINS; i++) part[i / (ROWS * CHAINS)][i / CHAINS % ROWS][i % CHAINS] = 0.f;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        float w[COUNT][W_VECTOR];
#pragma unroll
        for (int half = 0; half < COUNT; half++) {
            uint4 v = make_uint4(0, 0, 0, 0);
            if (mine.has(step)) v = *(const uint4*)(slot + half * SLOT_BYTES + mine.lane * VECTOR_BYTES + step * 512);
            unpack(v, w[half], Weight());
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float xs[W_VECTOR];
            x.get(mine, r, step, xs);
#pragma unroll
            for (int half = 0; half < COUNT; half++)
#pragma unroll
                for (int e = 0; e < W_VECTOR; e++) part[half][r][e % CHAINS] += w[half][e] * xs[e];
        }
    }
#pragma unroll
    for (int half = 0; half < COUNT; half++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float total = part[half][r][0];
            if (CHAINS == 4) total = (total + part[half][r][1]) + (part[half][r][2] + part[half][r][3]);
            sum[half * (SUMS / 2) + r] = total;
        }
}

// Rows of x to shared memory as floats; those of a norm without its scale, which the sums get, and their squares.
DEVICE void stage_rows(const T* x, int stride, const float2* stats, const NormWeights& norm, float* xs, float* squares) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const T* row = x + (long long)r * stride;
        float square = 0.f, value[X_PASSES][VECTOR<T>];
        if constexpr (PROLOGUE == MERGE) {
            merge_splits(row, stats + r * SPLITS * (K / HEAD_DIM), [&](int pass) { return min(x_vector(pass), X_VECTORS - 1); }, value);
        } else {
#pragma unroll
            for (int pass = 0; pass < X_PASSES; pass++)  // first load everything
                if (has_x_vector(pass)) unpack(load_fresh(row + x_vector(pass) * VECTOR<T>), value[pass], T());
        }
#pragma unroll
        for (int pass = 0; pass < X_PASSES; pass++) {
            if (!has_x_vector(pass)) continue;
            float(&v)[VECTOR<T>] = value[pass];
            if constexpr (PROLOGUE == NORM) {
                square += sum_of_squares(v);
#pragma unroll
                for (int e = 0; e < VECTOR<T>; e++) v[e] *= norm.value[pass][e];
            }
            float4* to = (float4*)(xs + r * K);
#pragma unroll
            for (int e = 0; e < VECTOR<T>; e += 4) {
                int element = x_vector(pass) * VECTOR<T> + e;
                to[place_of_x(element / W_VECTOR, element % W_VECTOR / 4)] = make_float4(v[e], v[e + 1], v[e + 2], v[e + 3]);
            }
        }
        if constexpr (PROLOGUE == NORM) {
            square = warp_sum(square);
            if ((threadIdx.x & 31) == 0) squares[r * WARPS + threadIdx.x / 32] = square;
        }
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) gemv(
    const T* x, int x_stride, const float2* stats, const float* norm_weight, float eps,
    const char* weight, const float* bias,
    OUT* out, int out_stride, int outputs, int share, int extra, int launch_after) {
    __shared__ float squares[ROWS * WARPS];
    const Share mine = share_of_block(share, extra);
    const int warp = threadIdx.x / 32, group = warp / CHUNKS;
    const Lane lane = {(int)(threadIdx.x & 31), warp % CHUNKS};
    char* ring = shared_memory + warp * (STAGES * STAGE_BYTES);
    float* xs = (float*)(shared_memory + WARPS * STAGES * STAGE_BYTES);
    const PartialSums sums = {xs + (X_STAGED ? ROWS * K : 0), share + 1, ROWS};

    // A group of warps computes every GROUPS-th output of the block. A pair of rows makes one gated output or two others.
    const int count = mine.count > group ? (mine.count - group + GROUPS - 1) / GROUPS : 0;
    const int pairs = GATED ? count : (count + 1) / 2;
    const int first = mine.first + group, next = GATED ? GROUPS : 2 * GROUPS, second = GATED ? outputs : GROUPS;
    Fetcher fetcher = {
        lane, weight + first * ROW_BYTES + lane.vector(0) * VECTOR_BYTES, next * ROW_BYTES, second * ROW_BYTES, pairs, count};
#pragma unroll (STAGES <= 6 ? STAGES : 1)
    for (int stage = 0; stage < STAGES; stage++) {
        keep_pace(stage, pairs);
        fetcher.fetch(ring + stage * STAGE_BYTES);
    }
    if (launch_after == 0 || launch_after > pairs) launch_next();

    Outputs results(out, out_stride, outputs, ROWS, mine, bias);
    NormWeights norm;
    if constexpr (PROLOGUE == NORM) norm.load(norm_weight);
    Operand operand;
    operand.rows = xs;
    wait_for_previous();
    results.load_addend();
    if constexpr (X_STAGED) stage_rows(x, x_stride, stats, norm, xs, squares);
    if constexpr (X_STAGED && X_IN_REGISTERS) operand.keep_row(lane);
    if constexpr (!X_STAGED) operand.load_row(x, lane);

    char* slot = ring;
    for (int pair = 0; pair < pairs; pair++) {
        const bool both = GATED || 2 * pair + 1 < count;
        float sum[SUMS];
#pragma unroll
        for (int i = 0; i < SUMS; i++) sum[i] = 0.f;
        wait_for_copies<STAGES - 1>();
        if (both) multiply<2>(slot, lane, operand, sum);
        else multiply<1>(slot, lane, operand, sum);
        fetcher.fetch(slot);
        if (pair + 1 == launch_after) launch_next();
        slot = slot == ring + (STAGES - 1) * STAGE_BYTES ? ring : slot + STAGE_BYTES;

        float total = warp_sums(sum);
        const int index = lane.lane / (32 / SUMS), half = index / (SUMS / 2), row = index % (SUMS / 2);
        if (lane.lane % (32 / SUMS) == 0 && row < ROWS && (both || half == 0)) {
            int output = group + (GATED ? pair : 2 * pair + half) * GROUPS;
            sums.at(GATED ? half : 0, lane.chunk, row)[output] = total;
        }
    }
    __syncthreads();
    results.write(sums, [&](int row) { return PROLOGUE == NORM ? norm_scale(squares + row * WARPS, eps) : 1.f; });
}
