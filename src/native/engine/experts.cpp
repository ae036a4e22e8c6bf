#include "experts.hpp"

#include <algorithm>
#include <cmath>

namespace limbeck {

struct Experts::Buffers {
    Buffers(const Experts& layer, Frame& frame, size_t tokens, int threads) {
        const ExpertShape& shape = layer.shape_;
        const size_t pairs = tokens * shape.used, width = layer.latent_ ? layer.latent_ : shape.width;
        logits = frame.take<float>(tokens * shape.experts);
        weights = frame.take<float>(pairs);
        chosen = frame.take<int32_t>(pairs);
        starts = frame.take<int32_t>(shape.experts + 1);
        tokens_of = frame.take<int32_t>(pairs);
        pairs_of = frame.take<int32_t>(pairs);
        written = frame.take<float>(pairs * width);
        own_memory = frame.take<uint8_t>(layer.own_->memory(pairs));
        if (layer.latent_) {
            latent = Rows(frame, tokens, width, layer.own_->forms());
            joined = Rows(frame, tokens, width, layer.latent_out_.form());
        }
        if (layer.shared_) {
            shared = frame.take<float>(tokens * shape.width);
            shared_memory = frame.take<uint8_t>(layer.shared_->memory(tokens, threads));
        }
    }
    float *logits, *weights, *written, *shared = nullptr;
    int32_t *chosen, *starts, *tokens_of, *pairs_of;
    Rows latent, joined;
    uint8_t *own_memory, *shared_memory = nullptr;
};

Experts::Experts(Weights& weights, const std::string& prefix, const ExpertShape& shape) : shape_(shape) {
    const std::string latent_in = prefix + "ffn_latent_in.weight";
    if (weights.has(latent_in)) {
        latent_ = size_t(weights.file().find(latent_in)->shape.back());
        latent_in_ = weights.matrix(latent_in, latent_, shape.width);
        latent_out_ = weights.matrix(prefix + "ffn_latent_out.weight", shape.width, latent_);
    }
    router_ = weights.matrix(prefix + "ffn_gate_inp.weight", shape.experts, shape.width);
    own_ = expert_matrices(weights, prefix, shape.experts, latent_ ? latent_ : shape.width, shape.inside);
    if (shape.shared_inside == 0) return;
    shared_ =
        std::make_unique<DenseFeedForward>(weights, prefix, shape.width, shape.shared_inside, Gate::silu, "_shexp");
    shared_gate_ = weights.optional(prefix + "ffn_gate_inp_shexp.weight", shape.width);
}

unsigned Experts::forms() const {
    const unsigned own = latent_ ? latent_in_.form() : own_->forms();
    return kFloats | router_.form() | own | (shared_ ? shared_->forms() : 0);
}

size_t Experts::memory(size_t tokens, int threads) const {
    Frame counting;
    Buffers(*this, counting, tokens, threads);
    return counting.used();
}

Load Experts::load() const {
    Load load = load_of({&router_, &latent_in_, &latent_out_});
    load += own_->load(shape_.used, shape_.experts);
    if (shared_) load += shared_->load();
    return load;
}

// Softmax over all experts, the largest `used` of them, in the order of torch.topk.
void Experts::route(const float* logits, int32_t* chosen, float* weights) const {
    float most = -INFINITY, sum = 0, held = 0;
    for (size_t e = 0; e < shape_.experts; ++e) most = std::max(most, logits[e]);
    for (size_t e = 0; e < shape_.experts; ++e) sum += std::exp(logits[e] - most);
    for (size_t place = 0; place < shape_.used; ++place) {
        int32_t best = -1;
        for (size_t e = 0; e < shape_.experts; ++e) {
            const bool taken = std::find(chosen, chosen + place, int32_t(e)) != chosen + place;
            if (!taken && (best < 0 || logits[e] > logits[best])) best = int32_t(e);
        }
        chosen[place] = best;
        weights[place] = std::exp(logits[best] - most) / sum;
        held += weights[place];
    }
    const float scale = shape_.scale / (shape_.normalised ? held : 1.0f);
    for (size_t place = 0; place < shape_.used; ++place) weights[place] *= scale;
}

void Experts::sort_pairs(const Buffers& buffers, size_t tokens) const {
    const size_t pairs = tokens * shape_.used;
    std::fill(buffers.starts, buffers.starts + shape_.experts + 1, 0);
    for (size_t p = 0; p < pairs; ++p) ++buffers.starts[buffers.chosen[p] + 1];
    for (size_t e = 0; e < shape_.experts; ++e) buffers.starts[e + 1] += buffers.starts[e];
    std::vector<int32_t> next(buffers.starts, buffers.starts + shape_.experts);
    for (size_t p = 0; p < pairs; ++p) {
        const size_t place = size_t(next[size_t(buffers.chosen[p])]++);
        buffers.tokens_of[place] = int32_t(p / shape_.used);
        buffers.pairs_of[place] = int32_t(p);
    }
}

void Experts::run(Worker& worker, const Step& step, size_t slot, Frame frame, const Rows& in, float* out) const {
    const Buffers buffers(*this, frame, step.tokens, worker.count());
    const size_t used = shape_.used, width = latent_ ? latent_ : shape_.width;
    const auto [first, last] = worker.part(step.tokens);
    const Product chooses(router_, in, buffers.logits, shape_.experts);
    if (latent_) {
        multiply(worker, {chooses, Product(latent_in_, in, buffers.latent.floats, width)});
    } else {
        multiply(worker, {chooses});
    }
    worker.barrier();
    for (size_t token = first; token < last; ++token) {
        route(buffers.logits + token * shape_.experts, buffers.chosen + token * used, buffers.weights + token * used);
    }
    if (latent_) buffers.latent.finish(first, last);
    worker.barrier();
    if (worker.index() == 0) sort_pairs(buffers, step.tokens);
    worker.barrier();
    const Pairs pairs{step.tokens * used, used, shape_.experts, buffers.starts, buffers.tokens_of, buffers.pairs_of};
    own_->run(worker, pairs, Frame(buffers.own_memory), latent_ ? buffers.latent : in, buffers.written);
    for (size_t token = first; token < last; ++token) {
        float* to = latent_ ? buffers.joined.row(token) : out + token * width;
        std::fill(to, to + width, 0.0f);
        for (size_t p = token * used; p < (token + 1) * used; ++p) {
            kernels().add_scaled(to, buffers.written + p * width, buffers.weights[p], width);
        }
    }
    if (latent_) {
        buffers.joined.finish(first, last);
        worker.barrier();
        multiply(worker, {Product(latent_out_, buffers.joined, out, shape_.width)});
    }
    worker.barrier();
    if (!shared_) return;
    shared_->run(worker, step, slot, Frame(buffers.shared_memory), in, buffers.shared);
    for (size_t token = first; token < last; ++token) {
        float gate = 1.0f;
        if (!shared_gate_.empty()) {
            gate = 1.0f / (1.0f + std::exp(-kernels().dot(in.row(token), shared_gate_.data(), shape_.width)));
        }
        kernels().add_scaled(out + token * shape_.width, buffers.shared + token * shape_.width, gate, shape_.width);
    }
    worker.barrier();
}

}  // namespace limbeck
