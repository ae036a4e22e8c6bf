#include "feed_forward.hpp"

#include <algorithm>
#include <cmath>

namespace limbeck {
namespace {

void activate(Gate kind, const float* gate, const float* up, float* to, size_t n) {
    (kind == Gate::silu ? kernels().silu_times : kernels().gelu_times)(gate, up, to, n);
}

}  // namespace

struct DenseFeedForward::Buffers {
    Buffers(const DenseFeedForward& layer, Frame& frame, size_t tokens) {
        both = frame.take<float>(tokens * 2 * layer.inside_);
        inside = Rows(frame, tokens, layer.inside_, layer.down_.form());
    }
    float* both;  // [tokens, 2 I]: gate, then up
    Rows inside;
};

DenseFeedForward::DenseFeedForward(Weights& weights, const std::string& prefix, size_t width, size_t inside, Gate gate,
                                   const std::string& suffix)
    : width_(width), inside_(inside), kind_(gate) {
    const std::string end = suffix + ".weight";
    if (weights.has(prefix + "ffn_gate" + end)) {
        gate_ = weights.matrix(prefix + "ffn_gate" + end, inside, width);
        up_ = weights.matrix(prefix + "ffn_up" + end, inside, width);
    } else {
        up_ = weights.matrix(prefix + "ffn_up" + end, 2 * inside, width);
    }
    down_ = weights.matrix(prefix + "ffn_down" + end, width, inside);
}

size_t DenseFeedForward::memory(size_t tokens, int) const {
    Frame counting;
    Buffers(*this, counting, tokens);
    return counting.used();
}

void DenseFeedForward::run(Worker& worker, const Step& step, size_t, Frame frame, const Rows& in, float* out) const {
    const Buffers buffers(*this, frame, step.tokens);
    if (gate_.empty())
        multiply(worker, {Product(up_, in, buffers.both, 2 * inside_)});
    else
        multiply(worker, {Product(gate_, in, buffers.both, 2 * inside_),
                          Product(up_, in, buffers.both + inside_, 2 * inside_)});
    worker.barrier();
    const auto [first, last] = worker.part(step.tokens);
    for (size_t token = first; token < last; ++token) {
        const float* both = buffers.both + token * 2 * inside_;
        activate(kind_, both, both + inside_, buffers.inside.row(token), inside_);
        buffers.inside.finish(token);
    }
    worker.barrier();
    multiply(worker, {Product(down_, buffers.inside, out, width_)});
    worker.barrier();
}

// A pair is a token and one expert that it chose; pair p is of token p / used.
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
        both = frame.take<float>(pairs * 2 * shape.inside);
        inside = Rows(frame, pairs, shape.inside, layer.down_.form());
        written = frame.take<float>(pairs * width);
        if (layer.latent_) {
            latent = Rows(frame, tokens, width, layer.gate_.form() | layer.up_.form());
            joined = Rows(frame, tokens, width, layer.latent_out_.form());
        }
        if (layer.shared_) {
            shared = frame.take<float>(tokens * shape.width);
            shared_memory = frame.take<uint8_t>(layer.shared_->memory(tokens, threads));
        }
    }
    float *logits, *weights, *both, *written, *shared = nullptr;
    int32_t *chosen, *starts, *tokens_of, *pairs_of;
    Rows inside, latent, joined;
    uint8_t* shared_memory = nullptr;
};

Experts::Experts(Weights& weights, const std::string& prefix, const ExpertShape& shape) : shape_(shape) {
    const std::string latent_in = prefix + "ffn_latent_in.weight";
    if (weights.has(latent_in)) {
        latent_ = size_t(weights.file().find(latent_in)->shape.back());
        latent_in_ = weights.matrix(latent_in, latent_, shape.width);
        latent_out_ = weights.matrix(prefix + "ffn_latent_out.weight", shape.width, latent_);
    }
    const size_t width = latent_ ? latent_ : shape.width;
    router_ = weights.matrix(prefix + "ffn_gate_inp.weight", shape.experts, shape.width);
    gate_ = weights.matrices(prefix + "ffn_gate_exps.weight", shape.experts, shape.inside, width);
    up_ = weights.matrices(prefix + "ffn_up_exps.weight", shape.experts, shape.inside, width);
    down_ = weights.matrices(prefix + "ffn_down_exps.weight", shape.experts, width, shape.inside);
    if (shape.shared_inside == 0) return;
    shared_ =
        std::make_unique<DenseFeedForward>(weights, prefix, shape.width, shape.shared_inside, Gate::silu, "_shexp");
    shared_gate_ = weights.optional(prefix + "ffn_gate_inp_shexp.weight", shape.width);
}

