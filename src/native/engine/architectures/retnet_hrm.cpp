// RetNet-HRM: two stacks of retention layers that take turns on two states of each token (HRM, arXiv 2506.21734).
//
//     x = scale E[token], z_H = x, z_L = 0
//     in each segment, H times: L times z_L = f_L(z_L + z_H + x), then z_H = f_H(z_H + z_L);   logits = W z_H
#include <algorithm>
#include <cmath>

#include "architectures.hpp"
#include "retention.hpp"

namespace limbeck {
namespace {

struct HrmShape {
    size_t width, inside, vocabulary, layers, high_cycles, low_cycles, segments;
    float eps, scale;
    RetentionShape retention;

    size_t applications() const { return segments * high_cycles * (low_cycles + 1); }
};

struct HrmLayer {
    HrmLayer(Weights& weights, const std::string& prefix, const HrmShape& shape, const Rope* rope)
        : retention_norm(weights.vector(prefix + "retention_norm.weight", shape.width)),
          ffn_norm(weights.vector(prefix + "ffn_norm.weight", shape.width)),
          retention(weights, prefix, shape.retention, rope),
          feed_forward(weights, prefix, shape.width, shape.inside, Gate::silu) {}

    std::vector<float> retention_norm, ffn_norm;
    RetentionLayer retention;
    DenseFeedForward feed_forward;
};

struct HrmStack {
    HrmStack(Weights& weights, const std::string& name, const HrmShape& shape, const Rope* rope) {
        for (size_t layer = 0; layer < shape.layers; ++layer) {
            layers.push_back(
                std::make_unique<HrmLayer>(weights, name + "." + std::to_string(layer) + ".", shape, rope));
        }
        norm = weights.vector(name + ".norm.weight", shape.width);
    }
    std::vector<std::unique_ptr<HrmLayer>> layers;
    std::vector<float> norm;
};

class RetNetHrm : public Model {
 public:
    RetNetHrm(Weights& weights, const std::string& architecture, const HrmShape& shape) : shape_(shape) {
        info.architecture = architecture;
        info.vocabulary = shape.vocabulary;
        info.width = shape.width;
        info.context = weights.file().whole(architecture + ".context_length", 0);
        info.parameters = parameters_of(weights.file());
        const size_t half = shape.retention.key_width / 2;
        rope_.neighbours = true;
        for (size_t i = 0; i < half; ++i)
            rope_.frequencies.push_back(float(std::pow(10000.0, half > 1 ? -double(i) / double(half - 1) : 0.0)));
        high_ = std::make_unique<HrmStack>(weights, "high", shape, &rope_);
        if (shape.low_cycles > 0) low_ = std::make_unique<HrmStack>(weights, "low", shape, &rope_);
        if (weights.has("output.weight")) {
            head_ = weights.matrix("output.weight", shape.vocabulary, shape.width);
            rows_ = Weights::Table(weights, "token_embd.weight", shape.vocabulary, shape.width);
        } else {
            table_ = weights.matrix("token_embd.weight", shape.vocabulary, shape.width);
        }
    }

    States new_states() const override {
        States states;
        for (size_t i = 0; i < shape_.applications() * shape_.layers; ++i)
            states.push_back(high_->layers[0]->retention.state());
        return states;
    }

    size_t memory(size_t tokens, int threads) const override {
        Frame counting;
        Buffers(*this, counting, tokens, threads);
        return counting.used();
    }

    Load load() const override {
        Load once;
        for (const HrmStack* stack : {high_.get(), low_.get()}) {
            if (stack == nullptr) continue;
            const size_t times = shape_.segments * shape_.high_cycles * (stack == low_.get() ? shape_.low_cycles : 1);
            for (size_t time = 0; time < times; ++time) {
                for (const auto& layer : stack->layers) {
                    once += layer->retention.load();
                    once += layer->feed_forward.load();
                }
            }
        }
        once += load_of({&head()});
        return once;
    }

