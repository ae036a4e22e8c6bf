// Products for any processor, written as their definition.
#define LIMBECK_SCALAR
#include "attention.inl"
#include "float_ops.inl"

namespace limbeck {
namespace {

void multiply(const Tiles& tiles, size_t matrix, const Activations& x, const Tokens& tokens, float* out, size_t stride,
              size_t first_tile, size_t last_tile) {
    const TileShape shape = tiles.shape();
    const unsigned mask = (1u << shape.bits) - 1;
    for (size_t number = first_tile; number < last_tile; ++number) {
        const size_t rows = std::min(kTileRows, tiles.rows() - number * kTileRows);
        for (size_t i = 0; i < tokens.count; ++i) {
            const size_t token = tokens.source(i);
            const int8_t* codes = x.codes + token * x.columns;
            float* to = out + tokens.target(i) * stride + number * kTileRows;
            for (size_t row = 0; row < rows; ++row) {
                const uint8_t* block = tiles.tile(matrix, number);
                float sum = 0;
                for (size_t b = 0; b < tiles.blocks(); ++b, block += shape.bytes()) {
                    int32_t whole = -shape.offset * x.sums[token * x.blocks + b];
                    for (int column = 0; column < shape.columns; ++column) {
                        const int load = column / (4 * shape.planes()), plane = column / 4 % shape.planes();
                        const unsigned byte = block[(size_t(load) * kTileRows + row) * 4 + size_t(column % 4)];
                        whole += int32_t((byte >> (plane * shape.bits)) & mask) *
                                 codes[b * size_t(shape.columns) + size_t(column)];
                    }
                    uint16_t half;
                    std::memcpy(&half, block + shape.code_bytes() + 2 * row, sizeof half);
                    sum += float(whole) * (half_to_float(half) * x.scales[token * x.blocks + b]);
                }
                to[row] = sum;
            }
        }
    }
}

}  // namespace

const Kernels kScalarKernels = {quantise, multiply,   multiply_float, to_float,   to_half,
                                dot,      add_scaled, rms_norm,       silu_times, gelu_times,
                                softmax,  attend,     retention_step, delta_step};

}  // namespace limbeck
