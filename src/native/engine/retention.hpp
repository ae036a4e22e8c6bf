// Multi-scale retention (RetNet, arXiv 2307.08621): a decaying state for each head in place of attention.
//
//     S_n = g S_{n-1} + k_n v_n^T, o_n = q_n S_n, g_h = 1 - 2^(-5 - h);   y = W_o (silu(W_g x) * RMSNorm(o))
#pragma once

#include "rope.hpp"
#include "step.hpp"
#include "weights.hpp"

namespace limbeck {

struct RetentionShape {
    size_t width, heads, key_width, value_width;  // of the hidden state; of a head
    float eps;

    size_t keys() const { return heads * key_width; }
    size_t values() const { return heads * value_width; }
};

class RetentionLayer : public Sublayer {
 public:
    // Tensors `prefix` retention_q, _k, _v, _g and _o; the angles are the model's first rope.
    RetentionLayer(Weights& weights, const std::string& prefix, const RetentionShape& shape, const Rope* rope);

    unsigned forms() const override { return q_.form() | k_.form() | v_.form() | g_.form(); }
    size_t memory(size_t tokens, int threads) const override;
    void run(Worker& worker, const Step& step, size_t slot, Frame frame, const Rows& in, float* out) const override;
    std::unique_ptr<State> state() const override;
    Load load() const override { return load_of({&q_, &k_, &v_, &g_, &o_}); }

 private:
    struct Buffers;
    void recur(const Step& step, size_t slot, size_t head, const Buffers& buffers) const;

    RetentionShape shape_;
    const Rope* rope_;
    Matrix q_, k_, v_, g_, o_;
};

}  // namespace limbeck
