#include "attention.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace limbeck {
namespace {

constexpr size_t kLongestHead = 1024;
constexpr size_t kQueriesAtOnce =
    64;  // rows of one task: each block of the cache is turned into floats once for all of them

// Blocks of keys and of values, each head's in one stream; the layouts are those of `Attention`.
class KvState : public State {
 public:
    KvState(size_t heads, size_t width, CacheKind kind) : keys_(heads), values_(heads), width_(width), kind_(kind) {}

    std::unique_ptr<State> copy() const override { return std::make_unique<KvState>(*this); }
    void reserve(size_t length) override {
        const size_t bytes = (length + kAttentionBlock - 1) / kAttentionBlock * block_bytes();
        for (auto* part : {&keys_, &values_}) {
            for (std::vector<uint8_t>& head : *part) {
                if (bytes > head.capacity()) head.reserve(bytes + bytes / 2);  // long texts move their past seldom
                if (bytes > head.size()) head.resize(bytes);
            }
        }
    }
    bool can_truncate() const override { return true; }
    void truncate(size_t) override {}  // what lies behind the end is written again before it is read
    size_t bytes() const override {
        size_t sum = 0;
        for (size_t head = 0; head < keys_.size(); ++head) sum += keys_[head].capacity() + values_[head].capacity();
        return sum;
    }

    const uint8_t* keys_of(size_t head) const { return keys_[head].data(); }
    const uint8_t* values_of(size_t head) const { return values_[head].data(); }

    void write_value(size_t position, size_t head, const float* from) {
        write(values_[head], position, width_, 1, from);
    }
    void write_key(size_t position, size_t head, const float* from) {
        write(keys_[head], position, 1, kAttentionBlock, from);
    }

 private:
    size_t block_bytes() const { return cache_block_bytes(width_, kind_); }

    // `width` numbers of one position, the first at `step` times its place in the block, `stride` apart.
    void write(std::vector<uint8_t>& stream, size_t position, size_t step, size_t stride, const float* from) {
        uint8_t* block = stream.data() + position / kAttentionBlock * block_bytes();
        const size_t place = position % kAttentionBlock;
        if (kind_ == CacheKind::int8) {
            int8_t codes[kLongestHead];
            float scale;
            int32_t sum;
            kernels().quantise(from, width_, width_, true, codes, &scale, &sum);
            spread(codes, reinterpret_cast<int8_t*>(block) + place * step, stride);
            std::memcpy(block + kAttentionBlock * width_ + 4 * place, &scale, sizeof scale);
        } else if (kind_ == CacheKind::f16) {
            uint16_t halves[kLongestHead];
            kernels().to_half(from, halves, width_);
            spread(halves, reinterpret_cast<uint16_t*>(block) + place * step, stride);
        } else {
            spread(from, reinterpret_cast<float*>(block) + place * step, stride);
        }
    }

    template <class T>
    void spread(const T* from, T* to, size_t stride) const {
        for (size_t d = 0; d < width_; ++d) to[d * stride] = from[d];
    }

    std::vector<std::vector<uint8_t>> keys_, values_;
    size_t width_;
    CacheKind kind_;
};

KvState& kv_of(const Span& span, size_t slot) { return static_cast<KvState&>(*(*span.states)[slot]); }

const Span& span_of(const Step& step, size_t token) {
    const auto after = std::upper_bound(step.spans.begin(), step.spans.end(), token,
                                        [](size_t t, const Span& span) { return t < span.first; });
    return *(after - 1);
}

}  // namespace

// Offsets in a row of what the projections give: queries, keys, values.
struct AttentionLayer::Buffers {
    Buffers(const AttentionLayer& layer, Frame& frame, size_t tokens, int threads) {
        const AttentionShape& shape = layer.shape_;
        keys = shape.heads * layer.query_width();
        values = keys + shape.kv_heads * shape.head_width;
        width = values + shape.kv_heads * shape.head_width;
        projected = frame.take<float>(tokens * width);
        mixed = Rows(frame, tokens, shape.heads * shape.head_width, layer.out_.form());
        const size_t group = shape.heads / shape.kv_heads;
        queries = std::max(group, std::min(kQueriesAtOnce / group * group, tokens * group));
        task_floats = attention_work(shape.head_width, queries) + 2 * queries * shape.head_width;
        work = frame.take<float>(size_t(threads) * task_floats);
        limits = frame.take<int32_t>(size_t(threads) * 2 * queries);
    }
    size_t keys, values, width, queries, task_floats;
    float *projected, *work;
    int32_t* limits;
    Rows mixed;
};

