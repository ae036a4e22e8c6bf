// Gated feed-forward layers: down(act(gate x) * up x), dense and as a mixture of experts.
#pragma once

#include <atomic>

#include "step.hpp"
#include "weights.hpp"

namespace limbeck {

enum class Gate { silu, gelu };

class DenseFeedForward : public Sublayer {
 public:
    // Tensors `prefix` ffn_gate, ffn_up, ffn_down with `suffix`; ffn_up alone may hold gate and up, one above the
    // other.
    DenseFeedForward(Weights& weights, const std::string& prefix, size_t width, size_t inside, Gate gate,
                     const std::string& suffix = "");

    unsigned forms() const override { return up_.form() | (gate_.empty() ? 0 : gate_.form()); }
    size_t memory(size_t tokens, int threads) const override;
    void run(Worker& worker, const Step& step, size_t slot, Frame frame, const Rows& in, float* out) const override;
    Load load() const override { return load_of({&gate_, &up_, &down_}); }

 private:
    struct Buffers;
    size_t width_, inside_;
    Gate kind_;
    Matrix gate_, up_, down_;
};

struct ExpertShape {
    size_t width, inside;  // H, I
    size_t experts, used;
    size_t shared_inside = 0;  // of an expert that every token uses; 0: there is none
    bool normalised = true;    // the chosen experts' weights add up to 1
    float scale = 1;           // of those weights
};

// Routed experts: the softmax of a router chooses `used` of them for each token.
class Experts : public Sublayer {
 public:
    // Tensors ffn_gate_inp, ffn_gate_exps, ffn_up_exps, ffn_down_exps; of a shared expert ffn_*_shexp and
    // ffn_gate_inp_shexp; of latent experts ffn_latent_in and ffn_latent_out around them, whose width is then the
    // experts'.
    Experts(Weights& weights, const std::string& prefix, const ExpertShape& shape);

    unsigned forms() const override;
    size_t memory(size_t tokens, int threads) const override;
    void run(Worker& worker, const Step& step, size_t slot, Frame frame, const Rows& in, float* out) const override;
    Load load() const override;

 private:
    struct Buffers;
    void route(const float* logits, int32_t* chosen, float* weights) const;

    ExpertShape shape_;
    size_t latent_ = 0;  // width between ffn_latent_in and ffn_latent_out; 0: experts read the hidden state itself
    Matrix router_, gate_, up_, down_, latent_in_, latent_out_;
    std::vector<float> shared_gate_;
    std::unique_ptr<DenseFeedForward> shared_;
};

}  // namespace limbeck
