#include "retention.hpp"

#include <algorithm>
#include <cmath>

namespace limbeck {
namespace {

class RetentionState : public State {
 public:
    explicit RetentionState(const RetentionShape& shape) : memory(shape.heads * shape.key_width * shape.value_width) {}

    std::unique_ptr<State> copy() const override { return std::make_unique<RetentionState>(*this); }
    bool can_truncate() const override { return false; }
    void truncate(size_t) override { std::fill(memory.begin(), memory.end(), 0.0f); }
    size_t bytes() const override { return memory.size() * sizeof(float); }

    std::vector<float> memory;  // [heads, keys, values]
};

}  // namespace

struct RetentionLayer::Buffers {
    Buffers(const RetentionLayer& layer, Frame& frame, size_t tokens) {
        q = frame.take<float>(tokens * layer.shape_.keys());
        k = frame.take<float>(tokens * layer.shape_.keys());
        v = frame.take<float>(tokens * layer.shape_.values());
        g = frame.take<float>(tokens * layer.shape_.values());
        out = Rows(frame, tokens, layer.shape_.values(), layer.o_.form());
    }
    float *q, *k, *v, *g;
    Rows out;
};

RetentionLayer::RetentionLayer(Weights& weights, const std::string& prefix, const RetentionShape& shape,
                               const Rope* rope)
    : shape_(shape), rope_(rope) {
    q_ = weights.matrix(prefix + "retention_q.weight", shape.keys(), shape.width);
    k_ = weights.matrix(prefix + "retention_k.weight", shape.keys(), shape.width);
    v_ = weights.matrix(prefix + "retention_v.weight", shape.values(), shape.width);
    g_ = weights.matrix(prefix + "retention_g.weight", shape.values(), shape.width);
    o_ = weights.matrix(prefix + "retention_o.weight", shape.width, shape.values());
}

size_t RetentionLayer::memory(size_t tokens, int) const {
    Frame counting;
    Buffers(*this, counting, tokens);
    return counting.used();
}

std::unique_ptr<State> RetentionLayer::state() const { return std::make_unique<RetentionState>(shape_); }

// All tokens of all spans for one head.
void RetentionLayer::recur(const Step& step, size_t slot, size_t head, const Buffers& buffers) const {
    const size_t keys = shape_.key_width, values = shape_.value_width;
    const float decay = 1.0f - std::exp2(-5.0f - float(head)), scale = 1.0f / std::sqrt(float(keys));
    std::vector<float> y(values);
    for (const Span& span : step.spans) {
        float* memory = static_cast<RetentionState&>(*(*span.states)[slot]).memory.data() + head * keys * values;
        for (size_t token = span.first; token < span.first + span.count; ++token) {
            float *q = buffers.q + token * shape_.keys() + head * keys,
                  *k = buffers.k + token * shape_.keys() + head * keys;
            const float* angles = step.rotations[0] + token * rope_->dimensions();
            rope_->turn(angles, q);
            rope_->turn(angles, k);
            for (size_t i = 0; i < keys; ++i) k[i] *= scale;
            const size_t place = token * shape_.values() + head * values;
            kernels().retention_step(memory, keys, values, q, k, buffers.v + place, decay, y.data());
            kernels().rms_norm(y.data(), nullptr, shape_.eps, y.data(), values);
            kernels().silu_times(buffers.g + place, y.data(), buffers.out.row(token) + head * values, values);
        }
    }
}

void RetentionLayer::run(Worker& worker, const Step& step, size_t slot, Frame frame, const Rows& in, float* out) const {
    const Buffers buffers(*this, frame, step.tokens);
    multiply(worker, {Product(q_, in, buffers.q, shape_.keys()), Product(k_, in, buffers.k, shape_.keys()),
                      Product(v_, in, buffers.v, shape_.values()), Product(g_, in, buffers.g, shape_.values())});
    worker.barrier();
    const auto [first_head, last_head] = worker.part(shape_.heads);
    for (size_t head = first_head; head < last_head; ++head) recur(step, slot, head, buffers);
    worker.barrier();
    const auto [first, last] = worker.part(step.tokens);
    buffers.out.finish(first, last);
    worker.barrier();
    multiply(worker, {Product(o_, buffers.out, out, shape_.width)});
    worker.barrier();
}

}  // namespace limbeck
