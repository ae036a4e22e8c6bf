#include "tiles.hpp"

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "half.hpp"

namespace limbeck {
namespace {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kPiece = size_t(32) << 20;  // untouched memory of a piece costs nothing
constexpr size_t kMostColumns = 256;         // of a block, in a file or in a tile

// Bytes of 4 columns of a row as one number, so that planes are joined by shifts.
uint32_t four(const uint8_t* codes) {
    uint32_t value;
    std::memcpy(&value, codes, sizeof value);
    return value;
}

// The codes of 32 rows, `[32][stride]` and one byte each, as one block of a tile.
void join(const TileShape& shape, const uint8_t* codes, size_t stride, uint8_t* block) {
    for (int load = 0; load < shape.loads(); ++load) {
        for (size_t row = 0; row < kTileRows; ++row, block += 4) {
            const uint8_t* from = codes + row * stride + load * shape.planes() * 4;
            uint32_t joined = 0;
            for (int plane = 0; plane < shape.planes(); ++plane)
                joined |= four(from + 4 * plane) << (plane * shape.bits);
            std::memcpy(block, &joined, sizeof joined);
        }
    }
}

bool ternary_q4(const uint8_t* block) {
    for (int j = 2; j < 18; ++j) {
        const unsigned low = block[j] & 15u, high = block[j] >> 4;
        if (low - 7 > 2 || high - 7 > 2) return false;
    }
    return true;
}

// True when every `share` neighbouring blocks have one scale.
bool scales_repeat(const BlockType& type, const uint8_t* source, size_t blocks, size_t share) {
    for (size_t first = 0; first < blocks; first += share) {
        for (size_t other = 1; other < share; ++other) {
            if (std::memcmp(source + first * size_t(type.bytes), source + (first + other) * size_t(type.bytes), 2) != 0)
                return false;
        }
    }
    return true;
}

}  // namespace

Buffer::Buffer(size_t bytes) : size_(bytes) {
    const size_t border = bytes >= kHugePage ? kHugePage : 64;
    const size_t whole = (bytes + border - 1) / border * border;
    void* data = std::aligned_alloc(border, whole == 0 ? border : whole);
    if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    if (border == kHugePage) madvise(data, whole, MADV_HUGEPAGE);  // advice: without huge pages it is only slower
#endif
    data_.reset(static_cast<uint8_t*>(data), std::free);
}

Buffer Arena::take(size_t bytes) {
    const size_t whole = (bytes + 63) / 64 * 64;
    if (whole > piece_.size() - used_) {
        if (whole > kPiece / 2) return Buffer(bytes);
        piece_ = Buffer(kPiece);
        used_ = 0;
    }
    Buffer taken;
    taken.data_ = std::shared_ptr<uint8_t>(piece_.data_, piece_.data() + used_);
    taken.size_ = bytes;
    used_ += whole;
    return taken;
}

Tiles::Tiles(TileKind kind, size_t matrices, size_t rows, size_t columns, Arena& arena)
    : kind_(kind), matrices_(matrices), rows_(rows), columns_(columns) {
    const size_t width = size_t(shape().columns);
    blocks_ = (columns + width - 1) / width;
    tiles_ = (rows + kTileRows - 1) / kTileRows;
    buffer_ = arena.take(matrices * tiles_ * tile_bytes());
}

bool Tiles::fill(size_t matrix, size_t number, const BlockType& type, const uint8_t* source) {
    const TileShape form = shape();
    const size_t stored = size_t(type.columns), width = size_t(form.columns);
    const size_t row_bytes = columns_ / stored * size_t(type.bytes);
    // Whole blocks of the file and of the tile at a time: the wider of the two.
    const size_t span = stored > width ? stored : width;
    uint8_t codes[kTileRows * kMostColumns];
    uint16_t scales[kTileRows][kMostColumns / 32];
    uint8_t* block = const_cast<uint8_t*>(tile(matrix, number));
    const int lift = type.offset - form.offset;  // a ternary Q4_0 has codes 7, 8, 9; a tile of 2 bits has 0, 1, 2
    uint8_t seen = 0;
    for (size_t column = 0; column < blocks_ * width; column += span) {
        std::memset(codes, form.offset, sizeof codes);
        std::memset(scales, 0, sizeof scales);
        for (size_t row = 0; row < kTileRows; ++row) {
            const size_t place = number * kTileRows + row;
            if (place >= rows_) break;
            for (size_t part = 0; part < span / stored; ++part) {
                const size_t at = column + part * stored;
                if (at >= columns_) break;
                uint8_t* here = codes + row * kMostColumns + part * stored;
                scales[row][part] =
                    decode_block(type, source + place * row_bytes + at / stored * size_t(type.bytes), here);
                if (lift != 0) {
                    for (size_t j = 0; j < stored; ++j) here[j] = uint8_t(here[j] - lift);
                }
            }
        }
        if (form.bits == 2) {
            for (uint8_t code : codes) seen = seen > code ? seen : code;
        }
        for (size_t part = 0; part < span && column + part < blocks_ * width; part += width, block += form.bytes()) {
            join(form, codes + part, kMostColumns, block);
            for (size_t row = 0; row < kTileRows; ++row) {
                std::memcpy(block + form.code_bytes() + 2 * row, &scales[row][part / stored], 2);
            }
        }
    }
    return seen > 2;
}

void Tiles::row(size_t matrix, size_t number, float* weights) const {
    const TileShape form = shape();
    const uint8_t* block = tile(matrix, number / kTileRows);
    const size_t row = number % kTileRows;
    const int mask = (1 << form.bits) - 1;
    for (size_t column = 0; column < columns_; column += size_t(form.columns), block += form.bytes()) {
        uint16_t half;
        std::memcpy(&half, block + form.code_bytes() + 2 * row, 2);
        const float scale = half_to_float(half);
        for (int j = 0; j < form.columns && column + size_t(j) < columns_; ++j) {
            const int load = j / (4 * form.planes()), plane = j / 4 % form.planes();
            const int code =
                (block[(size_t(load) * kTileRows + row) * 4 + size_t(j % 4)] >> (plane * form.bits)) & mask;
            weights[column + size_t(j)] = float(code - form.offset) * scale;
        }
    }
}

TileKind kind_for(const BlockType& type, const uint8_t* source, size_t blocks, size_t columns) {
    switch (type.number) {
        case 34:
        case 35:
            return TileKind::two_bits_128;
        case 42:
            return columns % 128 == 0 && scales_repeat(type, source, blocks, 2) ? TileKind::two_bits_128
                                                                                : TileKind::two_bits_64;
        case 2:
            for (size_t number = 0; number < blocks; ++number) {
                if (!ternary_q4(source + number * size_t(type.bytes))) return TileKind::four_bits_32;
            }
            if (columns % 128 == 0 && scales_repeat(type, source, blocks, 4)) return TileKind::two_bits_128;
            if (columns % 64 == 0 && scales_repeat(type, source, blocks, 2)) return TileKind::two_bits_64;
            return TileKind::four_bits_32;
        case 8:
            return TileKind::eight_bits_32;
        default:
            throw std::invalid_argument(std::string("no tiles are made of ") + type.name);
    }
}

}  // namespace limbeck
