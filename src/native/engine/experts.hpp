// A mixture of experts: the softmax of a router chooses some of them for each token.
#pragma once

#include "expert_matrices.hpp"
#include "feed_forward.hpp"

namespace limbeck {

struct ExpertShape {
    size_t width, inside;  // H, I
    size_t experts, used;
    size_t shared_inside = 0;  // of an expert that every token uses; 0: there is none
    bool normalised = true;    // the chosen experts' weights add up to 1
    float scale = 1;           // of those weights
};

class Experts : public Sublayer {
 public:
    // Tensors ffn_gate_inp and those of the experts; of a shared expert ffn_*_shexp and ffn_gate_inp_shexp; of latent
    // experts ffn_latent_in and ffn_latent_out around them, whose width is then the experts'.
    Experts(Weights& weights, const std::string& prefix, const ExpertShape& shape);

    unsigned forms() const override;
    size_t memory(size_t tokens, int threads) const override;
    void run(Worker& worker, const Step& step, size_t slot, Frame frame, const Rows& in, float* out) const override;
    Load load() const override;

 private:
    struct Buffers;
    void route(const float* logits, int32_t* chosen, float* weights) const;
    void sort_pairs(const Buffers& buffers, size_t tokens) const;

    ExpertShape shape_;
    size_t latent_ = 0;  // width between ffn_latent_in and ffn_latent_out; 0: experts read the hidden state itself
    Matrix router_, latent_in_, latent_out_;
    std::unique_ptr<ExpertMatrices> own_;
    std::vector<float> shared_gate_;
    std::unique_ptr<DenseFeedForward> shared_;
};

}  // namespace limbeck
