// The common decoder: an embedding, sublayers around a residual stream, a norm and a head.
#pragma once

#include <optional>

#include "model.hpp"
#include "streams.hpp"

namespace limbeck {

// hidden += scale * after(sublayer(before(hidden))), norms where there are weights for them; of several streams a
// connection says what the sublayer reads and where its result goes.
struct Branch {
    std::vector<float> before, after;
    std::unique_ptr<Sublayer> sublayer;
    std::optional<Connection> connection;
};

struct DecoderShape {
    size_t width = 0, vocabulary = 0, layers = 0;
    float eps = 1e-6f;
    float embedding_scale = 1, residual_scale = 1, logit_scale = 1;
    float logit_cap = 0;  // c of c tanh(logit / c); 0: none
    size_t streams = 0;   // residual streams with connections between them; 0: the plain residual
};

class Decoder : public Model {
 public:
    Decoder(Weights& weights, const std::string& architecture, const DecoderShape& shape);

    void add_rope(Rope rope) { ropes_.push_back(std::make_unique<Rope>(std::move(rope))); }
    const Rope* rope(size_t number) const { return ropes_[number].get(); }
    void add(std::vector<float> before, std::unique_ptr<Sublayer> sublayer, std::vector<float> after = {});
    // The connection of the sublayer that was added last, where the model has streams.
    void connect(Weights& weights, const std::string& name);

    States new_states() const override;
    size_t memory(size_t tokens, int threads) const override;
    void run(Worker& worker, Step& step, uint8_t* memory, const std::vector<size_t>& rows,
             float* logits) const override;
    Load load() const override;

 private:
    struct Buffers;
    void embed(size_t token, float* to) const;
    void read(const Branch& branch, size_t token, const Buffers& buffers) const;
    void write(const Branch& branch, size_t token, const Buffers& buffers) const;
    const Matrix& head() const { return head_.empty() ? table_ : head_; }

    DecoderShape shape_;
    std::vector<std::unique_ptr<Rope>> ropes_;
    std::vector<Branch> branches_;
    Matrix table_, head_;  // the head is empty where the embedding is the head too
    Weights::Table rows_;  // of an embedding that is no head
    std::vector<float> last_norm_;
};

// What nearly every decoder's metadata hold.
struct CommonShape {
    DecoderShape decoder;
    size_t heads, kv_heads, head_width, inside;
};
CommonShape common_shape(Weights& weights, const std::string& architecture);

}  // namespace limbeck
