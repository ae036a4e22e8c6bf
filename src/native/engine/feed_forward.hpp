// Gated feed-forward layers: down(act(gate x) * up x), for every token.
#pragma once

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

}  // namespace limbeck
