#include "linear.hpp"

#include <algorithm>
#include <atomic>

namespace limbeck {

namespace {
size_t size_of(FloatKind kind) { return kind == FloatKind::f32 ? 4 : 2; }
}  // namespace

size_t Matrix::bytes() const { return tiled_ ? tiles_.bytes() : matrices_ * rows_ * columns_ * size_of(kind_); }

unsigned Matrix::form() const {
    if (!tiled_) return kFloats;
    switch (tiles_.kind()) {
        case TileKind::two_bits_128:
            return whole_rows_ ? kRows128 : kBlocks128;
        case TileKind::two_bits_64:
            return whole_rows_ ? kRows64 : kBlocks64;
        default:
            return kBlocks32;
    }
}

void Matrix::row(size_t matrix, size_t number, float* to) const {
    if (tiled_) return tiles_.row(matrix, number, to);
    kernels().to_float(kind_, floats_ + (matrix * rows_ + number) * columns_ * size_of(kind_), to, columns_);
}

Tiles tiles_from(const BlockType& type, const uint8_t* source, size_t matrices, size_t rows, size_t columns,
                 Arena& arena, Pool& pool) {
    const size_t bytes = rows * (columns / size_t(type.columns)) * size_t(type.bytes);
    Tiles tiles(kind_for(type, source, matrices * rows * (columns / size_t(type.columns)), columns), matrices, rows,
                columns, arena);
    std::atomic<bool> threes{false};
    pool.run([&](Worker& worker) {
        for (size_t matrix = 0; matrix < matrices; ++matrix) {
            const auto [first, last] = worker.part(tiles.tiles());
            for (size_t number = first; number < last; ++number) {
                if (tiles.fill(matrix, number, type, source + matrix * bytes)) threes = true;
            }
        }
    });
    tiles.set_has_threes(threes);
    return tiles;
}

Rows::Rows(Frame& frame, size_t count, size_t columns, unsigned forms) : count(count), columns(columns) {
    floats = frame.take<float>(count * columns);
    size_t place = 0;
    for (unsigned form : {kRows128, kRows64, kBlocks32, kBlocks128, kBlocks64}) {
        if (!(forms & form)) continue;
        Quantised& made = forms_[place++];
        made.form = form;
        made.block = form & (kRows128 | kBlocks128) ? 128 : form & (kRows64 | kBlocks64) ? 64 : 32;
        made.blocks = (columns + made.block - 1) / made.block;
        made.codes = frame.take<int8_t>(count * made.blocks * made.block);
        made.scales = frame.take<float>(count * made.blocks);
        made.sums = frame.take<int32_t>(count * made.blocks);
    }
}

void Rows::finish(size_t number) const {
    for (const Quantised& made : forms_) {
        if (made.form == 0) break;
        const size_t padded = made.blocks * made.block;
        int8_t* codes = made.codes + number * padded;
        kernels().quantise(row(number), columns, made.block, bool(made.form & (kRows128 | kRows64)), codes,
                           made.scales + number * made.blocks, made.sums + number * made.blocks);
        std::fill(codes + columns, codes + padded, int8_t(0));
    }
}

Activations Rows::activations(unsigned form) const {
    for (const Quantised& made : forms_) {
        if (made.form == form) return {made.codes, made.scales, made.sums, made.blocks * made.block, made.blocks};
    }
    return {};
}

void Product::run(size_t first_unit, size_t last_unit) const {
    if (first_unit >= last_unit || tokens_.count == 0) return;
    const Kernels& k = kernels();
    if (const Tiles* tiles = matrix_->tiles()) {
        k.multiply(*tiles, number_, rows_->activations(matrix_->form()), tokens_, out_, stride_, first_unit, last_unit);
        return;
    }
    const size_t first = first_unit * kTileRows, last = std::min(matrix_->rows(), last_unit * kTileRows);
    const uint8_t* weights =
        matrix_->floats_ + number_ * matrix_->rows() * matrix_->columns() * size_of(matrix_->kind_);
    k.multiply_float(matrix_->kind_, weights, matrix_->columns(), rows_->floats, rows_->columns, tokens_, out_, stride_,
                     first, last);
}

void multiply(const Worker& worker, std::initializer_list<Product> products) {
    for (const Product& product : products) {
        const auto [first, last] = worker.part(product.units());
        product.run(first, last);
    }
}

void multiply_together(const Worker& worker, const Product* products, size_t count) {
    size_t whole = 0;
    for (size_t i = 0; i < count; ++i) whole += products[i].cost();
    // Each thread takes one stretch of the products laid end to end: one stream of memory a thread.
    const auto [first, last] = worker.part(whole);
    size_t begin = 0;
    for (size_t i = 0; i < count; ++i) {
        const size_t cost = products[i].cost(), units = products[i].units();
        if (cost > 0) {
            const size_t from = first > begin ? std::min(first - begin, cost) : 0,
                         to = last > begin ? std::min(last - begin, cost) : 0;
            products[i].run(from * units / cost, to * units / cost);
        }
        begin += cost;
    }
}

}  // namespace limbeck
