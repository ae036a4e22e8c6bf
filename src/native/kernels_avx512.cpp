// Products with AVX-512 VNNI: 16 rows a register, four unsigned codes times four signed activations a lane and
// instruction.
#include "attention.inl"
#include "float_ops.inl"
#include "products.hpp"

namespace limbeck {
namespace {

constexpr size_t kRegisterRows = 16, kMostTokens = 8;

// Four neighbouring activations in every lane.
inline __m512i spread(const int8_t* codes) {
    int32_t four;
    std::memcpy(&four, codes, sizeof four);
    return _mm512_set1_epi32(four);
}

inline __m512 scales_at(const uint8_t* place) {
    return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(place)));
}

inline void write_rows(float* to, __m512 values, size_t rows) {
    if (rows >= 16)
        _mm512_storeu_ps(to, values);
    else if (rows > 0)
        _mm512_mask_storeu_ps(to, __mmask16((1u << rows) - 1), values);
}

constexpr bool has_one_token(TileKind) { return true; }
constexpr bool kThreesFit = true;  // into the sums of one_token

// One token, 32 rows. A plane keeps its power of two: its codes are masked and not shifted, and since all products of a
// plane are multiples of that power, one exact shift of its sum at the block's end brings it down. The sum of 128
// products of a top plane, 192 * 127 * 128, fits easily.
template <TileKind Kind>
void one_token(const uint8_t* block, size_t blocks, const Column& x, float* to, size_t rows) {
    constexpr TileShape shape = shape_of(Kind);
    constexpr int planes = shape.planes(), chains = planes == 1 ? 2 : planes;  // a single plane takes two sums in turns
    __m512 low = _mm512_setzero_ps(), high = low;
    const int8_t* codes = x.codes;
    for (size_t b = 0; b < blocks; ++b, block += shape.bytes(), codes += shape.columns) {
        __m512i a[chains], c[chains];
        a[0] = c[0] = _mm512_set1_epi32(-shape.offset * x.sums[b]);
        for (int chain = 1; chain < chains; ++chain) a[chain] = c[chain] = _mm512_setzero_si512();
        for (int load = 0; load < shape.loads(); ++load) {
            const __m512i u = _mm512_load_si512(block + load * 128), v = _mm512_load_si512(block + load * 128 + 64);
            for (int plane = 0; plane < planes; ++plane) {
                const __m512i mask = _mm512_set1_epi8(char(((1 << shape.bits) - 1) << (plane * shape.bits)));
                const __m512i four = spread(codes + (load * planes + plane) * 4);
                const int chain = planes == 1 ? load % 2 : plane;
                a[chain] = _mm512_dpbusd_epi32(a[chain], planes == 1 ? u : _mm512_and_si512(u, mask), four);
                c[chain] = _mm512_dpbusd_epi32(c[chain], planes == 1 ? v : _mm512_and_si512(v, mask), four);
            }
        }
        for (int chain = chains - 1; chain > 0; --chain) {
            constexpr unsigned shift = planes == 1 ? 0 : unsigned(shape.bits);
            a[chain - 1] = _mm512_add_epi32(a[chain - 1], _mm512_srai_epi32(a[chain], shift));
            c[chain - 1] = _mm512_add_epi32(c[chain - 1], _mm512_srai_epi32(c[chain], shift));
        }
        const __m512 scale = _mm512_set1_ps(x.scales[b]);
        low =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(a[0]), _mm512_mul_ps(scales_at(block + shape.code_bytes()), scale), low);
        high = _mm512_fmadd_ps(_mm512_cvtepi32_ps(c[0]),
                               _mm512_mul_ps(scales_at(block + shape.code_bytes() + 32), scale), high);
    }
    write_rows(to, low, rows);
    write_rows(to + 16, high, rows > 16 ? rows - 16 : 0);
}

// N tokens, 16 rows (the first or the second of the tile): codes are brought down once for all of them, and each token
// needs one sum.
template <TileKind Kind, size_t N>
void some_tokens(const uint8_t* block, size_t blocks, size_t part, const Column* x, float* const* to, size_t rows) {
    constexpr TileShape shape = shape_of(Kind);
    constexpr int planes = shape.planes();
    const __m512i mask = _mm512_set1_epi8(char((1 << shape.bits) - 1));
    __m512 totals[N];
    for (size_t n = 0; n < N; ++n) totals[n] = _mm512_setzero_ps();
    for (size_t b = 0; b < blocks; ++b, block += shape.bytes()) {
        __m512i sums[N];
        for (size_t n = 0; n < N; ++n) sums[n] = _mm512_set1_epi32(-shape.offset * x[n].sums[b]);
        const size_t first = b * size_t(shape.columns);
        for (int load = 0; load < shape.loads(); ++load) {
            const __m512i u = _mm512_load_si512(block + load * 128 + part * 64);
            for (int plane = 0; plane < planes; ++plane) {
                const __m512i codes =
                    planes == 1 ? u : _mm512_and_si512(_mm512_srli_epi16(u, unsigned(plane * shape.bits)), mask);
                for (size_t n = 0; n < N; ++n) {
                    sums[n] =
                        _mm512_dpbusd_epi32(sums[n], codes, spread(x[n].codes + first + (load * planes + plane) * 4));
                }
            }
        }
        const __m512 scale = scales_at(block + shape.code_bytes() + part * 32);
        for (size_t n = 0; n < N; ++n) {
            const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x[n].scales[b]));
            totals[n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[n]), both, totals[n]);
        }
    }
    for (size_t n = 0; n < N; ++n) write_rows(to[n], totals[n], rows);
}

}  // namespace
}  // namespace limbeck

#include "products.inl"

namespace limbeck {

const Kernels kAvx512Kernels = {quantise, multiply,   multiply_float, to_float,   to_half,
                                dot,      add_scaled, rms_norm,       silu_times, gelu_times,
                                softmax,  attend,     retention_step, delta_step};

}  // namespace limbeck
