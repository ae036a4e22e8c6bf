// float16 and bfloat16 as 16-bit integers, without any instruction of the processor's.
#pragma once

#include <cstdint>
#include <cstring>

namespace limbeck {

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float bfloat_to_float(uint16_t half) { return bits_to_float(uint32_t(half) << 16); }

inline float half_to_float(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16;
    const uint32_t exponent = (half >> 10) & 31, fraction = half & 1023;
    if (exponent == 31) return bits_to_float(sign | 0x7f800000 | (fraction << 13));
    if (exponent != 0) return bits_to_float(sign | ((exponent + 112) << 23) | (fraction << 13));
    const float small = float(fraction) * 5.9604644775390625e-8f;  // 2^-24, the step of subnormal numbers
    return sign ? -small : small;
}

// Rounds to nearest, ties to even.
inline uint16_t float_to_half(float value) {
    const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);   // not a number
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // 65520 and above round to infinity
    if (magnitude < 0x38800000) {                                 // below 2^-14: a multiple of 2^-24
        const float shifted = bits_to_float(magnitude) + 0.5f;    // 0.5 has a step of 2^-24: the addition rounds
        return uint16_t(sign | (float_to_bits(shifted) - 0x3f000000));
    }
    const uint32_t odd = (magnitude >> 13) & 1;
    return uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13));
}

}  // namespace limbeck
