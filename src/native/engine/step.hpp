// What one pass through a model works on: tokens of several sequences side by side, and what each sequence remembers.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "linear.hpp"
#include "pool.hpp"

namespace limbeck {

// What one sublayer remembers of one sequence.
class State {
 public:
    virtual ~State() = default;
    virtual std::unique_ptr<State> copy() const = 0;
    // Make room for positions up to `length`, before a step that writes them.
    virtual void reserve(size_t length) { (void)length; }
    // Forget all positions from `length` on. A recurrence can only forget everything.
    virtual bool can_truncate() const = 0;
    virtual void truncate(size_t length) = 0;
    virtual size_t bytes() const = 0;
};

using States = std::vector<std::unique_ptr<State>>;

// Neighbouring tokens of a step that continue one sequence.
struct Span {
    size_t first, count;  // tokens of the step
    size_t start;         // position of the first one in its sequence
    States* states;
};

struct Step {
    size_t tokens = 0;
    const int32_t* ids = nullptr;    // [tokens]
    std::vector<int32_t> positions;  // [tokens]
    std::vector<Span> spans;
    std::vector<const float*> rotations;  // of each Rope of the model: [tokens, 2, dimensions / 2], cosines then sines
};

// What a token costs: bytes of weights that it reads, and weights that it is multiplied with.
struct Load {
    size_t bytes = 0, weights = 0;

    Load& operator+=(const Load& other) {
        bytes += other.bytes;
        weights += other.weights;
        return *this;
    }
};
inline Load load_of(std::initializer_list<const Matrix*> matrices, size_t used = 1, size_t of = 1) {
    Load load;
    for (const Matrix* matrix : matrices) {
        load.bytes += matrix->bytes() * used / of;
        load.weights += matrix->matrices() * matrix->rows() * matrix->columns() * used / of;
    }
    return load;
}

// A part of a model: rows of the hidden state in, rows of the same width out. Every thread of the pool calls `run` with
// the same arguments; it ends with a barrier. `frame` is memory that all threads share; each lays it out alike.
class Sublayer {
 public:
    virtual ~Sublayer() = default;
    virtual unsigned forms() const = 0;  // of its input
    virtual size_t memory(size_t tokens, int threads) const = 0;
    virtual void run(Worker& worker, const Step& step, size_t slot, Frame frame, const Rows& in, float* out) const = 0;
    virtual std::unique_ptr<State> state() const { return nullptr; }
    virtual Load load() const = 0;  // of one token
};

}  // namespace limbeck
