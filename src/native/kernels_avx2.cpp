// Products with AVX2: 8 rows a register; pairs of unsigned codes times signed activations add up in 16 bits.
#include "attention.inl"
#include "float_ops.inl"
#include "products.hpp"

namespace limbeck {
namespace {

constexpr size_t kRegisterRows = 8, kMostTokens = 4;

inline __m256i spread(const int8_t* codes) {
    int32_t four;
    std::memcpy(&four, codes, sizeof four);
    return _mm256_set1_epi32(four);
}

inline __m256i codes_at(const uint8_t* place) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(place)); }
inline __m256 scales_at(const uint8_t* place) {
    return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(place)));
}
inline __m256i pairs(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

inline void write_rows(float* to, __m256 values, size_t rows) {
    if (rows >= 8) {
        _mm256_storeu_ps(to, values);
        return;
    }
    float held[8];
    _mm256_storeu_ps(held, values);
    std::copy(held, held + rows, to);
}

constexpr bool has_one_token(TileKind kind) { return shape_of(kind).bits == 2; }
// Planes of weight 4 with codes up to 2 come to 16 * 2 * 8 * 127 = 32512 in 16 bits; codes of 3 do not fit.
constexpr bool kThreesFit = false;

// One token, 32 rows of 2-bit codes up to 2: planes 1 and 3 keep a weight of 4 until the block's end, which saves their
// shifts.
template <TileKind Kind>
void one_token(const uint8_t* block, size_t blocks, const Column& x, float* to, size_t rows) {
    constexpr TileShape shape = shape_of(Kind);
    const __m256i low = _mm256_set1_epi8(3), high = _mm256_set1_epi8(12);
    __m256 totals[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    const int8_t* codes = x.codes;
    for (size_t b = 0; b < blocks; ++b, block += shape.bytes(), codes += shape.columns) {
        const __m256i start = _mm256_set1_epi32(-shape.offset * x.sums[b]);
        const __m256 scale = _mm256_set1_ps(x.scales[b]);
        __m256i ones[4], fours[4];
        for (int part = 0; part < 4; ++part) ones[part] = fours[part] = _mm256_setzero_si256();
        for (int load = 0; load < shape.loads(); ++load) {
            const __m256i x0 = spread(codes + load * 16), x1 = spread(codes + load * 16 + 4);
            const __m256i x2 = spread(codes + load * 16 + 8), x3 = spread(codes + load * 16 + 12);
            for (int part = 0; part < 4; ++part) {
                const __m256i u = codes_at(block + load * 128 + part * 32), down = _mm256_srli_epi16(u, 4);
                ones[part] = _mm256_add_epi16(ones[part], _mm256_maddubs_epi16(_mm256_and_si256(u, low), x0));
                fours[part] = _mm256_add_epi16(fours[part], _mm256_maddubs_epi16(_mm256_and_si256(u, high), x1));
                ones[part] = _mm256_add_epi16(ones[part], _mm256_maddubs_epi16(_mm256_and_si256(down, low), x2));
                fours[part] = _mm256_add_epi16(fours[part], _mm256_maddubs_epi16(_mm256_and_si256(down, high), x3));
            }
        }
        for (int part = 0; part < 4; ++part) {
            const __m256i fine = _mm256_add_epi32(pairs(ones[part]), _mm256_srai_epi32(pairs(fours[part]), 2));
            const __m256 both = _mm256_mul_ps(scales_at(block + shape.code_bytes() + part * 16), scale);
            totals[part] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(start, fine)), both, totals[part]);
        }
    }
    for (size_t part = 0; part < 4 && part * 8 < rows; ++part) write_rows(to + part * 8, totals[part], rows - part * 8);
}

// N tokens, 8 rows. Codes brought down are at most 3 (or 15): 32 * 2 * 3 * 127 = 24384 and 8 * 2 * 15 * 127 = 30480 fit
// 16 bits. Of 8-bit codes two products fill them: there |weight| times the activation with the weight's sign, joined at
// once.
template <TileKind Kind, size_t N>
void some_tokens(const uint8_t* block, size_t blocks, size_t part, const Column* x, float* const* to, size_t rows) {
    constexpr TileShape shape = shape_of(Kind);
    constexpr int planes = shape.planes();
    const __m256i mask = _mm256_set1_epi8(char((1 << shape.bits) - 1));
    __m256 totals[N];
    for (size_t n = 0; n < N; ++n) totals[n] = _mm256_setzero_ps();
    for (size_t b = 0; b < blocks; ++b, block += shape.bytes()) {
        __m256i sums[N];
        for (size_t n = 0; n < N; ++n) sums[n] = _mm256_setzero_si256();
        const size_t first = b * size_t(shape.columns);
        for (int load = 0; load < shape.loads(); ++load) {
            const __m256i u = codes_at(block + load * 128 + part * 32);
            if constexpr (planes == 1) {
                const __m256i weights = _mm256_xor_si256(u, _mm256_set1_epi8(char(0x80))),
                              size = _mm256_abs_epi8(weights);
                for (size_t n = 0; n < N; ++n) {
                    const __m256i turned = _mm256_sign_epi8(spread(x[n].codes + first + load * 4), weights);
                    sums[n] = _mm256_add_epi32(sums[n], pairs(_mm256_maddubs_epi16(size, turned)));
                }
                continue;
            }
            for (int plane = 0; plane < planes; ++plane) {
                const __m256i codes = _mm256_and_si256(_mm256_srli_epi16(u, plane * shape.bits), mask);
                for (size_t n = 0; n < N; ++n) {
                    const __m256i four = spread(x[n].codes + first + (load * planes + plane) * 4);
                    sums[n] = _mm256_add_epi16(sums[n], _mm256_maddubs_epi16(codes, four));
                }
            }
        }
        const __m256 scale = scales_at(block + shape.code_bytes() + part * 16);
        for (size_t n = 0; n < N; ++n) {
            __m256i whole = sums[n];
            if constexpr (planes > 1)
                whole = _mm256_add_epi32(pairs(whole), _mm256_set1_epi32(-shape.offset * x[n].sums[b]));
            const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x[n].scales[b]));
            totals[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), both, totals[n]);
        }
    }
    for (size_t n = 0; n < N; ++n) write_rows(to[n], totals[n], rows);
}

}  // namespace
}  // namespace limbeck

#include "products.inl"

namespace limbeck {

const Kernels kAvx2Kernels = {quantise, multiply,   multiply_float, to_float,   to_half,
                              dot,      add_scaled, rms_norm,       silu_times, gelu_times,
                              softmax,  attend,     retention_step, delta_step};

}  // namespace limbeck
