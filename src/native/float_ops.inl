// Loops over floats, the same for every level: compiled by each kernels_*.cpp with its own instructions.
// A vector is as wide as the level's registers; the compiler turns its arithmetic into those instructions.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "half.hpp"
#include "kernels.hpp"

#if defined(LIMBECK_X86) && !defined(LIMBECK_SCALAR)
#include <immintrin.h>
#elif defined(LIMBECK_NEON)
#include <arm_neon.h>
#endif

namespace limbeck {
namespace {

#if defined(__AVX512F__) && !defined(LIMBECK_SCALAR)
constexpr size_t kLanes = 16;
#elif defined(__AVX2__) && !defined(LIMBECK_SCALAR)
constexpr size_t kLanes = 8;
#else
constexpr size_t kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));

inline Vec load(const float* from) {
    Vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }
// The first `count` lanes from and to memory; the others are 0. What is left over of a row goes through the same
// arithmetic as the rest, so that a result does not depend on how many rows are worked on at once.
inline Vec load_some(const float* from, size_t count) {
    float held[kLanes] = {};
    std::copy(from, from + count, held);
    return load(held);
}
inline void store_some(float* to, Vec value, size_t count) {
    float held[kLanes];
    store(held, value);
    std::copy(held, held + count, to);
}
inline Vec all(float value) { return value - Vec{}; }
inline float total(Vec value) {
    float sum = 0;
    for (size_t lane = 0; lane < kLanes; ++lane) sum += value[lane];
    return sum;
}
inline Vec greater(Vec a, Vec b) { return a > b ? a : b; }

inline Vec load_half(const uint16_t* from) {
#if defined(__AVX512F__) && !defined(LIMBECK_SCALAR)
    return Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__) && !defined(LIMBECK_SCALAR)
    return Vec(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    Vec value;
    for (size_t lane = 0; lane < kLanes; ++lane) value[lane] = half_to_float(from[lane]);
    return value;
#endif
}

inline void store_half(uint16_t* to, Vec value) {
#if defined(__AVX512F__) && !defined(LIMBECK_SCALAR)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(__m512(value), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && !defined(LIMBECK_SCALAR)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(__m256(value), _MM_FROUND_TO_NEAREST_INT));
#else
    for (size_t lane = 0; lane < kLanes; ++lane) to[lane] = float_to_half(value[lane]);
#endif
}

template <FloatKind Kind>
inline Vec load_as(const uint8_t* from, size_t place) {
    if constexpr (Kind == FloatKind::f32) return load(reinterpret_cast<const float*>(from) + place);
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(from) + place;
    if constexpr (Kind == FloatKind::f16) return load_half(halves);
    Vec value;
    for (size_t lane = 0; lane < kLanes; ++lane) value[lane] = bfloat_to_float(halves[lane]);
    return value;
}

template <FloatKind Kind>
inline float load_one(const uint8_t* from, size_t place) {
    if constexpr (Kind == FloatKind::f32) {
        float value;
        std::memcpy(&value, from + 4 * place, 4);
        return value;
    }
    uint16_t half;
    std::memcpy(&half, from + 2 * place, 2);
    return Kind == FloatKind::f16 ? half_to_float(half) : bfloat_to_float(half);
}

// Whole numbers of -127 ... 127 as int8.
inline void store_codes(int8_t* to, Ints whole) {
#if defined(__AVX512F__) && !defined(LIMBECK_SCALAR)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(__m512i(whole)));
#elif defined(__AVX2__) && !defined(LIMBECK_SCALAR)
    const __m256i ints = __m256i(whole);
    const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(shorts, shorts));
#else
    for (size_t lane = 0; lane < kLanes; ++lane) to[lane] = int8_t(whole[lane]);
#endif
}

// e^x within 2 units in the last place: x = n ln 2 + r, a polynomial in r, n added to the exponent.
inline Vec exponential(Vec x) {
    x = x < all(-87.0f) ? all(-87.0f) : x > all(88.0f) ? all(88.0f) : x;
    const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const Vec shifted = x * 1.44269504088896f + magic;
    const Vec n = shifted - magic;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Ints exponent = (Ints(shifted) - 0x4b400000) << 23;
    return Vec(Ints(p) + exponent);
}

