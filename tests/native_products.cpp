// Products of every kind of weights at this processor's level against exact integers: for processors on which the
// Python tests do not run, such as an emulated one. Built and run by `make check-arm`.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "linear.hpp"

using namespace limbeck;

namespace {

struct Case {
    const char* type;
    int low, high;  // of a code
};

// The largest distance from the exact product of int8 activations, over the size of the result.
double distance(const Case& which, size_t rows, size_t columns, size_t tokens, bool largest) {
    const BlockType& type = *block_type(std::string(which.type));
    std::mt19937 random(static_cast<unsigned>(rows * 31 + columns + tokens));
    std::uniform_int_distribution<int> codes(which.low, which.high);
    std::normal_distribution<float> normal;
    const size_t blocks = columns / size_t(type.columns);
    std::vector<uint8_t> packed(rows * blocks * size_t(type.bytes)), block(static_cast<size_t>(type.columns));
    std::vector<double> weights(rows * columns);
    for (size_t b = 0; b < rows * blocks; ++b) {
        const uint16_t scale = uint16_t(0x2400 + (largest ? 0 : b % 512));  // float16 of about 0.016
        std::vector<float> row(block.size());
        for (uint8_t& code : block) code = uint8_t((largest ? which.high : codes(random)) + type.offset);
        encode_block(type, block.data(), scale, packed.data() + b * size_t(type.bytes));
        decode_row(type, packed.data() + b * size_t(type.bytes), block.size(), row.data());
        for (size_t j = 0; j < row.size(); ++j) weights[b * block.size() + j] = double(row[j]);
    }
    Pool pool(2);
    Arena arena;
    const Matrix matrix(tiles_from(type, packed.data(), 1, rows, columns, arena, pool));
    Frame counting;
    Rows(counting, tokens, columns, matrix.form());
    const Buffer memory(counting.used());
    Frame frame(memory.data());
    const Rows x(frame, tokens, columns, matrix.form());
    for (size_t i = 0; i < tokens * columns; ++i) x.floats[i] = largest ? 127.0f : normal(random);
    std::vector<float> out(tokens * rows);
    pool.run([&](Worker& worker) {
        if (worker.index() == 0) x.finish(0, tokens);
        worker.barrier();
        multiply(worker, {Product(matrix, x, out.data(), rows)});
    });
    const Activations rounded = x.activations(matrix.form());
    const size_t width = rounded.columns / rounded.blocks;
    double most = 0, size = 0;
    for (size_t token = 0; token < tokens; ++token) {
        for (size_t row = 0; row < rows; ++row) {
            double exact = 0;
            for (size_t c = 0; c < columns; ++c) {
                const double step = double(rounded.scales[token * rounded.blocks + c / width]);
                exact += weights[row * columns + c] * double(rounded.codes[token * rounded.columns + c]) * step;
            }
            most = std::max(most, std::fabs(exact - double(out[token * rows + row])));
            size = std::max(size, std::fabs(exact));
        }
    }
    return most / size;
}

}  // namespace

int main() {
    std::printf("level %s\n", name_of(level_in_use()));
    int wrong = 0;
    for (const Case& which : {Case{"tq2_0", -1, 1}, Case{"tq1_0", -1, 1}, Case{"q2_0", -1, 2}, Case{"q4_0", -8, 7},
                              Case{"q8_0", -128, 127}}) {
        for (size_t rows : {size_t(1), size_t(37), size_t(64)}) {
            for (size_t tokens : {size_t(1), size_t(3), size_t(8), size_t(13)}) {
                const double found = distance(which, rows, 768, tokens, false);
                if (!(found < 1e-5))
                    ++wrong, std::printf("%s, %zu rows, %zu tokens: %g\n", which.type, rows, tokens, found);
            }
        }
        const double found = distance(which, 40, 14336, 2, true);  // the largest sums there are
        if (!(found < 1e-5)) ++wrong, std::printf("%s, largest: %g\n", which.type, found);
    }
    std::printf(wrong == 0 ? "all products are exact\n" : "%d products are wrong\n", wrong);
    return wrong == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
