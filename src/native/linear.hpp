// Matrices of any type, and products with the rows of a step that all threads of a pool work on together.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.hpp"
#include "pool.hpp"

namespace limbeck {

// Memory that is handed out piece by piece; without memory behind it, it only counts.
class Frame {
 public:
    explicit Frame(uint8_t* base = nullptr) : base_(base) {}
    size_t used() const { return used_; }

    template <class T>
    T* take(size_t count) {
        T* found = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
        used_ += (count * sizeof(T) + 63) / 64 * 64;
        return found;
    }

 private:
    uint8_t* base_;
    size_t used_ = 0;
};

// What a product needs of its input, as bits: floats, or int8 with one scale a row (sums by blocks) or a block.
enum Form : unsigned { kFloats = 1, kRows128 = 2, kRows64 = 4, kBlocks32 = 8, kBlocks128 = 16, kBlocks64 = 32 };

// A matrix `[rows, columns]`, or several of one shape.
class Matrix {
 public:
    Matrix() = default;
    // whole_rows: 2-bit weights take activations of one scale a token, as in training that rounds them so.
    explicit Matrix(Tiles tiles, bool whole_rows = true)
        : tiles_(std::move(tiles)), tiled_(true), whole_rows_(whole_rows) {}
    // Borrowed floats, which outlive the matrix.
    Matrix(FloatKind kind, const uint8_t* floats, size_t matrices, size_t rows, size_t columns)
        : kind_(kind), floats_(floats), matrices_(matrices), rows_(rows), columns_(columns) {}

    bool empty() const { return rows() == 0; }
    size_t matrices() const { return tiled_ ? tiles_.matrices() : matrices_; }
    size_t rows() const { return tiled_ ? tiles_.rows() : rows_; }
    size_t columns() const { return tiled_ ? tiles_.columns() : columns_; }
    size_t bytes() const;  // read for a product with one token, all matrices together
    unsigned form() const;
    const Tiles* tiles() const { return tiled_ ? &tiles_ : nullptr; }

    void row(size_t matrix, size_t number, float* to) const;

 private:
    Tiles tiles_;
    bool tiled_ = false, whole_rows_ = true;
    FloatKind kind_ = FloatKind::f32;
    const uint8_t* floats_ = nullptr;
    size_t matrices_ = 0, rows_ = 0, columns_ = 0;

    friend class Product;
};

// Blocks of a file `[matrices, rows, columns / block]` as tiles, filled by the threads that will read them.
Tiles tiles_from(const BlockType& type, const uint8_t* source, size_t matrices, size_t rows, size_t columns,
                 Arena& arena, Pool& pool);

// Rows of floats `[count, columns]` and their int8 forms.
class Rows {
 public:
    Rows() = default;
    Rows(Frame& frame, size_t count, size_t columns, unsigned forms);

    float* row(size_t number) const { return floats + number * columns; }
    // Make the int8 forms of a row that is complete.
    void finish(size_t number) const;
    void finish(size_t first, size_t last) const {
        for (size_t number = first; number < last; ++number) finish(number);
    }
    Activations activations(unsigned form) const;

    size_t count = 0, columns = 0;
    float* floats = nullptr;

 private:
    struct Quantised {
        unsigned form = 0;
        int8_t* codes = nullptr;
        float* scales = nullptr;
        int32_t* sums = nullptr;
        size_t block = 0, blocks = 0;
    };
    Quantised forms_[5];
};

// One product of a phase: several of them share one division of the work.
class Product {
 public:
    Product(const Matrix& matrix, const Rows& rows, float* out, size_t stride)
        : Product(matrix, 0, rows, {rows.count}, out, stride) {}
    Product(const Matrix& matrix, size_t number, const Rows& rows, Tokens tokens, float* out, size_t stride)
        : matrix_(&matrix), number_(number), rows_(&rows), tokens_(tokens), out_(out), stride_(stride) {}

    // Units of rows that threads share out: a tile each.
    size_t units() const { return (matrix_->rows() + kTileRows - 1) / kTileRows; }
    size_t cost() const { return units() * tokens_.count; }
    void run(size_t first_unit, size_t last_unit) const;

 private:
    const Matrix* matrix_;
    size_t number_;
    const Rows* rows_;
    Tokens tokens_;
    float* out_;
    size_t stride_;
};

// This thread's share of some products, of each the part that it filled when the weights were loaded; no barrier.
void multiply(const Worker& worker, std::initializer_list<Product> products);
// The same where products are many and small: they are laid end to end and shared out as one.
void multiply_together(const Worker& worker, const Product* products, size_t count);

}  // namespace limbeck
