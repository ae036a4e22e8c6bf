// Causal self-attention with grouped queries and a cache of keys and values.
#pragma once

#include <optional>

#include "rope.hpp"
#include "step.hpp"

namespace limbeck {

struct AttentionShape {
    size_t width;            // of the hidden state
    size_t heads, kv_heads;  // each key-value head serves heads / kv_heads neighbouring query heads
    size_t head_width;
    float eps = 1e-6f;   // of the norms of queries and keys
    float scale = 0;     // of scores; 0: 1 / sqrt(head_width)
    size_t window = 0;   // positions that a token sees, itself included; 0: all
    int rope = -1;       // which of the model's ropes; -1: none
    bool gated = false;  // q rows are query and gate by head; the output is multiplied by sigmoid(gate)
    CacheKind cache = CacheKind::f16;
};

class AttentionLayer : public Sublayer {
 public:
    // Tensors `prefix` attn_q, attn_k, attn_v (or a fused attn_qkv), attn_output, and norms and biases where the file
    // has them.
    AttentionLayer(Weights& weights, const std::string& prefix, const AttentionShape& shape, const Rope* rope);

    unsigned forms() const override { return q_.form() | (k_.empty() ? 0 : k_.form() | v_.form()); }
    size_t memory(size_t tokens, int threads) const override;
    void run(Worker& worker, const Step& step, size_t slot, Frame frame, const Rows& in, float* out) const override;
    std::unique_ptr<State> state() const override;
    Load load() const override { return load_of({&q_, &k_, &v_, &out_}); }

 private:
    struct Buffers;
    void prepare_heads(const Step& step, size_t slot, size_t token, size_t head, float* row) const;
    void attend(Worker& worker, const Step& step, size_t slot, const Buffers& buffers) const;
    size_t query_width() const { return shape_.head_width * (shape_.gated ? 2 : 1); }

    AttentionShape shape_;
    const Rope* rope_;
    Matrix q_, k_, v_, out_;  // k and v are empty where q holds all three
    std::vector<float> q_bias_, k_bias_, v_bias_, out_bias_, q_norm_, k_norm_;
    bool norms_all_heads_ = false;  // the norms are of all heads as one row (OLMo 2)
};

}  // namespace limbeck
