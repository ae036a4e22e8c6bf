// The inner loops, once for each level of instructions: one table of functions a level.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu.hpp"
#include "tiles.hpp"

namespace limbeck {

// int8 activations of some tokens, as `quantise` makes them: code * scale, a scale and a sum of codes a block.
struct Activations {
    const int8_t* codes;  // [tokens, columns], values -127 ... 127
    const float* scales;  // [tokens, blocks]
    const int32_t* sums;  // [tokens, blocks]
    size_t columns, blocks;
};

// Which tokens a product takes and where its rows go; without lists token i goes to row i.
struct Tokens {
    size_t count;
    const int32_t* from = nullptr;  // token of the activations
    const int32_t* to = nullptr;    // row of the result

    size_t source(size_t i) const { return from ? size_t(from[i]) : i; }
    size_t target(size_t i) const { return to ? size_t(to[i]) : i; }
};

enum class FloatKind { f32, f16, bf16 };

// Positions of the cache that attention takes at once. Keys of a block lie by dimension, `[D, kAttentionBlock]`, so
// that a vector holds one dimension of neighbouring positions; values lie by position, `[D]` each. Both are float16, or
// int8 with float scales, one a position, behind the codes of a block.
constexpr size_t kAttentionBlock = 32;
enum class CacheKind { f16, f32, int8 };
constexpr size_t cache_block_bytes(size_t width, CacheKind kind) {
    return kAttentionBlock * (kind == CacheKind::int8 ? width + 4 : (kind == CacheKind::f16 ? 2 : 4) * width);
}

// One key-value head of one sequence, and the queries that look at it.
struct Attention {
    size_t queries, width;  // rows of q; D
    const float* q;         // [queries, D], scaled already
    float* out;             // [queries, D]
    const int32_t* first;   // [queries] the first position a query sees
    const int32_t* last;    // [queries] one behind the last position it sees
    const uint8_t* keys;    // blocks, one behind another
    const uint8_t* values;
    CacheKind kind;
    float* work;  // attention_work(D, queries) floats
};
constexpr size_t attention_work(size_t width, size_t queries) {
    return kAttentionBlock * (2 * width + queries) + 2 * queries;
}

struct Kernels {
    // int8 codes of x `[columns]` with one scale a block, or one for the whole row repeated in each block.
    void (*quantise)(const float* x, size_t columns, size_t block, bool whole_row, int8_t* codes, float* scales,
                     int32_t* sums);

    // out[target, row] = sum over columns of weight[row, column] * activation[source, column], for the rows of some
    // tiles.
    void (*multiply)(const Tiles& tiles, size_t matrix, const Activations& x, const Tokens& tokens, float* out,
                     size_t stride, size_t first_tile, size_t last_tile);

    // The same with float weights `[rows, columns]` and float activations `[tokens, columns]`, rows first ... last - 1.
    void (*multiply_float)(FloatKind kind, const uint8_t* weights, size_t columns, const float* x, size_t x_stride,
                           const Tokens& tokens, float* out, size_t stride, size_t first, size_t last);

    void (*to_float)(FloatKind kind, const uint8_t* from, float* to, size_t n);
    void (*to_half)(const float* from, uint16_t* to, size_t n);

    float (*dot)(const float* a, const float* b, size_t n);
    void (*add_scaled)(float* y, const float* x, float scale, size_t n);                   // y += scale * x
    void (*rms_norm)(const float* x, const float* weight, float eps, float* y, size_t n);  // weight may be nullptr
    void (*silu_times)(const float* gate, const float* up, float* y, size_t n);  // silu(gate) * up; up may be nullptr
    void (*gelu_times)(const float* gate, const float* up, float* y, size_t n);  // the tanh form
    void (*softmax)(float* x, size_t n);
    void (*attend)(const Attention& task);

    // One step of retention on a state `[keys, values]` of one head: S <- decay S + k v^T; y = q S.
    void (*retention_step)(float* state, size_t keys, size_t values, const float* q, const float* k, const float* v,
                           float decay, float* y);

    // One step of a gated delta rule on a state `[keys, values]` of one head:
    // S *= decay; S += k (beta (v - k S)); y = q S.
    void (*delta_step)(float* state, size_t keys, size_t values, const float* q, const float* k, const float* v,
                       float decay, float beta, float* y);
};

const Kernels& kernels_of(Level level);
const Kernels& kernels();  // of the level in use

extern const Kernels kScalarKernels;
#if defined(LIMBECK_NEON)
extern const Kernels kNeonKernels;
#endif
#if defined(LIMBECK_X86)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace limbeck
