#include "weights.hpp"

#include "half.hpp"

namespace limbeck {
namespace {

bool float_kind(uint32_t type, FloatKind& kind) {
    if (type == 0)
        kind = FloatKind::f32;
    else if (type == 1)
        kind = FloatKind::f16;
    else if (type == 30)
        kind = FloatKind::bf16;
    else
        return false;
    return true;
}

std::string written(const std::vector<uint64_t>& shape) {
    std::string text;
    for (auto size = shape.rbegin(); size != shape.rend(); ++size)
        text += (text.empty() ? "[" : ", ") + std::to_string(*size);
    return text + "]";
}

}  // namespace

const TensorInfo& Weights::shaped(const std::string& name, const std::vector<size_t>& shape) {
    const TensorInfo* found = file_.find(name);
    if (found == nullptr) throw FileError(file_.path() + " has no tensor " + name + ", which its architecture needs.");
    if (type_name(found->type) == nullptr) {
        throw FileError(file_.path() + " stores " + name + " as GGUF type " + std::to_string(found->type) +
                        ", which is not read here; f32, f16, bf16, q8_0, q4_0, q2_0, tq1_0 and tq2_0 are.");
    }
    std::vector<uint64_t> wanted(shape.begin(), shape.end()), given = found->shape;
    while (given.size() > wanted.size() && given.back() == 1) given.pop_back();
    while (given.size() < wanted.size()) given.push_back(1);
    if (given != wanted) {
        throw FileError(file_.path() + " has " + name + " of shape " + written(found->shape) +
                        "; its metadata ask for " + written(wanted) + ".");
    }
    used_.insert(name);
    return *found;
}

Matrix Weights::matrices(const std::string& name, size_t count, size_t rows, size_t columns) {
    const TensorInfo& found = count == 1 ? shaped(name, {columns, rows}) : shaped(name, {columns, rows, count});
    FloatKind kind;
    if (float_kind(found.type, kind)) return Matrix(kind, found.data, count, rows, columns);
    Matrix made(tiles_from(*block_type(int(found.type)), found.data, count, rows, columns, arena_, pool_), whole_rows_);
    file_.mapped().release(found.data, found.bytes);
    return made;
}

std::vector<float> Weights::floats(const std::string& name, const std::vector<size_t>& shape) {
    const TensorInfo& found = shaped(name, shape);
    FloatKind kind;
    if (!float_kind(found.type, kind))
        throw FileError(file_.path() + " stores " + name + " as " + type_name(found.type) +
                        "; floats are needed there.");
    size_t n = 1;
    for (size_t size : shape) n *= size;
    std::vector<float> values(n);
    kernels().to_float(kind, found.data, values.data(), n);
    return values;
}

std::vector<float> Weights::vector(const std::string& name, size_t n) { return floats(name, {n}); }

void Weights::check_all_used() const {
    for (const auto& [name, info] : file_.tensors()) {
        (void)info;
        if (used_.count(name) == 0) {
            throw FileError(file_.path() + " has a tensor " + name +
                            " that its architecture does not know here; the model would not be what it was.");
        }
    }
}

Weights::Table::Table(Weights& weights, const std::string& name, size_t rows, size_t columns) {
    const TensorInfo& found = weights.shaped(name, {columns, rows});
    data_ = found.data;
    type_ = found.type;
    columns_ = columns;
    row_bytes_ = size_t(bytes_of(type_, columns));
}

void Weights::Table::row(size_t number, float* to) const {
    const uint8_t* from = data_ + number * row_bytes_;
    FloatKind kind;
    if (float_kind(type_, kind))
        kernels().to_float(kind, from, to, columns_);
    else
        decode_row(*block_type(int(type_)), from, columns_, to);
}

}  // namespace limbeck
