// The single operations, as limbeck.kernels offers them.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

#include "bindings.hpp"
#include "blocks.hpp"
#include "linear.hpp"
#include "pool.hpp"

namespace limbeck {
namespace {

using namespace nb::literals;

const BlockType& known_type(const std::string& name) {
    const BlockType* type = block_type(name);
    if (type == nullptr)
        throw std::invalid_argument("block type '" + name +
                                    "' is not known; there are tq2_0, tq1_0, q2_0, q4_0 and q8_0.");
    return *type;
}

std::string number(size_t value) { return std::to_string(value); }

void require_blocks(const BlockType& type, size_t columns) {
    if (columns % size_t(type.columns) != 0) {
        throw std::invalid_argument("rows of " + number(columns) + " are no multiple of " + type.name + "'s block of " +
                                    number(size_t(type.columns)) + ".");
    }
}

auto pack(const std::string& name, In<int16_t, nb::ndim<2>> values, In<uint16_t, nb::ndim<2>> scales) {
    const BlockType& type = known_type(name);
    const size_t rows = values.shape(0), columns = values.shape(1);
    require_blocks(type, columns);
    const size_t blocks = columns / size_t(type.columns);
    if (scales.shape(0) != rows || scales.shape(1) != blocks) {
        throw std::invalid_argument("scales are [" + number(scales.shape(0)) + ", " + number(scales.shape(1)) +
                                    "] and the codes have [" + number(rows) + ", " + number(blocks) + "] blocks.");
    }
    const int most = type.number == 8 ? 255 : type.number == 2 ? 15 : type.number == 42 ? 3 : 2;
    std::vector<uint8_t> packed(rows * blocks * size_t(type.bytes));
    std::vector<uint8_t> codes(static_cast<size_t>(type.columns));
    for (size_t block = 0; block < rows * blocks; ++block) {
        for (size_t j = 0; j < codes.size(); ++j) {
            const int code = values.data()[block * codes.size() + j] + type.offset;
            if (code < 0 || code > most) {
                throw std::invalid_argument(std::string("a code is ") + std::to_string(code - type.offset) + " and " +
                                            type.name + " holds " + std::to_string(-type.offset) + " to " +
                                            std::to_string(most - type.offset) + ".");
            }
            codes[j] = uint8_t(code);
        }
        encode_block(type, codes.data(), scales.data()[block], packed.data() + block * size_t(type.bytes));
    }
    return to_numpy(std::move(packed), {rows, blocks * size_t(type.bytes)});
}

auto unpack(const std::string& name, In<uint8_t, nb::ndim<2>> packed) {
    const BlockType& type = known_type(name);
    if (packed.shape(1) % size_t(type.bytes) != 0) {
        throw std::invalid_argument("rows of " + number(packed.shape(1)) + " bytes are no multiple of " + type.name +
                                    "'s block of " + number(size_t(type.bytes)) + ".");
    }
    const size_t rows = packed.shape(0), columns = packed.shape(1) / size_t(type.bytes) * size_t(type.columns);
    std::vector<float> weights(rows * columns);
    for (size_t row = 0; row < rows; ++row)
        decode_row(type, packed.data() + row * packed.shape(1), columns, weights.data() + row * columns);
    return to_numpy(std::move(weights), {rows, columns});
}

auto quantise(In<float, nb::ndim<2>> x, size_t block, bool whole_row) {
    if (block == 0 || block > 65536) {
        throw std::invalid_argument("block is " + number(block) + "; it is 1 to 65536 columns that share a sum.");
    }
    const size_t rows = x.shape(0), columns = x.shape(1), blocks = (columns + block - 1) / block;
    std::vector<int8_t> codes(rows * columns);
    std::vector<float> scales(rows * blocks);
    std::vector<int32_t> sums(rows * blocks);
    for (size_t row = 0; row < rows; ++row) {
        kernels().quantise(x.data() + row * columns, columns, block, whole_row, codes.data() + row * columns,
                           scales.data() + row * blocks, sums.data() + row * blocks);
    }
    return nb::make_tuple(to_numpy(std::move(codes), {rows, columns}), to_numpy(std::move(scales), {rows, blocks}),
                          to_numpy(std::move(sums), {rows, blocks}));
}

// Weights in tiles, made from a file's blocks `[matrices, rows, bytes]` by all threads of a pool.
class PackedMatrices {
 public:
    PackedMatrices(const std::string& name, In<uint8_t, nb::ndim<3>> packed, Pool& pool) {
        const BlockType& type = known_type(name);
        const size_t matrices = packed.shape(0), rows = packed.shape(1), bytes = packed.shape(2);
        if (bytes == 0 || bytes % size_t(type.bytes) != 0 || matrices * rows == 0) {
            throw std::invalid_argument("blocks are [" + number(matrices) + ", " + number(rows) + ", " + number(bytes) +
                                        "] bytes; rows of " + type.name + " have a multiple of " +
                                        number(size_t(type.bytes)) + ", and none may be empty.");
        }
        const size_t blocks = bytes / size_t(type.bytes), columns = blocks * size_t(type.columns);
        nb::gil_scoped_release released;
        Arena arena;
        matrix_ = Matrix(tiles_from(type, packed.data(), matrices, rows, columns, arena, pool));
    }

