#include "blocks.hpp"

#include <cstring>
#include <iterator>

#include "half.hpp"

namespace limbeck {
namespace {

constexpr BlockType kTypes[] = {
    {2, "q4_0", 32, 18, 8},    {8, "q8_0", 32, 34, 128}, {34, "tq1_0", 256, 54, 1},
    {35, "tq2_0", 256, 66, 1}, {42, "q2_0", 64, 18, 1},
};
constexpr size_t kMostColumns = 256;

uint16_t read16(const uint8_t* bytes) {
    uint16_t value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
}

void write16(uint8_t* bytes, uint16_t value) { std::memcpy(bytes, &value, sizeof value); }

// TQ2_0: two halves of 128; byte m of a half holds columns m, 32 + m, 64 + m, 96 + m.
void decode_tq2(const uint8_t* block, uint8_t* codes) {
    for (int half = 0; half < 2; ++half, block += 32, codes += 128) {
        for (int plane = 0; plane < 4; ++plane) {
            for (int m = 0; m < 32; ++m) codes[32 * plane + m] = uint8_t((block[m] >> (2 * plane)) & 3);
        }
    }
}

// TQ1_0: a byte holds digits of base 3 as a fraction of 256 rounded up: times 3, the digit is what exceeds the byte.
// 32 bytes of five digits, 16 bytes of five, 4 bytes of four; a digit's columns are neighbours over the bytes.
struct Digits {
    int bytes, digits;
};
constexpr Digits kTq1[] = {{32, 5}, {16, 5}, {4, 4}};

void decode_tq1(const uint8_t* block, uint8_t* codes) {
    for (const Digits& part : kTq1) {
        for (int byte = 0; byte < part.bytes; ++byte) {
            uint8_t rest = block[byte];
            for (int digit = 0; digit < part.digits; ++digit) {
                const unsigned tripled = 3u * rest;
                codes[digit * part.bytes + byte] = uint8_t(tripled >> 8);
                rest = uint8_t(tripled);
            }
        }
        block += part.bytes;
        codes += part.bytes * part.digits;
    }
}

void encode_tq1(const uint8_t* codes, uint8_t* block) {
    for (const Digits& part : kTq1) {
        for (int byte = 0; byte < part.bytes; ++byte) {
            unsigned number = 0;
            for (int digit = 0; digit < 5; ++digit) {
                number = 3 * number + (digit < part.digits ? codes[digit * part.bytes + byte] : 0u);
            }
            block[byte] = uint8_t((number * 256 + 242) / 243);
        }
        block += part.bytes;
        codes += part.bytes * part.digits;
    }
}

}  // namespace

const BlockType* block_type(int number) {
    for (const BlockType& type : kTypes) {
        if (type.number == number) return &type;
    }
    return nullptr;
}

const BlockType* block_type(const std::string& name) {
    for (const BlockType& type : kTypes) {
        if (name == type.name) return &type;
    }
    return nullptr;
}

uint16_t decode_block(const BlockType& type, const uint8_t* block, uint8_t* codes) {
    switch (type.number) {
        case 2:
            for (int j = 0; j < 16; ++j) {
                codes[j] = block[2 + j] & 15;
                codes[16 + j] = uint8_t(block[2 + j] >> 4);
            }
            return read16(block);
        case 8:
            for (int j = 0; j < 32; ++j) codes[j] = uint8_t(block[2 + j] ^ 0x80);
            return read16(block);
        case 34:
            decode_tq1(block, codes);
            return read16(block + 52);
        case 35:
            decode_tq2(block, codes);
            return read16(block + 64);
        default:
            for (int j = 0; j < 64; ++j) codes[j] = uint8_t((block[2 + j / 4] >> (2 * (j % 4))) & 3);
            return read16(block);
    }
}

void encode_block(const BlockType& type, const uint8_t* codes, uint16_t scale, uint8_t* block) {
    std::memset(block, 0, size_t(type.bytes));
    switch (type.number) {
        case 2:
            write16(block, scale);
            for (int j = 0; j < 16; ++j) block[2 + j] = uint8_t(codes[j] | (codes[16 + j] << 4));
            return;
        case 8:
            write16(block, scale);
            for (int j = 0; j < 32; ++j) block[2 + j] = uint8_t(codes[j] ^ 0x80);
            return;
        case 34:
            encode_tq1(codes, block);
            write16(block + 52, scale);
            return;
        case 35:
            for (int j = 0; j < 256; ++j) block[j / 128 * 32 + j % 32] |= uint8_t(codes[j] << (j % 128 / 32 * 2));
            write16(block + 64, scale);
            return;
        default:
            write16(block, scale);
            for (int j = 0; j < 64; ++j) block[2 + j / 4] |= uint8_t(codes[j] << (2 * (j % 4)));
    }
}

void decode_row(const BlockType& type, const uint8_t* row, size_t columns, float* weights) {
    uint8_t codes[kMostColumns];
    for (size_t column = 0; column < columns; column += size_t(type.columns), row += type.bytes) {
        const float scale = half_to_float(decode_block(type, row, codes));
        for (int j = 0; j < type.columns; ++j) weights[column + size_t(j)] = float(codes[j] - type.offset) * scale;
    }
}

}  // namespace limbeck
