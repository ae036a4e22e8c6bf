// Gemma 3: norms before and after each sublayer, GeGLU, and five layers with a window to one without.
#include <cmath>

#include "architectures.hpp"
#include "attention.hpp"
#include "decoder.hpp"

namespace limbeck {

std::unique_ptr<Model> build_gemma3(Weights& weights, const std::string& architecture, const ModelOptions& options) {
    const GgufFile& file = weights.file();
    const std::string key = architecture + ".";
    CommonShape shape = common_shape(weights, architecture);
    const size_t width = shape.decoder.width, window = file.whole(key + "attention.sliding_window", 0);
    shape.decoder.embedding_scale = std::sqrt(float(width));
    auto model = std::make_unique<Decoder>(weights, architecture, shape.decoder);
    model->add_rope(rope_of(weights, architecture, shape.head_width, false));
    model->add_rope(plain_rope(shape.head_width, file.real(key + "rope.freq_base_swa", 10000.0), false));
    const size_t every = file.whole(key + "attention.sliding_window_pattern", 6);
    if (every == 0)
        throw FileError(file.path() + " has " + key + "attention.sliding_window_pattern 0; it is at least 1.");
    AttentionShape attention{width, shape.heads, shape.kv_heads, shape.head_width, shape.decoder.eps};
    attention.eight_bits = options.eight_bit_cache;
    attention.scale = float(file.real(key + "attention.scale", 0));
    // The 27B model's queries are scaled by width / heads, which is not its heads' width; the file has no key for it.
    if (attention.scale == 0 && shape.decoder.layers == 62)
        attention.scale = 1.0f / std::sqrt(float(width / shape.heads));
    for (size_t layer = 0; layer < shape.decoder.layers; ++layer) {
        const std::string prefix = block_prefix(layer);
        const bool local = window > 0 && (layer + 1) % every != 0;
        attention.window = local ? window : 0;
        attention.rope = local ? 1 : 0;
        model->add(weights.vector(prefix + "attn_norm.weight", width),
                   std::make_unique<AttentionLayer>(weights, prefix, attention, model->rope(size_t(attention.rope))),
                   weights.vector(prefix + "post_attention_norm.weight", width));
        model->add(weights.vector(prefix + "ffn_norm.weight", width),
                   std::make_unique<DenseFeedForward>(weights, prefix, width, shape.inside, Gate::gelu),
                   weights.vector(prefix + "post_ffw_norm.weight", width));
    }
    return model;
}

}  // namespace limbeck