    const Tiles& tiles() const { return *matrix_.tiles(); }

    auto multiply(In<float, nb::ndim<2>> x, Pool& pool) const {
        check(x.shape(1));
        const size_t count = x.shape(0);
        std::vector<float> out(count * matrix_.rows());
        {
            nb::gil_scoped_release released;
            std::vector<uint8_t> memory;
            const Rows rows = rows_of(x.data(), count, memory);
            pool.run([&](Worker& worker) {
                quantise_part(worker, rows);
                limbeck::multiply(worker, {Product(matrix_, rows, out.data(), matrix_.rows())});
            });
        }
        return to_numpy(std::move(out), {count, matrix_.rows()});
    }

    auto multiply_experts(In<float, nb::ndim<2>> x, In<int32_t, nb::ndim<2>> experts, Pool& pool) const {
        check(x.shape(1));
        const size_t count = x.shape(0), each = experts.shape(1);
        if (experts.shape(0) != count) {
            throw std::invalid_argument("experts are chosen for " + number(experts.shape(0)) +
                                        " tokens and there are " + number(count) + ".");
        }
        std::vector<std::vector<int32_t>> from(matrix_.matrices()), to(matrix_.matrices());
        for (size_t i = 0; i < count * each; ++i) {
            const int32_t expert = experts.data()[i];
            if (expert < 0 || size_t(expert) >= matrix_.matrices()) {
                throw std::invalid_argument("expert " + std::to_string(expert) + " was chosen and there are " +
                                            number(matrix_.matrices()) + ".");
            }
            from[size_t(expert)].push_back(int32_t(i / std::max<size_t>(each, 1)));
            to[size_t(expert)].push_back(int32_t(i));
        }
        std::vector<float> out(count * each * matrix_.rows());
        {
            nb::gil_scoped_release released;
            std::vector<uint8_t> memory;
            const Rows rows = rows_of(x.data(), count, memory);
            std::vector<Product> products;
            for (size_t e = 0; e < from.size(); ++e) {
                if (!from[e].empty())
                    products.emplace_back(matrix_, e, rows, Tokens{from[e].size(), from[e].data(), to[e].data()},
                                          out.data(), matrix_.rows());
            }
            pool.run([&](Worker& worker) {
                quantise_part(worker, rows);
                multiply_together(worker, products.data(), products.size());
            });
        }
        return to_numpy(std::move(out), {count, each, matrix_.rows()});
    }

    auto row(size_t matrix, size_t number_of_row) const {
        if (matrix >= matrix_.matrices() || number_of_row >= matrix_.rows())
            throw std::out_of_range("there is no such row.");
        std::vector<float> weights(matrix_.columns());
        matrix_.row(matrix, number_of_row, weights.data());
        return to_numpy(std::move(weights), {matrix_.columns()});
    }

