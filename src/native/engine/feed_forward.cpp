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

}  // namespace limbeck