unsigned Experts::forms() const {
    const unsigned own = latent_ ? latent_in_.form() : gate_.form() | up_.form();
    return kFloats | router_.form() | own | (shared_ ? shared_->forms() : 0);
}

size_t Experts::memory(size_t tokens, int threads) const {
    Frame counting;
    Buffers(*this, counting, tokens, threads);
    return counting.used();
}

Load Experts::load() const {
    Load load = load_of({&router_, &latent_in_, &latent_out_});
    load += load_of({&gate_, &up_, &down_}, shape_.used, shape_.experts);
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
    for (size_t place = 0; place < shape_.used; ++place)
        weights[place] *= shape_.scale / (shape_.normalised ? held : 1.0f);
}

void Experts::run(Worker& worker, const Step& step, size_t slot, Frame frame, const Rows& in, float* out) const {
    const Buffers buffers(*this, frame, step.tokens, worker.count());
    const size_t used = shape_.used, inside = shape_.inside, width = latent_ ? latent_ : shape_.width;
    const auto [first, last] = worker.part(step.tokens);
    if (latent_)
        multiply(worker, {Product(router_, in, buffers.logits, shape_.experts),
                          Product(latent_in_, in, buffers.latent.floats, width)});
    else
        multiply(worker, {Product(router_, in, buffers.logits, shape_.experts)});
    worker.barrier();
    for (size_t token = first; token < last; ++token) {
        route(buffers.logits + token * shape_.experts, buffers.chosen + token * used, buffers.weights + token * used);
    }
    if (latent_) buffers.latent.finish(first, last);
    worker.barrier();
    if (worker.index() == 0) {  // pairs by expert
        const size_t pairs = step.tokens * used;
        std::fill(buffers.starts, buffers.starts + shape_.experts + 1, 0);
        for (size_t p = 0; p < pairs; ++p) ++buffers.starts[buffers.chosen[p] + 1];
        for (size_t e = 0; e < shape_.experts; ++e) buffers.starts[e + 1] += buffers.starts[e];
        std::vector<int32_t> next(buffers.starts, buffers.starts + shape_.experts);
        for (size_t p = 0; p < pairs; ++p) {
            const size_t place = size_t(next[size_t(buffers.chosen[p])]++);
            buffers.tokens_of[place] = int32_t(p / used);
            buffers.pairs_of[place] = int32_t(p);
        }
    }
    worker.barrier();
    const Rows& read = latent_ ? buffers.latent : in;
    std::vector<Product> products;
    const auto for_each_expert = [&](auto add) {
        products.clear();
        for (size_t e = 0; e < shape_.experts; ++e) {
            const size_t begin = size_t(buffers.starts[e]), count = size_t(buffers.starts[e + 1]) - begin;
            if (count > 0) add(e, begin, count);
        }
        multiply(worker, products.data(), products.size());
        worker.barrier();
    };
    for_each_expert([&](size_t e, size_t begin, size_t count) {
        const Tokens tokens{count, buffers.tokens_of + begin, buffers.pairs_of + begin};
        products.emplace_back(gate_, e, read, tokens, buffers.both, 2 * inside);
        products.emplace_back(up_, e, read, tokens, buffers.both + inside, 2 * inside);
    });
    const auto [first_pair, last_pair] = worker.part(step.tokens * used);
    for (size_t p = first_pair; p < last_pair; ++p) {
        const float* both = buffers.both + p * 2 * inside;
        kernels().silu_times(both, both + inside, buffers.inside.row(p), inside);
        buffers.inside.finish(p);
    }
    worker.barrier();
    for_each_expert([&](size_t e, size_t begin, size_t count) {
        const Tokens tokens{count, buffers.pairs_of + begin, buffers.pairs_of + begin};
        products.emplace_back(down_, e, buffers.inside, tokens, buffers.written, width);
    });
    for (size_t token = first; token < last; ++token) {
        float* to = latent_ ? buffers.joined.row(token) : out + token * width;
        std::fill(to, to + width, 0.0f);
        for (size_t p = token * used; p < (token + 1) * used; ++p)
            kernels().add_scaled(to, buffers.written + p * width, buffers.weights[p], width);
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
        if (!shared_gate_.empty())
            gate = 1.0f / (1.0f + std::exp(-kernels().dot(in.row(token), shared_gate_.data(), shape_.width)));
        kernels().add_scaled(out + token * shape_.width, buffers.shared + token * shape_.width, gate, shape_.width);
    }
    worker.barrier();
}

}  // namespace limbeck