    void run(Worker& worker, Step& step, uint8_t* memory, const std::vector<size_t>& rows,
             float* logits) const override {
        Frame frame(memory);
        const Buffers buffers(*this, frame, step.tokens, worker.count());
        const size_t width = shape_.width;
        const auto [first, last] = worker.part(step.tokens);
        if (worker.index() == 0) step.rotations = {buffers.angles};
        for (size_t token = first; token < last; ++token) {
            float* x = buffers.x + token * width;
            if (head_.empty())
                table_.row(0, size_t(step.ids[token]), x);
            else
                rows_.row(size_t(step.ids[token]), x);
            for (size_t d = 0; d < width; ++d) x[d] *= shape_.scale;
            std::copy(x, x + width, buffers.high + token * width);
            std::fill(buffers.low + token * width, buffers.low + (token + 1) * width, 0.0f);
            angles(step.positions[token], buffers.angles + token * rope_.dimensions());
        }
        size_t slot = 0;
        for (size_t cycle = 0; cycle < shape_.segments * shape_.high_cycles; ++cycle) {
            for (size_t low = 0; low < shape_.low_cycles; ++low) {
                apply(worker, step, *low_, slot, buffers, {buffers.low, buffers.high, buffers.x}, buffers.low);
                slot += shape_.layers;
            }
            apply(worker, step, *high_, slot, buffers, {buffers.high, buffers.low}, buffers.high);
            slot += shape_.layers;
        }
        worker.barrier();
        const auto [first_row, last_row] = worker.part(rows.size());
        for (size_t i = first_row; i < last_row; ++i) {
            std::copy(buffers.high + rows[i] * width, buffers.high + (rows[i] + 1) * width, buffers.last.row(i));
            buffers.last.finish(i);
        }
        worker.barrier();
        multiply(worker, {Product(head(), 0, buffers.last, Tokens{rows.size()}, logits, shape_.vocabulary)});
        worker.barrier();
    }

 private:
    struct Buffers {
        Buffers(const RetNetHrm& model, Frame& frame, size_t tokens, int threads) {
            const size_t width = model.shape_.width;
            for (float** each : {&x, &high, &low, &hidden, &written}) *each = frame.take<float>(tokens * width);
            angles = frame.take<float>(tokens * model.rope_.dimensions());
            unsigned forms = 0;
            size_t most = 0;
            for (const HrmStack* stack : {model.high_.get(), model.low_.get()}) {
                if (stack == nullptr) continue;
                for (const auto& layer : stack->layers) {
                    forms |= layer->retention.forms() | layer->feed_forward.forms();
                    most = std::max(
                        {most, layer->retention.memory(tokens, threads), layer->feed_forward.memory(tokens, threads)});
                }
            }
            normed = Rows(frame, tokens, width, forms);
            last = Rows(frame, tokens, width, model.head().form());
            work = frame.take<uint8_t>(most);
        }
        float *x, *high, *low, *hidden, *written, *angles;
        Rows normed, last;
        uint8_t* work;
    };

    const Matrix& head() const { return head_.empty() ? table_ : head_; }

    // In double precision: a float's angle at position 60,000 is off by 0.004.
    void angles(int32_t position, float* to) const {
        const size_t half = rope_.frequencies.size();
        for (size_t i = 0; i < half; ++i) {
            const double angle = double(position) * std::pow(10000.0, half > 1 ? -double(i) / double(half - 1) : 0.0);
            to[i] = float(std::cos(angle));
            to[half + i] = float(std::sin(angle));
        }
    }

