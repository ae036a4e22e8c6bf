// Gated DeltaNet (arXiv 2412.06464) as Qwen3-Next has it: a short convolution, then a gated delta rule in place of
// attention.
#pragma once

#include "step.hpp"
#include "weights.hpp"

namespace limbeck {

struct DeltaNetShape {
    size_t width;                   // of the hidden state
    size_t key_heads, value_heads;  // each key head serves value_heads / key_heads neighbouring value heads
    size_t key_width, value_width;  // of a head
    size_t taps;                    // of the convolution
    float eps;

    size_t channels() const { return 2 * key_heads * key_width + value_heads * value_width; }
    size_t values() const { return value_heads * value_width; }
};

class DeltaNetLayer : public Sublayer {
 public:
    // Tensors `prefix` attn_qkv, attn_gate, ssm_ba, ssm_conv1d, ssm_dt, ssm_a, ssm_norm, ssm_out.
    DeltaNetLayer(Weights& weights, const std::string& prefix, const DeltaNetShape& shape);

    unsigned forms() const override { return qkv_.form() | gate_.form() | rates_.form(); }
    size_t memory(size_t tokens, int threads) const override;
    void run(Worker& worker, const Step& step, size_t slot, Frame frame, const Rows& in, float* out) const override;
    std::unique_ptr<State> state() const override;
    Load load() const override { return load_of({&qkv_, &gate_, &rates_, &out_}); }

 private:
    struct Buffers;
    void convolve(Worker& worker, const Step& step, size_t slot, const Buffers& buffers) const;
    void recur(const Step& step, size_t slot, size_t head, const Buffers& buffers) const;

    DeltaNetShape shape_;
    Matrix qkv_, gate_, rates_, out_;
    std::vector<float> taps_, bias_, decay_, norm_;
};

}  // namespace limbeck
