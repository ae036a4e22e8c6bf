// Attention and recurrences over floats, the same for every level; included by kernels_<level>.cpp after float_ops.inl.

#pragma once

#include "float_ops.inl"

namespace limbeck {
namespace {

// ---- Attention: blocks of positions, each block's scores into a running softmax (FlashAttention, arXiv 2205.14135).

// A block of the cache is read as it is where few queries look at it, and turned into floats once where many do. The
// arithmetic is the same, so a query's result does not depend on its company.
struct Halves {
    const uint16_t* data;
    Vec operator()(size_t place) const { return load_half(data + place); }
    Vec some(size_t place, size_t count) const {
        uint16_t held[kLanes] = {};
        std::copy(data + place, data + place + count, held);
        return load_half(held);
    }
};
struct Floats {
    const float* data;
    Vec operator()(size_t place) const { return load(data + place); }
    Vec some(size_t place, size_t count) const { return load_some(data + place, count); }
};

// A block as floats: of keys `[D, kAttentionBlock]`, of values `[kAttentionBlock, D]`.
void block_to_floats(const Attention& task, const uint8_t* from, bool by_position, float* to) {
    const size_t n = task.width * kAttentionBlock;
    if (task.kind == CacheKind::f16) {
        convert<FloatKind::f16>(from, to, n);
        return;
    }
    float scales[kAttentionBlock];
    std::memcpy(scales, from + n, sizeof scales);
    for (size_t i = 0; i < n; ++i)
        to[i] = float(int8_t(from[i])) * scales[by_position ? i / task.width : i % kAttentionBlock];
}

// scores[query][position] of N queries with a block of keys. Dimensions add up in `kChains` sums by turns, because an
// addition waits for the one before it in its sum.
constexpr size_t kChains = kLanes == 16 ? 2 : 1;

template <size_t N, class Keys>
void score_block(const Attention& task, size_t query, Keys keys, float* scores) {
    constexpr size_t parts = kAttentionBlock / kLanes;
    Vec sums[kChains][N][parts] = {};
    for (size_t d = 0; d < task.width; d += kChains) {
        for (size_t chain = 0; chain < kChains; ++chain) {
            for (size_t part = 0; part < parts; ++part) {
                const Vec key = keys((d + chain) * kAttentionBlock + part * kLanes);
                for (size_t n = 0; n < N; ++n)
                    sums[chain][n][part] += key * task.q[(query + n) * task.width + d + chain];
            }
        }
    }
    for (size_t n = 0; n < N; ++n) {
        for (size_t part = 0; part < parts; ++part) {
            store(scores + n * kAttentionBlock + part * kLanes,
                  kChains == 2 ? sums[0][n][part] + sums[kChains - 1][n][part] : sums[0][n][part]);
        }
    }
}

// out[query] += weights[query] times a block of values, for N queries and `Chunks` vectors of dimensions from d on.
template <size_t N, size_t Chunks, class Values>
void add_chunks(const Attention& task, size_t query, size_t d, const float* weights, Values values, size_t count) {
    Vec sums[N][Chunks];
    for (size_t n = 0; n < N; ++n) {
        for (size_t c = 0; c < Chunks; ++c) sums[n][c] = load(task.out + (query + n) * task.width + d + c * kLanes);
    }
    for (size_t i = 0; i < count; ++i) {
        for (size_t c = 0; c < Chunks; ++c) {
            const Vec value = values(i * task.width + d + c * kLanes);
            for (size_t n = 0; n < N; ++n) sums[n][c] += value * weights[n * kAttentionBlock + i];
        }
    }
    for (size_t n = 0; n < N; ++n) {
        for (size_t c = 0; c < Chunks; ++c) store(task.out + (query + n) * task.width + d + c * kLanes, sums[n][c]);
    }
}

// The dimensions behind the last whole vector, as a vector that is filled up.
template <size_t N, class Values>
void add_last_chunk(const Attention& task, size_t query, size_t d, const float* weights, Values values, size_t count) {
    const size_t rest = task.width - d;
    for (size_t n = 0; n < N; ++n) {
        float* to = task.out + (query + n) * task.width + d;
        Vec sum = load_some(to, rest);
        for (size_t i = 0; i < count; ++i) {
            sum += values.some(i * task.width + d, rest) * weights[n * kAttentionBlock + i];
        }
        store_some(to, sum, rest);
    }
}

template <size_t N, class Values>
void add_values(const Attention& task, size_t query, const float* weights, Values values, size_t count) {
    constexpr size_t chunks = N == 1 ? 4 : 2;
    size_t d = 0;
    for (; d + chunks * kLanes <= task.width; d += chunks * kLanes)
        add_chunks<N, chunks>(task, query, d, weights, values, count);
    for (; d + kLanes <= task.width; d += kLanes) add_chunks<N, 1>(task, query, d, weights, values, count);
    if (d < task.width) add_last_chunk<N>(task, query, d, weights, values, count);
}

template <class Keys>
void score_queries(const Attention& task, Keys keys, float* scores) {
    size_t query = 0;
    for (; query + 4 <= task.queries; query += 4) score_block<4>(task, query, keys, scores + query * kAttentionBlock);
    for (; query < task.queries; ++query) score_block<1>(task, query, keys, scores + query * kAttentionBlock);
}

template <class Values>
void add_for_queries(const Attention& task, const float* weights, Values values, size_t count) {
    size_t query = 0;
    for (; query + 4 <= task.queries; query += 4)
        add_values<4>(task, query, weights + query * kAttentionBlock, values, count);
    for (; query < task.queries; ++query) add_values<1>(task, query, weights + query * kAttentionBlock, values, count);
}

// Scores of one query to weights e^(score - m); rescales what the query has gathered so far.
void weigh(const Attention& task, size_t query, size_t first, size_t count, float* scores, float& most, float& sum) {
    float found = most;
    for (size_t i = 0; i < count; ++i) {
        const int32_t position = int32_t(first + i);
        if (position < task.first[query] || position >= task.last[query])
            scores[i] = -std::numeric_limits<float>::infinity();
        found = std::max(found, scores[i]);
    }
    std::fill(scores + count, scores + kAttentionBlock, -std::numeric_limits<float>::infinity());
    if (found == -std::numeric_limits<float>::infinity()) {  // nothing to see yet
        std::fill(scores, scores + kAttentionBlock, 0.0f);
        return;
    }
    Vec added = {};
    for (size_t i = 0; i < kAttentionBlock; i += kLanes) {
        const Vec score = load(scores + i);
        const Vec weight = score < all(-1e30f) ? Vec{} : exponential(score - found);
        store(scores + i, weight);
        added += weight;
    }
    if (found > most) {
        const float shrink = most == -std::numeric_limits<float>::infinity() ? 0.0f : std::exp(most - found);
        sum *= shrink;
        for (size_t d = 0; d < task.width; ++d) task.out[query * task.width + d] *= shrink;
        most = found;
    }
    sum += total(added);
}

void attend(const Attention& task) {
    const size_t n = task.queries, width = task.width;
    float* keys = task.work;
    float* values = keys + kAttentionBlock * width;
    float* scores = values + kAttentionBlock * width;
    float *most = scores + kAttentionBlock * n, *sums = most + n;
    int32_t begin = task.first[0], end = 0;
    for (size_t query = 0; query < n; ++query) {
        begin = std::min(begin, task.first[query]);
        end = std::max(end, task.last[query]);
        most[query] = -std::numeric_limits<float>::infinity();
        sums[query] = 0;
        std::fill(task.out + query * task.width, task.out + query * task.width + width, 0.0f);
    }
    const bool direct = task.kind == CacheKind::f16 && n <= 4;
    const size_t bytes = cache_block_bytes(width, task.kind);
    for (size_t block = size_t(begin) / kAttentionBlock; block * kAttentionBlock < size_t(end); ++block) {
        const size_t first = block * kAttentionBlock, count = std::min(kAttentionBlock, size_t(end) - first);
        const uint8_t *key_block = task.keys + block * bytes, *value_block = task.values + block * bytes;
        if (direct) {
            score_queries(task, Halves{reinterpret_cast<const uint16_t*>(key_block)}, scores);
        } else if (task.kind == CacheKind::f32) {
            score_queries(task, Floats{reinterpret_cast<const float*>(key_block)}, scores);
        } else {
            block_to_floats(task, key_block, false, keys);
            score_queries(task, Floats{keys}, scores);
        }
        for (size_t query = 0; query < n; ++query) {
            weigh(task, query, first, count, scores + query * kAttentionBlock, most[query], sums[query]);
        }
        if (direct) {
            add_for_queries(task, scores, Halves{reinterpret_cast<const uint16_t*>(value_block)}, count);
        } else if (task.kind == CacheKind::f32) {
            add_for_queries(task, scores, Floats{reinterpret_cast<const float*>(value_block)}, count);
        } else {
            block_to_floats(task, value_block, true, values);
            add_for_queries(task, scores, Floats{values}, count);
        }
    }
    for (size_t query = 0; query < n; ++query) {
        const float scale = sums[query] > 0 ? 1.0f / sums[query] : 0.0f;
        for (size_t d = 0; d < width; ++d) task.out[query * task.width + d] *= scale;
    }
}

// ---- Recurrences

// S <- decay S + k v^T, y = q S on some neighbouring columns of a state `[keys, values]`.
void take_in(float* state, size_t keys, size_t values, size_t count, const float* q, const float* k, const float* v,
             float decay, float* y) {
    std::fill(y, y + count, 0.0f);
    for (size_t i = 0; i < keys; ++i) {
        float* row = state + i * values;
        size_t j = 0;
        for (; j + kLanes <= count; j += kLanes) {
            const Vec now = load(row + j) * decay + load(v + j) * k[i];
            store(row + j, now);
            store(y + j, load(y + j) + now * q[i]);
        }
        for (; j < count; ++j) {
            row[j] = row[j] * decay + v[j] * k[i];
            y[j] += row[j] * q[i];
        }
    }
}

void retention_step(float* state, size_t keys, size_t values, const float* q, const float* k, const float* v,
                    float decay, float* y) {
    take_in(state, keys, values, values, q, k, v, decay, y);
}

void delta_step(float* state, size_t keys, size_t values, const float* q, const float* k, const float* v, float decay,
                float beta, float* y) {
    constexpr size_t most = 512;
    float change[most];
    for (size_t first = 0; first < values; first += most) {
        const size_t count = std::min(most, values - first);
        std::fill(change, change + count, 0.0f);
        for (size_t i = 0; i < keys; ++i) add_scaled(change, state + i * values + first, k[i] * decay, count);
        for (size_t j = 0; j < count; ++j) change[j] = beta * (v[first + j] - change[j]);
        take_in(state + first, keys, values, count, q, k, change, decay, y + first);
    }
}

}  // namespace
}  // namespace limbeck