AttentionLayer::AttentionLayer(Weights& weights, const std::string& prefix, const AttentionShape& shape,
                               const Rope* rope)
    : shape_(shape), rope_(rope) {
    const size_t q_rows = shape.heads * query_width(), kv_rows = shape.kv_heads * shape.head_width;
    if (weights.has(prefix + "attn_qkv.weight")) {
        q_ = weights.matrix(prefix + "attn_qkv.weight", q_rows + 2 * kv_rows, shape.width);
    } else {
        q_ = weights.matrix(prefix + "attn_q.weight", q_rows, shape.width);
        k_ = weights.matrix(prefix + "attn_k.weight", kv_rows, shape.width);
        v_ = weights.matrix(prefix + "attn_v.weight", kv_rows, shape.width);
    }
    out_ = weights.matrix(prefix + "attn_output.weight", shape.width, shape.heads * shape.head_width);
    q_bias_ = weights.optional(prefix + "attn_q.bias", q_rows);
    k_bias_ = weights.optional(prefix + "attn_k.bias", kv_rows);
    v_bias_ = weights.optional(prefix + "attn_v.bias", kv_rows);
    out_bias_ = weights.optional(prefix + "attn_output.bias", shape.width);
    // A norm is of each head, or (OLMo 2) of all heads as one row.
    const auto norm = [&](const char* name, size_t heads) -> std::vector<float> {
        const std::string whole = prefix + name;
        if (!weights.has(whole)) return {};
        const bool each = weights.file().find(whole)->shape[0] == shape.head_width;
        return weights.vector(whole, each ? shape.head_width : heads * shape.head_width);
    };
    q_norm_ = norm("attn_q_norm.weight", shape.heads);
    k_norm_ = norm("attn_k_norm.weight", shape.kv_heads);
    norms_all_heads_ = q_norm_.size() > shape.head_width || k_norm_.size() > shape.head_width;
    if (shape_.scale == 0) shape_.scale = 1.0f / std::sqrt(float(shape.head_width));
}

size_t AttentionLayer::memory(size_t tokens, int threads) const {
    Frame counting;
    Buffers(*this, counting, tokens, threads);
    return counting.used();
}

std::unique_ptr<State> AttentionLayer::state() const {
    return std::make_unique<KvState>(shape_.kv_heads, shape_.head_width, shape_.cache);
}

// Head number `head` of one token, counted through queries, keys and values: bias, norm, rotation, cache.
void AttentionLayer::prepare_heads(const Step& step, size_t slot, size_t token, size_t head, float* row) const {
    const Kernels& k = kernels();
    const size_t width = shape_.head_width;
    const bool query = head < shape_.heads, value = head >= shape_.heads + shape_.kv_heads;
    const size_t number = query ? head : (head - shape_.heads) % shape_.kv_heads;
    const std::vector<float>& bias = query ? q_bias_ : value ? v_bias_ : k_bias_;
    if (!bias.empty()) {
        const size_t size = query ? query_width() : width;
        k.add_scaled(row, bias.data() + number * size, 1.0f, size);
    }
    const std::vector<float>& norm = query ? q_norm_ : k_norm_;
    if (!value && !norms_all_heads_ && !norm.empty()) k.rms_norm(row, norm.data(), shape_.eps, row, width);
    if (!value && rope_ != nullptr) rope_->turn(step.rotations[size_t(shape_.rope)] + token * rope_->dimensions(), row);
    if (query) {
        for (size_t i = 0; i < width; ++i) row[i] *= shape_.scale;
        return;
    }
    const Span& span = span_of(step, token);
    KvState& cache = kv_of(span, slot);
    const size_t position = span.start + (token - span.first);
    if (value)
        cache.write_value(position, number, row);
    else
        cache.write_key(position, number, row);
}