// Calls f on whole vectors, and on a last one that is filled up; f maps (a, b) to a result.
template <class F>
inline void map(const float* a, const float* b, float* y, size_t n, F f) {
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(a + i), b ? load(b + i) : all(1.0f)));
    if (i == n) return;
    float tail[2][kLanes] = {};
    std::copy(a + i, a + n, tail[0]);
    if (b)
        std::copy(b + i, b + n, tail[1]);
    else
        std::fill(tail[1], tail[1] + kLanes, 1.0f);
    store(tail[0], f(load(tail[0]), load(tail[1])));
    std::copy(tail[0], tail[0] + (n - i), y + i);
}

float dot(const float* a, const float* b, size_t n) {
    Vec sums[4] = {};
    size_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        for (size_t part = 0; part < 4; ++part) sums[part] += load(a + i + part * kLanes) * load(b + i + part * kLanes);
    }
    for (; i + kLanes <= n; i += kLanes) sums[0] += load(a + i) * load(b + i);
    if (i < n) sums[0] += load_some(a + i, n - i) * load_some(b + i, n - i);
    return total((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

void add_scaled(float* y, const float* x, float scale, size_t n) {
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, load(y + i) + load(x + i) * scale);
    if (i < n) store_some(y + i, load_some(y + i, n - i) + load_some(x + i, n - i) * scale, n - i);
}

void rms_norm(const float* x, const float* weight, float eps, float* y, size_t n) {
    const float scale = 1.0f / std::sqrt(dot(x, x, n) / float(n) + eps);
    map(x, weight, y, n, [scale](Vec a, Vec w) { return a * scale * w; });
}

void silu_times(const float* gate, const float* up, float* y, size_t n) {
    map(gate, up, y, n, [](Vec a, Vec b) { return a / (1.0f + exponential(-a)) * b; });
}

// gelu(x) = x * sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), which is the tanh form.
void gelu_times(const float* gate, const float* up, float* y, size_t n) {
    map(gate, up, y, n, [](Vec a, Vec b) {
        const Vec inner = 1.5957691216057308f * (a + 0.044715f * a * a * a);
        return a / (1.0f + exponential(-inner)) * b;
    });
}

void softmax(float* x, size_t n) {
    const float most = *std::max_element(x, x + n);
    map(x, nullptr, x, n, [most](Vec a, Vec) { return exponential(a - most); });
    float sum = 0;
    for (size_t i = 0; i < n; ++i) sum += x[i];
    for (size_t i = 0; i < n; ++i) x[i] /= sum;
}

template <FloatKind Kind>
void convert(const uint8_t* from, float* to, size_t n) {
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load_as<Kind>(from, i));
    for (; i < n; ++i) to[i] = load_one<Kind>(from, i);
}

void to_float(FloatKind kind, const uint8_t* from, float* to, size_t n) {
    switch (kind) {
        case FloatKind::f32:
            std::memcpy(to, from, n * sizeof(float));
            return;
        case FloatKind::f16:
            convert<FloatKind::f16>(from, to, n);
            return;
        case FloatKind::bf16:
            convert<FloatKind::bf16>(from, to, n);
            return;
    }
}

void to_half(const float* from, uint16_t* to, size_t n) {
    size_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store_half(to + i, load(from + i));
    for (; i < n; ++i) to[i] = float_to_half(from[i]);
}

