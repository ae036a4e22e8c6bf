// What a layer's experts are made of, for pairs of a token and an expert that it chose.
#pragma once

#include <memory>

#include "step.hpp"
#include "weights.hpp"

namespace limbeck {

// The pairs of a step; pair p is of token p / used. Sorted by expert, those of expert e stand at starts[e] ... starts[e
// + 1] - 1.
struct Pairs {
    size_t count, used, experts;
    const int32_t* starts;     // [experts + 1]
    const int32_t* tokens_of;  // [count] the token of a sorted pair
    const int32_t* pairs_of;   // [count] the pair's own number

    // Multiply every pair with its expert's matrices: `add(products, e, tokens)` says which, `tokens.from` are the
    // pairs' numbers or, with `by_token`, their tokens. No barrier.
    template <class Add>
    void multiply(const Worker& worker, bool by_token, Add add) const {
        std::vector<Product> products;
        for (size_t e = 0; e < experts; ++e) {
            const size_t begin = size_t(starts[e]), size = size_t(starts[e + 1]) - begin;
            if (size > 0) add(products, e, Tokens{size, (by_token ? tokens_of : pairs_of) + begin, pairs_of + begin});
        }
        multiply_together(worker, products.data(), products.size());
    }
};

class ExpertMatrices {
 public:
    virtual ~ExpertMatrices() = default;
    virtual unsigned forms() const = 0;  // of the tokens' rows
    virtual size_t memory(size_t pairs) const = 0;
    // written[pair] = expert(row of the pair's token); ends with a barrier.
    virtual void run(Worker& worker, const Pairs& pairs, Frame frame, const Rows& rows, float* written) const = 0;
    virtual Load load(size_t used, size_t experts) const = 0;  // of one token
};

// down_e(silu(gate_e x) * up_e x), or the same with factors around matrices that all experts share, where the file has
// such.
std::unique_ptr<ExpertMatrices> expert_matrices(Weights& weights, const std::string& prefix, size_t experts,
                                                size_t width, size_t inside);

}  // namespace limbeck
