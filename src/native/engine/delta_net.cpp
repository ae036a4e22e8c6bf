#include "delta_net.hpp"

#include <algorithm>
#include <cmath>

namespace limbeck {
namespace {

class DeltaState : public State {
 public:
    explicit DeltaState(const DeltaNetShape& shape)
        : past((shape.taps - 1) * shape.channels()), memory(shape.value_heads * shape.key_width * shape.value_width) {}

    std::unique_ptr<State> copy() const override { return std::make_unique<DeltaState>(*this); }
    bool can_truncate() const override { return false; }
    void truncate(size_t) override {
        std::fill(past.begin(), past.end(), 0.0f);
        std::fill(memory.begin(), memory.end(), 0.0f);
    }
    size_t bytes() const override { return (past.size() + memory.size()) * sizeof(float); }

    std::vector<float> past;    // [taps - 1, channels] the last inputs of the convolution
    std::vector<float> memory;  // [value heads, keys, values]
};

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

}  // namespace

struct DeltaNetLayer::Buffers {
    Buffers(const DeltaNetLayer& layer, Frame& frame, size_t tokens) {
        const DeltaNetShape& shape = layer.shape_;
        projected = frame.take<float>(tokens * shape.channels());
        mixed = frame.take<float>(tokens * shape.channels());
        gate = frame.take<float>(tokens * shape.values());
        rates = frame.take<float>(tokens * 2 * shape.value_heads);
        out = Rows(frame, tokens, shape.values(), layer.out_.form());
    }
    float *projected, *mixed, *gate, *rates;
    Rows out;
};

DeltaNetLayer::DeltaNetLayer(Weights& weights, const std::string& prefix, const DeltaNetShape& shape) : shape_(shape) {
    qkv_ = weights.matrix(prefix + "attn_qkv.weight", shape.channels(), shape.width);
    gate_ = weights.matrix(prefix + "attn_gate.weight", shape.values(), shape.width);
    rates_ = weights.matrix(prefix + "ssm_ba.weight", 2 * shape.value_heads, shape.width);
    out_ = weights.matrix(prefix + "ssm_out.weight", shape.width, shape.values());
    taps_ = weights.floats(prefix + "ssm_conv1d.weight", {shape.taps, shape.channels()});
    bias_ = weights.vector(prefix + "ssm_dt.bias", shape.value_heads);
    decay_ = weights.vector(prefix + "ssm_a", shape.value_heads);
    norm_ = weights.vector(prefix + "ssm_norm.weight", shape.value_width);
}

size_t DeltaNetLayer::memory(size_t tokens, int) const {
    Frame counting;
    Buffers(*this, counting, tokens);
    return counting.used();
}

std::unique_ptr<State> DeltaNetLayer::state() const { return std::make_unique<DeltaState>(shape_); }

// silu of a causal convolution over each channel's own past.
void DeltaNetLayer::convolve(Worker& worker, const Step& step, size_t slot, const Buffers& buffers) const {
    const size_t channels = shape_.channels(), before = shape_.taps - 1;
    const auto [first, last] = worker.part(channels);
    for (const Span& span : step.spans) {
        std::vector<float>& past = static_cast<DeltaState&>(*(*span.states)[slot]).past;
        // Input number i of the span, or of what came before it.
        const auto input = [&](ptrdiff_t i) {
            return i < 0 ? past.data() + size_t(i + ptrdiff_t(before)) * channels
                         : buffers.projected + (span.first + size_t(i)) * channels;
        };
        for (size_t t = 0; t < span.count; ++t) {
            float* to = buffers.mixed + (span.first + t) * channels;
            for (size_t c = first; c < last; ++c) {
                float sum = 0;
                for (size_t tap = 0; tap < shape_.taps; ++tap)
                    sum += taps_[c * shape_.taps + tap] * input(ptrdiff_t(t + tap) - ptrdiff_t(before))[c];
                to[c] = sum * sigmoid(sum);
            }
        }
        for (size_t i = 0; i < before; ++i) {  // from the oldest on: what is read here is never one that was written
            const float* from = input(ptrdiff_t(span.count + i) - ptrdiff_t(before));
            std::copy(from + first, from + last, past.data() + i * channels + first);
        }
    }
}

// All tokens of all spans for one value head.
void DeltaNetLayer::recur(const Step& step, size_t slot, size_t head, const Buffers& buffers) const {
    const size_t shared = shape_.value_heads / shape_.key_heads, key_head = head / shared, keys = shape_.key_width;
    std::vector<float> q(keys), k(keys), y(shape_.value_width);
    const auto normalised = [keys](const float* from, float scale, std::vector<float>& to) {
        const float length = 1.0f / std::sqrt(kernels().dot(from, from, keys) + 1e-6f) * scale;
        for (size_t i = 0; i < keys; ++i) to[i] = from[i] * length;
    };
    for (const Span& span : step.spans) {
        float* memory =
            static_cast<DeltaState&>(*(*span.states)[slot]).memory.data() + head * keys * shape_.value_width;
        for (size_t token = span.first; token < span.first + span.count; ++token) {
            const float* row = buffers.mixed + token * shape_.channels();
            normalised(row + key_head * keys, 1.0f / std::sqrt(float(keys)), q);
            normalised(row + (shape_.key_heads + key_head) * keys, 1.0f, k);
            const float* v = row + 2 * shape_.key_heads * keys + head * shape_.value_width;
            // Rates lie by key head: the strengths of its value heads, then their decays.
            const float* rates = buffers.rates + token * 2 * shape_.value_heads + key_head * 2 * shared;
            const float beta = sigmoid(rates[head % shared]);
            const float decay = std::exp(decay_[head] * softplus(rates[shared + head % shared] + bias_[head]));
            kernels().delta_step(memory, keys, shape_.value_width, q.data(), k.data(), v, decay, beta, y.data());
            float* to = buffers.out.row(token) + head * shape_.value_width;
            kernels().rms_norm(y.data(), norm_.data(), shape_.eps, y.data(), shape_.value_width);
            kernels().silu_times(buffers.gate + token * shape_.values() + head * shape_.value_width, y.data(), to,
                                 shape_.value_width);
        }
    }
}

void DeltaNetLayer::run(Worker& worker, const Step& step, size_t slot, Frame frame, const Rows& in, float* out) const {
    const Buffers buffers(*this, frame, step.tokens);
    multiply(worker, {Product(qkv_, in, buffers.projected, shape_.channels()),
                      Product(gate_, in, buffers.gate, shape_.values()),
                      Product(rates_, in, buffers.rates, 2 * shape_.value_heads)});
    worker.barrier();
    convolve(worker, step, slot, buffers);
    worker.barrier();
    const auto [first_head, last_head] = worker.part(shape_.value_heads);
    for (size_t head = first_head; head < last_head; ++head) recur(step, slot, head, buffers);
    worker.barrier();
    const auto [first, last] = worker.part(step.tokens);
    buffers.out.finish(first, last);
    worker.barrier();
    multiply(worker, {Product(out_, buffers.out, out, shape_.width)});
    worker.barrier();
}

}  // namespace limbeck
