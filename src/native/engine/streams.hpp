// Hyper-connections (mHC-lite, arXiv 2601.05732): several residual streams, mixed around each sublayer.
//
//     pre = sigmoid(a1 x W_p + b_p), post = 2 sigmoid(a2 x W_q + b_q), x = RMSNorm of all streams as one row
//     R = sum over k of softmax(a3 x W_r + b_r)_k P_k, over all permutations P_k of the streams, in lexicographic order
//     X <- R X + post (x) sublayer(pre X)
#pragma once

#include "weights.hpp"

namespace limbeck {

class Connection {
 public:
    // Tensors `name`.bias and, where mixing depends on the token, `name`.weight and `name`.alpha.
    Connection(Weights& weights, const std::string& name, size_t streams, size_t width, float eps);

    // Coefficients of one token's streams `[N, D]`: pre `[N]`, post `[N]`, R `[N, N]`, and what the sublayer gets,
    // `[D]`.
    void read(const float* streams, float* coefficients, float* input) const;
    // The streams after the sublayer wrote `output`.
    void write(const float* coefficients, const float* output, float* streams) const;

    static size_t coefficients(size_t streams) { return streams * (streams + 2); }

 private:
    size_t streams_, width_;
    float eps_;
    std::vector<float> bias_, weight_, alpha_;
    std::vector<std::vector<size_t>> orders_;
};

}  // namespace limbeck