// Rows of float weights with N tokens at a time, so that a weight is read and converted once for all of them.
template <FloatKind Kind, size_t N>
void float_rows(const uint8_t* weights, size_t columns, const float* x, size_t x_stride, const Tokens& tokens,
                size_t token, float* out, size_t stride, size_t first, size_t last) {
    constexpr size_t size = Kind == FloatKind::f32 ? 4 : 2;
    const float* inputs[N];
    for (size_t n = 0; n < N; ++n) inputs[n] = x + tokens.source(token + n) * x_stride;
    for (size_t row = first; row < last; ++row) {
        const uint8_t* weight = weights + row * columns * size;
        Vec sums[N][2] = {};
        size_t i = 0;
        for (; i + 2 * kLanes <= columns; i += 2 * kLanes) {
            const Vec a = load_as<Kind>(weight, i), b = load_as<Kind>(weight, i + kLanes);
            for (size_t n = 0; n < N; ++n) {
                sums[n][0] += a * load(inputs[n] + i);
                sums[n][1] += b * load(inputs[n] + i + kLanes);
            }
        }
        for (; i < columns; i += kLanes) {
            const size_t rest = std::min(kLanes, columns - i);
            uint8_t held[kLanes * size] = {};
            std::memcpy(held, weight + i * size, rest * size);
            const Vec a = load_as<Kind>(held, 0);
            for (size_t n = 0; n < N; ++n) sums[n][0] += a * load_some(inputs[n] + i, rest);
        }
        for (size_t n = 0; n < N; ++n) out[tokens.target(token + n) * stride + row] = total(sums[n][0] + sums[n][1]);
    }
}

template <FloatKind Kind>
void all_float_rows(const uint8_t* weights, size_t columns, const float* x, size_t x_stride, const Tokens& tokens,
                    float* out, size_t stride, size_t first, size_t last) {
    size_t token = 0;
    for (; token + 4 <= tokens.count; token += 4) {
        float_rows<Kind, 4>(weights, columns, x, x_stride, tokens, token, out, stride, first, last);
    }
    for (; token < tokens.count; ++token) {
        float_rows<Kind, 1>(weights, columns, x, x_stride, tokens, token, out, stride, first, last);
    }
}

void multiply_float(FloatKind kind, const uint8_t* weights, size_t columns, const float* x, size_t x_stride,
                    const Tokens& tokens, float* out, size_t stride, size_t first, size_t last) {
    switch (kind) {
        case FloatKind::f32:
            all_float_rows<FloatKind::f32>(weights, columns, x, x_stride, tokens, out, stride, first, last);
            return;
        case FloatKind::f16:
            all_float_rows<FloatKind::f16>(weights, columns, x, x_stride, tokens, out, stride, first, last);
            return;
        case FloatKind::bf16:
            all_float_rows<FloatKind::bf16>(weights, columns, x, x_stride, tokens, out, stride, first, last);
            return;
    }
}

// Rounds to nearest, ties to even, as torch and NumPy do.
void quantise(const float* x, size_t columns, size_t block, bool whole_row, int8_t* codes, float* scales,
              int32_t* sums) {
    const auto largest = [x](size_t first, size_t last) {
        Vec most = {};
        size_t i = first;
        for (; i + kLanes <= last; i += kLanes) {
            const Vec value = load(x + i);
            most = greater(most, greater(value, -value));
        }
        float found = 0;
        for (size_t lane = 0; lane < kLanes; ++lane) found = std::max(found, most[lane]);
        for (; i < last; ++i) found = std::max(found, std::fabs(x[i]));
        return found;
    };
    const float row_most = whole_row ? largest(0, columns) : 0.0f;
    for (size_t first = 0; first < columns; first += block, ++scales, ++sums) {
        const size_t last = std::min(columns, first + block);
        const float step = std::max(whole_row ? row_most : largest(first, last), 1e-5f) / 127.0f;
        const float inverse = 1.0f / step, magic = 12582912.0f;
        Ints added = {};
        int32_t rest = 0;
        size_t i = first;
        for (; i + kLanes <= last; i += kLanes) {
            const Ints found = Ints(load(x + i) * inverse + magic) - 0x4b400000;
            const Ints whole = found > 127 ? 127 - Ints{} : found < -127 ? -127 - Ints{} : found;  // of a NaN too
            added += whole;
            store_codes(codes + i, whole);
        }
        for (; i < last; ++i) {
            codes[i] = int8_t(std::lrintf(std::max(-127.0f, std::min(127.0f, x[i] * inverse))));
            rest += codes[i];
        }
        for (size_t lane = 0; lane < kLanes; ++lane) rest += added[lane];
        *scales = step;
        *sums = rest;
    }
}

}  // namespace
}  // namespace limbeck