    // Seconds of `repeats` products of one input, quantised each time, with each of the matrices in turn: nothing of
    // Python's is timed.
    double time(In<float, nb::ndim<2>> x, size_t repeats, Pool& pool) const {
        check(x.shape(1));
        nb::gil_scoped_release released;
        std::vector<uint8_t> memory;
        const Rows rows = rows_of(x.data(), x.shape(0), memory);
        std::vector<float> out(rows.count * matrix_.rows());
        const Tokens tokens{rows.count};
        double seconds = 0;
        pool.run([&](Worker& worker) {
            worker.barrier();
            const auto began = std::chrono::steady_clock::now();
            for (size_t repeat = 0; repeat < repeats; ++repeat) {
                quantise_part(worker, rows);
                limbeck::multiply(
                    worker, {Product(matrix_, repeat % matrix_.matrices(), rows, tokens, out.data(), matrix_.rows())});
                worker.barrier();
            }
            if (worker.index() == 0)
                seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
        });
        return seconds;
    }

 private:
    void check(size_t columns) const {
        if (columns != matrix_.columns()) {
            throw std::invalid_argument("activations have " + number(columns) + " columns and the weights " +
                                        number(matrix_.columns()) + ".");
        }
    }

    Rows rows_of(const float* x, size_t count, std::vector<uint8_t>& memory) const {
        Frame counting;
        Rows(counting, count, matrix_.columns(), matrix_.form());
        memory.resize(counting.used() + 64);
        uint8_t* base = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
        Frame frame(base);
        Rows rows(frame, count, matrix_.columns(), matrix_.form());
        std::copy(x, x + count * matrix_.columns(), rows.floats);
        return rows;
    }

    static void quantise_part(Worker& worker, const Rows& rows) {
        const auto [first, last] = worker.part(rows.count);
        rows.finish(first, last);
        worker.barrier();
    }

    Matrix matrix_;
};

}  // namespace

void bind_kernels(nb::module_& module) {
    module.def(
        "level", [] { return std::string(name_of(level_in_use())); },
        "The instructions in use: avx512, avx2 or scalar.");
    module.def("pack_blocks", &pack, "name"_a, "codes"_a, "scales"_a);
    module.def("unpack_blocks", &unpack, "name"_a, "blocks"_a);
    module.def("quantise_activations", &quantise, "x"_a, "block"_a, "whole_row"_a);
    nb::class_<Pool>(module, "Pool")
        .def(
            "__init__",
            [](Pool* self, int threads, bool pin, bool numa_aware) {
                if (threads < 0 || threads > 1024)
                    throw std::invalid_argument("threads is " + std::to_string(threads) +
                                                "; it is 0 (every processor) to 1024.");
                new (self) Pool(threads, {pin, numa_aware});
            },
            "threads"_a = 0, "pin"_a = false, "numa_aware"_a = false)
        .def_prop_ro("threads", &Pool::threads);
    nb::class_<PackedMatrices>(module, "Weights")
        .def(nb::init<const std::string&, In<uint8_t, nb::ndim<3>>, Pool&>(), "name"_a, "blocks"_a, "pool"_a)
        .def("multiply", &PackedMatrices::multiply, "x"_a, "pool"_a)
        .def("multiply_experts", &PackedMatrices::multiply_experts, "x"_a, "experts"_a, "pool"_a)
        .def("row", &PackedMatrices::row, "matrix"_a, "row"_a)
        .def("time", &PackedMatrices::time, "x"_a, "repeats"_a, "pool"_a)
        .def_prop_ro("kind", [](const PackedMatrices& self) { return std::string(self.tiles().shape().name); })
        .def_prop_ro("bytes", [](const PackedMatrices& self) { return self.tiles().bytes(); })
        .def_prop_ro("shape", [](const PackedMatrices& self) {
            return nb::make_tuple(self.tiles().matrices(), self.tiles().rows(), self.tiles().columns());
        });
}

}  // namespace limbeck
