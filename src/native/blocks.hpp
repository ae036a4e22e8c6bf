// The block types of GGUF that hold quantised weights: bytes of a file to codes and scales.
//
// A block is some columns of one row: unsigned codes and one float16 scale; a weight is (code - offset) * scale.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace limbeck {

struct BlockType {
    int number;  // in GGUF
    const char* name;
    int columns, bytes;  // of a block
    int offset;          // what a code is above its weight
};

// The type with GGUF's number; nullptr for one that holds no blocks known here.
const BlockType* block_type(int number);
const BlockType* block_type(const std::string& name);

// Codes of one block, `type.columns` bytes; returns the scale's float16 bits.
uint16_t decode_block(const BlockType& type, const uint8_t* block, uint8_t* codes);

// A row of `columns` weights as floats.
void decode_row(const BlockType& type, const uint8_t* row, size_t columns, float* weights);

// One block of codes and a scale, as the file holds it.
void encode_block(const BlockType& type, const uint8_t* codes, uint16_t scale, uint8_t* block);

}  // namespace limbeck
