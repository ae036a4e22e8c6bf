// The loop over tiles and tokens around a level's `one_token` and `some_tokens`; included at the end of
// kernels_<level>.cpp. A tile stays in the first cache while all tokens go past it.

#pragma once

namespace limbeck {
namespace {

template <TileKind Kind, size_t N>
void tokens_at_once(const Tiles& tiles, const uint8_t* tile, const Activations& x, const Tokens& tokens, size_t token,
                    float* out, size_t stride, size_t rows) {
    Column columns[N];
    float* to[N];
    for (size_t n = 0; n < N; ++n) columns[n] = column_of(x, tokens.source(token + n));
    for (size_t part = 0; part < kTileRows / kRegisterRows && part * kRegisterRows < rows; ++part) {
        for (size_t n = 0; n < N; ++n) to[n] = out + tokens.target(token + n) * stride + part * kRegisterRows;
        some_tokens<Kind, N>(tile, tiles.blocks(), part, columns, to,
                             std::min(kRegisterRows, rows - part * kRegisterRows));
    }
}

template <TileKind Kind>
void multiply_kind(const Tiles& tiles, size_t matrix, const Activations& x, const Tokens& tokens, float* out,
                   size_t stride, size_t first_tile, size_t last_tile) {
    for (size_t number = first_tile; number < last_tile; ++number) {
        const uint8_t* tile = tiles.tile(matrix, number);
        const size_t rows = std::min(kTileRows, tiles.rows() - number * kTileRows);
        float* here = out + number * kTileRows;
        if constexpr (has_one_token(Kind)) {
            if (tokens.count == 1 && (kThreesFit || !tiles.has_threes())) {
                one_token<Kind>(tile, tiles.blocks(), column_of(x, tokens.source(0)), here + tokens.target(0) * stride,
                                rows);
                continue;
            }
        }
        size_t token = 0;
        for (; token + kMostTokens <= tokens.count; token += kMostTokens) {
            tokens_at_once<Kind, kMostTokens>(tiles, tile, x, tokens, token, here, stride, rows);
        }
        for (; token + 4 <= tokens.count; token += 4)
            tokens_at_once<Kind, 4>(tiles, tile, x, tokens, token, here, stride, rows);
        for (; token + 2 <= tokens.count; token += 2)
            tokens_at_once<Kind, 2>(tiles, tile, x, tokens, token, here, stride, rows);
        if (token < tokens.count) tokens_at_once<Kind, 1>(tiles, tile, x, tokens, token, here, stride, rows);
    }
}

void multiply(const Tiles& tiles, size_t matrix, const Activations& x, const Tokens& tokens, float* out, size_t stride,
              size_t first_tile, size_t last_tile) {
    const auto run = [&](auto function) { function(tiles, matrix, x, tokens, out, stride, first_tile, last_tile); };
    switch (tiles.kind()) {
        case TileKind::two_bits_128:
            return run(multiply_kind<TileKind::two_bits_128>);
        case TileKind::two_bits_64:
            return run(multiply_kind<TileKind::two_bits_64>);
        case TileKind::four_bits_32:
            return run(multiply_kind<TileKind::four_bits_32>);
        case TileKind::eight_bits_32:
            return run(multiply_kind<TileKind::eight_bits_32>);
    }
}

}  // namespace
}  // namespace limbeck
