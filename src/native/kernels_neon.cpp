// Products with NEON's dot products (ARMv8.2): 4 rows a register, four signed codes times four activations a lane.
#include "attention.inl"
#include "float_ops.inl"
#include "products.hpp"

namespace limbeck {
namespace {

constexpr size_t kRegisterRows = 4, kMostTokens = 8;
constexpr bool has_one_token(TileKind) { return false; }
constexpr bool kThreesFit = true;

// Never called: `has_one_token` is false for every kind.
template <TileKind Kind>
void one_token(const uint8_t*, size_t, const Column&, float*, size_t) {}

inline int8x16_t spread(const int8_t* codes) {
    int32_t four;
    std::memcpy(&four, codes, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

// Codes of plane `plane` as int8: up to 4 bits they are small positive numbers, 8-bit ones lose their offset.
template <int Bits>
inline int8x16_t plane_of(uint8x16_t codes, int plane) {
    if constexpr (Bits == 8) {
        (void)plane;
        return vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(0x80)));
    } else {
        const uint8x16_t down = vshlq_u8(codes, vdupq_n_s8(int8_t(-plane * Bits)));
        return vreinterpretq_s8_u8(vandq_u8(down, vdupq_n_u8((1 << Bits) - 1)));
    }
}

// N tokens, 4 rows.
template <TileKind Kind, size_t N>
void some_tokens(const uint8_t* block, size_t blocks, size_t part, const Column* x, float* const* to, size_t rows) {
    constexpr TileShape shape = shape_of(Kind);
    constexpr int offset = shape.bits == 8 ? 0 : shape.offset;
    float32x4_t totals[N];
    for (size_t n = 0; n < N; ++n) totals[n] = vdupq_n_f32(0);
    for (size_t b = 0; b < blocks; ++b, block += shape.bytes()) {
        int32x4_t sums[N];
        for (size_t n = 0; n < N; ++n) sums[n] = vdupq_n_s32(-offset * x[n].sums[b]);
        const size_t first = b * size_t(shape.columns);
        for (int load = 0; load < shape.loads(); ++load) {
            const uint8x16_t u = vld1q_u8(block + load * 128 + part * 16);
            for (int plane = 0; plane < shape.planes(); ++plane) {
                const int8x16_t codes = plane_of<shape.bits>(u, plane);
                for (size_t n = 0; n < N; ++n) {
                    sums[n] =
                        vdotq_s32(sums[n], codes, spread(x[n].codes + first + (load * shape.planes() + plane) * 4));
                }
            }
        }
        uint16_t halves[4];
        std::memcpy(halves, block + shape.code_bytes() + part * 8, sizeof halves);
        const float32x4_t scale = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves)));
        for (size_t n = 0; n < N; ++n) {
            totals[n] = vfmaq_f32(totals[n], vcvtq_f32_s32(sums[n]), vmulq_n_f32(scale, x[n].scales[b]));
        }
    }
    for (size_t n = 0; n < N; ++n) {
        float held[4];
        vst1q_f32(held, totals[n]);
        std::copy(held, held + std::min<size_t>(rows, 4), to[n]);
    }
}

}  // namespace
}  // namespace limbeck

#include "products.inl"

namespace limbeck {

const Kernels kNeonKernels = {quantise, multiply,   multiply_float, to_float,   to_half,
                              dot,      add_scaled, rms_norm,       silu_times, gelu_times,
                              softmax,  attend,     retention_step, delta_step};

}  // namespace limbeck