// Tasks are a key-value head and some tokens of a span; threads take them in turns.
void AttentionLayer::attend(Worker& worker, const Step& step, size_t slot, const Buffers& buffers) const {
    const size_t width = shape_.head_width, group = shape_.heads / shape_.kv_heads;
    const size_t tokens_at_once = buffers.queries / group, me = size_t(worker.index());
    float* work = buffers.work + me * buffers.task_floats;
    float* q = work + attention_work(width, buffers.queries);
    float* out = q + buffers.queries * width;
    int32_t *first = buffers.limits + me * 2 * buffers.queries, *last = first + buffers.queries;
    size_t task = 0;
    for (const Span& span : step.spans) {
        KvState& cache = kv_of(span, slot);
        for (size_t begin = 0; begin < span.count; begin += tokens_at_once) {
            const size_t count = std::min(tokens_at_once, span.count - begin);
            for (size_t kv = 0; kv < shape_.kv_heads; ++kv, ++task) {
                if (task % size_t(worker.count()) != me) continue;
                for (size_t i = 0; i < count * group; ++i) {
                    const size_t token = span.first + begin + i / group, head = kv * group + i % group;
                    const float* from = buffers.projected + token * buffers.width + head * query_width();
                    std::copy(from, from + width, q + i * width);
                    const int32_t position = int32_t(span.start + begin + i / group);
                    last[i] = position + 1;
                    first[i] =
                        shape_.window ? std::max(0, last[i] - int32_t(std::min<size_t>(shape_.window, INT32_MAX))) : 0;
                }
                kernels().attend({count * group, width, q, out, first, last, cache.keys_of(kv), cache.values_of(kv),
                                  shape_.cache, work});
                for (size_t i = 0; i < count * group; ++i) {
                    const size_t token = span.first + begin + i / group, head = kv * group + i % group;
                    float* to = buffers.mixed.row(token) + head * width;
                    std::copy(out + i * width, out + (i + 1) * width, to);
                    if (!shape_.gated) continue;
                    const float* gate = buffers.projected + token * buffers.width + head * query_width() + width;
                    for (size_t d = 0; d < width; ++d) to[d] /= 1.0f + std::exp(-gate[d]);
                }
            }
        }
    }
}

void AttentionLayer::run(Worker& worker, const Step& step, size_t slot, Frame frame, const Rows& in, float* out) const {
    const Buffers buffers(*this, frame, step.tokens, worker.count());
    float* projected = buffers.projected;
    if (k_.empty()) {
        multiply(worker, {Product(q_, in, projected, buffers.width)});
    } else {
        multiply(worker,
                 {Product(q_, in, projected, buffers.width), Product(k_, in, projected + buffers.keys, buffers.width),
                  Product(v_, in, projected + buffers.values, buffers.width)});
    }
    worker.barrier();
    if (norms_all_heads_) {  // norms over all heads
        const auto [first, last] = worker.part(step.tokens);
        for (size_t token = first; token < last; ++token) {
            float* row = projected + token * buffers.width;
            if (!q_norm_.empty()) kernels().rms_norm(row, q_norm_.data(), shape_.eps, row, q_norm_.size());
            if (!k_norm_.empty())
                kernels().rms_norm(row + buffers.keys, k_norm_.data(), shape_.eps, row + buffers.keys, k_norm_.size());
        }
        worker.barrier();
    }
    const size_t heads = shape_.heads + 2 * shape_.kv_heads;
    const auto [first_head, last_head] = worker.part(step.tokens * heads);
    for (size_t i = first_head; i < last_head; ++i) {
        const size_t token = i / heads, head = i % heads;
        const size_t place =
            head < shape_.heads ? head * query_width() : buffers.keys + (head - shape_.heads) * shape_.head_width;
        prepare_heads(step, slot, token, head, projected + token * buffers.width + place);
    }
    worker.barrier();
    attend(worker, step, slot, buffers);
    worker.barrier();
    const auto [first, last] = worker.part(step.tokens);
    buffers.mixed.finish(first, last);
    worker.barrier();
    multiply(worker, {Product(out_, buffers.mixed, out, shape_.width)});
    worker.barrier();
    if (out_bias_.empty()) return;
    for (size_t token = first; token < last; ++token)
        kernels().add_scaled(out + token * shape_.width, out_bias_.data(), 1.0f, shape_.width);
    worker.barrier();
}

}  // namespace limbeck
