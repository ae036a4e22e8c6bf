#include "decoder.hpp"

#include <algorithm>
#include <cmath>

namespace limbeck {

struct Decoder::Buffers {
    Buffers(const Decoder& model, Frame& frame, size_t tokens, int threads) {
        const size_t width = model.shape_.width;
        hidden = frame.take<float>(tokens * width * std::max<size_t>(1, model.shape_.streams));
        coefficients = frame.take<float>(tokens * Connection::coefficients(model.shape_.streams));
        written = frame.take<float>(tokens * width);
        unsigned forms = 0;
        size_t most = 0;
        for (const Branch& branch : model.branches_) {
            forms |= branch.sublayer->forms();
            most = std::max(most, branch.sublayer->memory(tokens, threads));
        }
        normed = Rows(frame, tokens, width, forms);
        last = Rows(frame, tokens, width, model.head().form());
        for (const auto& rope : model.ropes_) rotations.push_back(frame.take<float>(tokens * rope->dimensions()));
        work = frame.take<uint8_t>(most);
    }
    float *hidden, *written, *coefficients;
    Rows normed, last;
    std::vector<float*> rotations;
    uint8_t* work;
};

Decoder::Decoder(Weights& weights, const std::string& architecture, const DecoderShape& shape) : shape_(shape) {
    info.architecture = architecture;
    info.vocabulary = shape.vocabulary;
    info.width = shape.width;
    info.context = weights.file().whole(architecture + ".context_length", 0);
    info.parameters = parameters_of(weights.file());
    last_norm_ = weights.vector("output_norm.weight", shape.width);
    if (weights.has("output.weight")) {
        head_ = weights.matrix("output.weight", shape.vocabulary, shape.width);
        rows_ = Weights::Table(weights, "token_embd.weight", shape.vocabulary, shape.width);
    } else {
        table_ = weights.matrix("token_embd.weight", shape.vocabulary, shape.width);
    }
}

void Decoder::add(std::vector<float> before, std::unique_ptr<Sublayer> sublayer, std::vector<float> after) {
    branches_.push_back({std::move(before), std::move(after), std::move(sublayer), std::nullopt});
}

void Decoder::connect(Weights& weights, const std::string& name) {
    if (shape_.streams > 0)
        branches_.back().connection.emplace(weights, name, shape_.streams, shape_.width, shape_.eps);
}

States Decoder::new_states() const {
    States states;
    for (const Branch& branch : branches_) states.push_back(branch.sublayer->state());
    return states;
}

size_t Decoder::memory(size_t tokens, int threads) const {
    Frame counting;
    Buffers(*this, counting, tokens, threads);
    return counting.used();
}

Load Decoder::load() const {
    Load load = load_of({&head()});
    for (const Branch& branch : branches_) load += branch.sublayer->load();
    return load;
}

void Decoder::embed(size_t token, float* to) const {
    if (head_.empty())
        table_.row(0, token, to);
    else
        rows_.row(token, to);
    if (shape_.embedding_scale == 1) return;
    for (size_t i = 0; i < shape_.width; ++i) to[i] *= shape_.embedding_scale;
}

// What a branch's sublayer gets of one token.
void Decoder::read(const Branch& branch, size_t token, const Buffers& buffers) const {
    const size_t width = shape_.width;
    float* to = buffers.normed.row(token);
    const float* hidden = buffers.hidden + token * width * std::max<size_t>(1, shape_.streams);
    if (branch.connection) {
        branch.connection->read(hidden, buffers.coefficients + token * Connection::coefficients(shape_.streams), to);
        hidden = to;
    }
    if (!branch.before.empty()) {
        kernels().rms_norm(hidden, branch.before.data(), shape_.eps, to, width);
    } else if (hidden != to) {
        std::copy(hidden, hidden + width, to);
    }
    buffers.normed.finish(token);
}

void Decoder::write(const Branch& branch, size_t token, const Buffers& buffers) const {
    const size_t width = shape_.width;
    float *written = buffers.written + token * width,
          *hidden = buffers.hidden + token * width * std::max<size_t>(1, shape_.streams);
    if (!branch.after.empty()) kernels().rms_norm(written, branch.after.data(), shape_.eps, written, width);
    if (branch.connection) {
        branch.connection->write(buffers.coefficients + token * Connection::coefficients(shape_.streams), written,
                                 hidden);
    } else {
        kernels().add_scaled(hidden, written, shape_.residual_scale, width);
    }
}

void Decoder::run(Worker& worker, Step& step, uint8_t* memory, const std::vector<size_t>& rows, float* logits) const {
    Frame frame(memory);
    const Buffers buffers(*this, frame, step.tokens, worker.count());
    const size_t width = shape_.width, streams = std::max<size_t>(1, shape_.streams);
    const auto [first, last] = worker.part(step.tokens);
    if (worker.index() == 0) step.rotations.assign(buffers.rotations.begin(), buffers.rotations.end());
    for (size_t token = first; token < last; ++token) {
        float* hidden = buffers.hidden + token * width * streams;
        embed(size_t(step.ids[token]), hidden);
        for (size_t stream = 1; stream < streams; ++stream) std::copy(hidden, hidden + width, hidden + stream * width);
        for (size_t r = 0; r < ropes_.size(); ++r) {
            ropes_[r]->angles(step.positions[token], buffers.rotations[r] + token * ropes_[r]->dimensions());
        }
    }
    for (size_t number = 0; number < branches_.size(); ++number) {
        const Branch& branch = branches_[number];
        for (size_t token = first; token < last; ++token) read(branch, token, buffers);
        worker.barrier();
        branch.sublayer->run(worker, step, number, Frame(buffers.work), buffers.normed, buffers.written);
        for (size_t token = first; token < last; ++token) write(branch, token, buffers);
    }
    worker.barrier();
    const auto [first_row, last_row] = worker.part(rows.size());
    for (size_t i = first_row; i < last_row; ++i) {
        float* hidden = buffers.hidden + rows[i] * width * streams;
        for (size_t stream = 1; stream < streams; ++stream)
            kernels().add_scaled(hidden, hidden + stream * width, 1.0f, width);
        for (size_t d = 0; d < width && streams > 1; ++d) hidden[d] /= float(streams);  // the mean of the streams
        kernels().rms_norm(hidden, last_norm_.data(), shape_.eps, buffers.last.row(i), width);
        buffers.last.finish(i);
    }
    worker.barrier();
    multiply(worker, {Product(head(), 0, buffers.last, Tokens{rows.size()}, logits, shape_.vocabulary)});
    worker.barrier();
    if (shape_.logit_scale == 1 && shape_.logit_cap == 0) return;
    const float cap = shape_.logit_cap;
    for (size_t i = first_row * shape_.vocabulary; i < last_row * shape_.vocabulary; ++i) {
        logits[i] *= shape_.logit_scale;
        if (cap > 0) logits[i] = cap * std::tanh(logits[i] / cap);
    }
    worker.barrier();
}

CommonShape common_shape(Weights& weights, const std::string& architecture) {
    const GgufFile& file = weights.file();
    const std::string key = architecture + ".";
    CommonShape shape;
    const TensorInfo* table = file.find("token_embd.weight");
    if (table == nullptr || table->shape.size() != 2)
        throw FileError(file.path() + " has no tensor token_embd.weight, which its architecture needs.");
    shape.decoder.width = file.whole(key + "embedding_length");
    shape.decoder.vocabulary = table->shape[1];
    shape.decoder.layers = file.whole(key + "block_count");
    shape.decoder.eps = float(file.real(key + "attention.layer_norm_rms_epsilon", 1e-6));
    shape.decoder.logit_cap = float(file.real(key + "final_logit_softcapping", 0));
    shape.decoder.streams = file.whole(key + "mhc.streams", 0);
    if (shape.decoder.streams > 4 || (shape.decoder.streams > 0 && base_of(architecture) == architecture)) {
        throw FileError(file.path() + " has " + std::to_string(shape.decoder.streams) +
                        " residual streams; limbeck-mhc architectures have some, and at most 4.");
    }
    shape.heads = file.whole(key + "attention.head_count");
    shape.kv_heads = file.whole(key + "attention.head_count_kv", shape.heads);
    const size_t width = shape.decoder.width;
    // Sizes that no tensor of this file could have would only overflow later.
    const size_t most = file.mapped().size() * 8;
    if (shape.heads == 0 || shape.kv_heads == 0 || shape.heads % shape.kv_heads != 0 || shape.heads > most ||
        width == 0 || width > most) {
        throw FileError(file.path() + " has " + std::to_string(shape.heads) + " attention heads over " +
                        std::to_string(shape.kv_heads) + " for keys, and a width of " + std::to_string(width) +
                        "; these do not go together.");
    }
    shape.head_width = file.whole(key + "attention.key_length", width / shape.heads);
    const size_t value_width = file.whole(key + "attention.value_length", shape.head_width);
    if (shape.head_width == 0 || shape.head_width % 2 != 0 || shape.head_width != value_width ||
        shape.head_width > 1024) {
        throw FileError(file.path() + " has keys of " + std::to_string(shape.head_width) + " and values of " +
                        std::to_string(value_width) + "; heads of one even width up to 1024 are read here.");
    }
    shape.inside = file.whole(key + "feed_forward_length", 0);
    if (shape.inside > most)
        throw FileError(file.path() + " has feed_forward_length " + std::to_string(shape.inside) +
                        ", more than the file holds.");
    if (shape.decoder.layers == 0 || shape.decoder.layers > file.tensors().size()) {
        throw FileError(file.path() + " has block_count " + std::to_string(shape.decoder.layers) + " and " +
                        std::to_string(file.tensors().size()) + " tensors.");
    }
    return shape;
}

}  // namespace limbeck
