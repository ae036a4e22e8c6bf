// Weights as the kernels read them: tiles of 32 rows in one contiguous stream.
//
// A tile is a row of blocks; a block is 32 rows by some columns: its codes, then 32 float16 scales. Codes lie in loads
// of 32 dwords, one a row: dword r of load l holds, for each plane p of the 8 / bits, the 4 columns (l * planes + p) *
// 4 ... + 3 in bits p * bits of its 4 bytes. So one vector register holds one load of 16 (or 8) rows, one broadcast
// holds 4 activations, and a block's scale is applied once for all rows of a register.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "blocks.hpp"

namespace limbeck {

constexpr size_t kTileRows = 32;

enum class TileKind { two_bits_128, two_bits_64, four_bits_32, eight_bits_32 };

struct TileShape {
    const char* name;
    int bits, columns;  // of a block
    int offset;         // what a code is above its weight

    constexpr int planes() const { return 8 / bits; }
    constexpr int loads() const { return columns / (4 * planes()); }
    constexpr size_t code_bytes() const { return kTileRows * size_t(columns) * size_t(bits) / 8; }
    constexpr size_t bytes() const { return code_bytes() + 2 * kTileRows; }
};

constexpr TileShape kTileShapes[] = {
    {"two_bits_128", 2, 128, 1}, {"two_bits_64", 2, 64, 1}, {"four_bits_32", 4, 32, 8}, {"eight_bits_32", 8, 32, 128}};
constexpr TileShape shape_of(TileKind kind) { return kTileShapes[int(kind)]; }

// Memory on a 64-byte border, in huge pages where the system gives them; nothing is written to it here, so that a
// page belongs to the memory node of the thread that first fills it.
class Buffer {
 public:
    Buffer() = default;
    explicit Buffer(size_t bytes);
    uint8_t* data() const { return data_.get(); }
    size_t size() const { return size_; }

 private:
    friend class Arena;
    std::shared_ptr<uint8_t> data_;
    size_t size_ = 0;
};

// Many buffers one behind another in large pieces of memory: small matrices share huge pages, and the next one begins
// where the last one ended, as they are read.
class Arena {
 public:
    Buffer take(size_t bytes);

 private:
    Buffer piece_;
    size_t used_ = 0;
};

// One matrix, or several of one shape (the experts of a layer), each beginning with a tile of its own.
class Tiles {
 public:
    Tiles() = default;
    Tiles(TileKind kind, size_t matrices, size_t rows, size_t columns, Arena& arena);

    TileKind kind() const { return kind_; }
    TileShape shape() const { return shape_of(kind_); }
    size_t matrices() const { return matrices_; }
    size_t rows() const { return rows_; }
    size_t columns() const { return columns_; }
    size_t blocks() const { return blocks_; }                            // of a tile
    size_t padded() const { return blocks_ * size_t(shape().columns); }  // columns of whole blocks
    size_t tiles() const { return tiles_; }                              // of a matrix
    size_t bytes() const { return buffer_.size(); }
    bool has_threes() const { return has_threes_; }  // a 2-bit code above 2, which ternary weights never have
    void set_has_threes(bool value) { has_threes_ = value; }

    const uint8_t* tile(size_t matrix, size_t number) const {
        return buffer_.data() + (matrix * tiles_ + number) * tile_bytes();
    }
    size_t tile_bytes() const { return blocks_ * shape().bytes(); }

    // Fill one tile from rows of a file's blocks; true when a 2-bit code above 2 was among them. Rows and columns
    // beyond the matrix become weights of 0. `source` is the first byte of the matrix.
    bool fill(size_t matrix, size_t number, const BlockType& type, const uint8_t* source);

    // One row as floats.
    void row(size_t matrix, size_t number, float* weights) const;

 private:
    TileKind kind_ = TileKind::two_bits_128;
    size_t matrices_ = 0, rows_ = 0, columns_ = 0, blocks_ = 0, tiles_ = 0;
    bool has_threes_ = false;
    Buffer buffer_;
};

// The tightest kind that holds a matrix exactly: 2 bits for every ternary matrix, whatever type the file stores it in.
// `source` holds `blocks` blocks; rows are `columns` wide.
TileKind kind_for(const BlockType& type, const uint8_t* source, size_t blocks, size_t columns);

}  // namespace limbeck
