// Gemma 3: norms before and after each sublayer, GeGLU, and five layers with a window to one without.
#include <cmath>

#include "architectures.hpp"
#include "attention.hpp"
#include "decoder.hpp"

namespace limbeck {
namespace {

// Layers with a window: a list of them, or every layer but each n-th.
std::vector<bool> local_layers(const GgufFile& file, const std::string& key, size_t layers) {
    const std::string pattern = key + "attention.sliding_window_pattern";
    const std::vector<double> given = file.has(pattern) ? file.numbers(pattern) : std::vector<double>{6};
    std::vector<bool> found;
    for (size_t layer = 0; layer < layers; ++layer) {
        if (given.size() == layers && (layers > 1 || given[0] < 2)) {
            found.push_back(given[layer] != 0);
        } else if (given.size() == 1 && given[0] >= 1) {
            found.push_back((layer + 1) % size_t(given[0]) != 0);
        } else {
            throw FileError(file.path() + " has " + pattern + " of " + std::to_string(given.size()) + " numbers and " +
                            std::to_string(layers) + " layers.");
        }
    }
    return found;
}

}  // namespace

std::unique_ptr<Model> build_gemma3(Weights& weights, const std::string& architecture, const ModelOptions& options) {
    const GgufFile& file = weights.file();
    const std::string key = architecture + ".";
    CommonShape shape = common_shape(weights, architecture);
    const size_t width = shape.decoder.width, window = file.whole(key + "attention.sliding_window", 0);
    shape.decoder.embedding_scale = std::sqrt(float(width));
    auto model = std::make_unique<Decoder>(weights, architecture, shape.decoder);
    model->add_rope(rope_of(weights, architecture, shape.head_width, false));
    model->add_rope(plain_rope(shape.head_width, file.real(key + "rope.freq_base_swa", 10000.0), false));
    const std::vector<bool> locals = local_layers(file, key, shape.decoder.layers);
    AttentionShape attention{width, shape.heads, shape.kv_heads, shape.head_width, shape.decoder.eps};
    attention.cache = options.cache;
    attention.scale = float(file.real(key + "attention.scale", 0));
    // The 27B model's queries are scaled by width / heads, which is not its heads' width; the file has no key for it.
    if (attention.scale == 0 && shape.decoder.layers == 62)
        attention.scale = 1.0f / std::sqrt(float(width / shape.heads));
    for (size_t layer = 0; layer < shape.decoder.layers; ++layer) {
        const std::string prefix = block_prefix(layer);
        const bool local = window > 0 && locals[layer];
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
