// Tensors of a file as matrices and vectors of the expected shapes.
#pragma once

#include <memory>
#include <set>
#include <string>
#include <vector>

#include "gguf.hpp"
#include "linear.hpp"

namespace limbeck {

// Loads what an architecture asks for; whatever the file has and nobody asked for is an error at the end.
class Weights {
 public:
    Weights(const GgufFile& file, Pool& pool)
        : file_(file), pool_(pool), whole_rows_(file.truth("limbeck.activations_per_token", false)) {}

    const GgufFile& file() const { return file_; }
    bool has(const std::string& name) const { return file_.find(name) != nullptr; }

    // Throws FileError where the tensor is missing, of another shape or of a type that is not read.
    Matrix matrix(const std::string& name, size_t rows, size_t columns) { return matrices(name, 1, rows, columns); }
    Matrix matrices(const std::string& name, size_t count, size_t rows, size_t columns);
    std::vector<float> vector(const std::string& name, size_t n);
    std::vector<float> floats(const std::string& name, const std::vector<size_t>& shape);  // innermost first
    std::vector<float> optional(const std::string& name, size_t n) {
        return has(name) ? vector(name, n) : std::vector<float>();
    }
    // Rows of an embedding that are read one by one: nothing of it is unpacked.
    class Table;

    void check_all_used() const;

 private:
    const TensorInfo& shaped(const std::string& name, const std::vector<size_t>& shape);

    const GgufFile& file_;
    Pool& pool_;
    Arena arena_;
    bool whole_rows_;  // the file's model was trained with activations that have one scale a token
    std::set<std::string> used_;
    friend class Table;
};

// Rows of a tensor as the file holds them.
class Weights::Table {
 public:
    Table() = default;
    Table(Weights& weights, const std::string& name, size_t rows, size_t columns);
    void row(size_t number, float* to) const;

 private:
    const uint8_t* data_ = nullptr;
    uint32_t type_ = 0;
    size_t row_bytes_ = 0, columns_ = 0;
};

}  // namespace limbeck
