// Decoders that are the common one with a few settings: Llama, Mistral, Qwen 2 and 3, OLMo 2, Phi-3, Granite, SmolLM 3,
// and Qwen 3 and Mixtral with experts.
#include <algorithm>

#include "architectures.hpp"
#include "attention.hpp"
#include "decoder.hpp"
#include "feed_forward.hpp"

namespace limbeck {
namespace {

struct PlainStyle {
    bool neighbours;            // RoPE turns neighbouring pairs
    size_t unturned_every = 0;  // every n-th layer has no RoPE
};

std::unique_ptr<Model> build(Weights& weights, const std::string& architecture, const ModelOptions& options,
                             const PlainStyle& style) {
    const GgufFile& file = weights.file();
    const std::string key = architecture + ".";
    CommonShape shape = common_shape(weights, architecture);
    if (base_of(architecture) == "granite") {
        shape.decoder.embedding_scale = float(file.real(key + "embedding_scale", 1));
        shape.decoder.residual_scale = float(file.real(key + "residual_scale", 1));
        shape.decoder.logit_scale = float(1.0 / file.real(key + "logit_scale", 1));
    }
    auto model = std::make_unique<Decoder>(weights, architecture, shape.decoder);
    model->add_rope(rope_of(weights, architecture, shape.head_width, style.neighbours));
    const size_t experts = file.whole(key + "expert_count", 0);
    AttentionShape attention{shape.decoder.width, shape.heads, shape.kv_heads, shape.head_width, shape.decoder.eps};
    attention.cache = options.cache;
    attention.scale = float(file.real(key + "attention.scale", 0));
    // llama.cpp lets these architectures attend to everything, whatever window a file names; only OLMo 3, which is
    // stored as olmo2 with a window in three layers of four, is another model.
    if (base_of(architecture) == "olmo2" && file.whole(key + "attention.sliding_window", 0) > 0) {
        throw FileError(file.path() + " is an OLMo 3 (olmo2 with a sliding window), which is not known here.");
    }
    for (size_t layer = 0; layer < shape.decoder.layers; ++layer) {
        const std::string prefix = block_prefix(layer);
        const bool turned = style.unturned_every == 0 || (layer + 1) % style.unturned_every != 0;
        attention.rope = turned ? 0 : -1;
        model->add(weights.optional(prefix + "attn_norm.weight", attention.width),
                   std::make_unique<AttentionLayer>(weights, prefix, attention, turned ? model->rope(0) : nullptr),
                   weights.optional(prefix + "post_attention_norm.weight", attention.width));
        model->connect(weights, prefix + "mhc_attention");
        std::unique_ptr<Sublayer> feed_forward;
        if (experts > 0)
            feed_forward = std::make_unique<Experts>(weights, prefix, expert_shape(weights, architecture, prefix));
        else
            feed_forward =
                std::make_unique<DenseFeedForward>(weights, prefix, attention.width, shape.inside, Gate::silu);
        model->add(weights.optional(prefix + "ffn_norm.weight", attention.width), std::move(feed_forward),
                   weights.optional(prefix + "post_ffw_norm.weight", attention.width));
        model->connect(weights, prefix + "mhc_mlp");
    }
    return model;
}

}  // namespace

std::string block_prefix(size_t layer) { return "blk." + std::to_string(layer) + "."; }

ExpertShape expert_shape(Weights& weights, const std::string& architecture, const std::string& prefix) {
    const GgufFile& file = weights.file();
    const std::string key = architecture + ".";
    ExpertShape shape{};
    shape.width = file.whole(key + "embedding_length");
    shape.experts = file.whole(key + "expert_count");
    shape.used = file.whole(key + "expert_used_count");
    shape.inside = file.whole(key + "expert_feed_forward_length", file.whole(key + "feed_forward_length", 0));
    shape.shared_inside = file.whole(key + "expert_shared_feed_forward_length", 0);
    shape.scale = float(file.real(key + "expert_weights_scale", 1));
    if (shape.scale == 0) shape.scale = 1;
    shape.normalised = file.truth(key + "expert_weights_norm", true);
    const TensorInfo* router = file.find(prefix + "ffn_gate_inp.weight");
    if (router != nullptr && router->shape.size() == 2 && base_of(architecture) != architecture) {
        shape.experts = size_t(router->shape[1]);
        shape.used = std::min(shape.used, shape.experts);
    }
    const size_t most = file.mapped().size() * 8;
    if (shape.used == 0 || shape.used > shape.experts || shape.experts > 65536 || shape.inside == 0 ||
        shape.inside > most || shape.shared_inside > most) {
        throw FileError(file.path() + " uses " + std::to_string(shape.used) + " of " + std::to_string(shape.experts) +
                        " experts of width " + std::to_string(shape.inside) + "; these do not go together.");
    }
    return shape;
}

std::unique_ptr<Model> build_paired(Weights& weights, const std::string& architecture, const ModelOptions& options) {
    return build(weights, architecture, options, {true});
}

std::unique_ptr<Model> build_halved(Weights& weights, const std::string& architecture, const ModelOptions& options) {
    return build(weights, architecture, options, {false});
}

std::unique_ptr<Model> build_smollm3(Weights& weights, const std::string& architecture, const ModelOptions& options) {
    return build(weights, architecture, options, {true, 4});
}

}  // namespace limbeck