    // to = stack(sum of `from`); tokens are each thread's own, so `to` may be one of `from`.
    void apply(Worker& worker, const Step& step, const HrmStack& stack, size_t slot, const Buffers& buffers,
               std::initializer_list<const float*> from, float* to) const {
        const size_t width = shape_.width;
        const auto [first, last] = worker.part(step.tokens);
        for (size_t i = first * width; i < last * width; ++i) {
            float sum = 0;
            for (const float* part : from) sum += part[i];
            buffers.hidden[i] = sum;
        }
        const auto branch = [&](const Sublayer& sublayer, const std::vector<float>& norm, size_t at) {
            for (size_t token = first; token < last; ++token) {
                kernels().rms_norm(buffers.hidden + token * width, norm.data(), shape_.eps, buffers.normed.row(token),
                                   width);
                buffers.normed.finish(token);
            }
            worker.barrier();
            sublayer.run(worker, step, at, Frame(buffers.work), buffers.normed, buffers.written);
            kernels().add_scaled(buffers.hidden + first * width, buffers.written + first * width, 1.0f,
                                 (last - first) * width);
        };
        for (size_t number = 0; number < stack.layers.size(); ++number) {
            const HrmLayer& layer = *stack.layers[number];
            branch(layer.retention, layer.retention_norm, slot + number);
            branch(layer.feed_forward, layer.ffn_norm, slot + number);
        }
        for (size_t token = first; token < last; ++token) {
            kernels().rms_norm(buffers.hidden + token * width, stack.norm.data(), shape_.eps, to + token * width,
                               width);
        }
    }

    HrmShape shape_;
    Rope rope_;
    std::unique_ptr<HrmStack> high_, low_;
    Matrix table_, head_;
    Weights::Table rows_;
};

}  // namespace

std::unique_ptr<Model> build_retnet_hrm(Weights& weights, const std::string& architecture, const ModelOptions&) {
    const GgufFile& file = weights.file();
    const std::string key = architecture + ".";
    const TensorInfo* table = file.find("token_embd.weight");
    if (table == nullptr || table->shape.size() != 2)
        throw FileError(file.path() + " has no tensor token_embd.weight, which its architecture needs.");
    HrmShape shape{};
    shape.width = file.whole(key + "embedding_length");
    shape.vocabulary = table->shape[1];
    shape.inside = file.whole(key + "feed_forward_length");
    shape.layers = file.whole(key + "block_count");
    shape.high_cycles = file.whole(key + "hrm.high_cycles");
    shape.low_cycles = file.whole(key + "hrm.low_cycles");
    shape.segments = file.whole(key + "hrm.segments");
    shape.eps = float(file.real(key + "attention.layer_norm_rms_epsilon"));
    shape.scale = float(file.real(key + "embedding_scale"));
    const size_t heads = file.whole(key + "attention.head_count"),
                 expansion = file.whole(key + "retention.value_expansion");
    const size_t most = file.mapped().size() * 8;
    const bool sizes = shape.width > 0 && shape.width <= most && heads > 0 && shape.width % heads == 0 &&
                       shape.width / heads % 2 == 0 && expansion > 0 && expansion <= 64 && shape.inside > 0 &&
                       shape.inside <= most;
    const bool counts = shape.layers > 0 && shape.layers <= file.tensors().size() && shape.high_cycles > 0 &&
                        shape.high_cycles <= 256 && shape.low_cycles <= 256 && shape.segments > 0 &&
                        shape.segments <= 256;
    if (!sizes || !counts) {
        throw FileError(file.path() + " has a RetNet-HRM of width " + std::to_string(shape.width) + " with " +
                        std::to_string(heads) + " heads, " + std::to_string(shape.layers) + " layers and " +
                        std::to_string(shape.high_cycles) + " cycles; these do not go together.");
    }
    const size_t keys = shape.width / heads;
    shape.retention = {shape.width, heads, keys, keys * expansion, shape.eps};
    const size_t states = shape.applications() * shape.layers;
    const size_t bytes = states * shape.retention.heads * keys * shape.retention.value_width * sizeof(float);
    if (states > 4096 || bytes > 2 * file.mapped().size() + (size_t(64) << 20)) {
        throw FileError(file.path() + " has " + std::to_string(states) + " retention states of " +
                        std::to_string(bytes) + " bytes in all, out of proportion to its weights.");
    }
    return std::make_unique<RetNetHrm>(weights, architecture, shape);
}

}  // namespace limbeck
