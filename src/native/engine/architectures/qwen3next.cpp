// Qwen3-Next: gated delta nets, gated attention in every n-th layer, experts with a shared one.
#include "architectures.hpp"
#include "attention.hpp"
#include "decoder.hpp"
#include "delta_net.hpp"

namespace limbeck {
namespace {

DeltaNetShape delta_shape(const GgufFile& file, const std::string& key, const CommonShape& shape) {
    DeltaNetShape found{};
    found.width = shape.decoder.width;
    found.eps = shape.decoder.eps;
    found.taps = file.whole(key + "ssm.conv_kernel");
    found.key_width = file.whole(key + "ssm.state_size");
    found.key_heads = file.whole(key + "ssm.group_count");
    found.value_heads = file.whole(key + "ssm.time_step_rank");
    const size_t values = file.whole(key + "ssm.inner_size");
    if (found.taps == 0 || found.taps > 64 || found.key_heads == 0 || found.key_width == 0 || found.key_width > 4096 ||
        found.value_heads > 65536 || found.value_heads == 0 || found.value_heads % found.key_heads != 0 ||
        values == 0 || values % found.value_heads != 0 || values / found.value_heads > 4096) {
        throw FileError(file.path() + " has delta nets of " + std::to_string(found.value_heads) + " value heads over " +
                        std::to_string(found.key_heads) + " key heads and " + std::to_string(values) +
                        " values; these do not go together.");
    }
    found.value_width = values / found.value_heads;
    if (found.value_heads * found.key_width * found.value_width > file.mapped().size()) {
        throw FileError(file.path() + " has delta nets whose states are out of proportion to its weights.");
    }
    return found;
}

}  // namespace

std::unique_ptr<Model> build_qwen3next(Weights& weights, const std::string& architecture, const ModelOptions& options) {
    const GgufFile& file = weights.file();
    const std::string key = architecture + ".";
    const CommonShape shape = common_shape(weights, architecture);
    const size_t interval = file.whole(key + "full_attention_interval", 4), width = shape.decoder.width;
    if (interval == 0) throw FileError(file.path() + " has " + key + "full_attention_interval 0; it is at least 1.");
    auto model = std::make_unique<Decoder>(weights, architecture, shape.decoder);
    model->add_rope(rope_of(weights, architecture, shape.head_width, false));
    AttentionShape attention{width, shape.heads, shape.kv_heads, shape.head_width, shape.decoder.eps};
    attention.rope = 0;
    attention.gated = true;
    attention.cache = options.cache;
    for (size_t layer = 0; layer < shape.decoder.layers; ++layer) {
        const std::string prefix = block_prefix(layer);
        std::unique_ptr<Sublayer> mixer;
        if ((layer + 1) % interval == 0)
            mixer = std::make_unique<AttentionLayer>(weights, prefix, attention, model->rope(0));
        else
            mixer = std::make_unique<DeltaNetLayer>(weights, prefix, delta_shape(file, key, shape));
        model->add(weights.vector(prefix + "attn_norm.weight", width), std::move(mixer));
        model->add(weights.vector(prefix + "post_attention_norm.weight", width),
                   std::make_unique<Experts>(weights, prefix, expert_shape(weights, architecture, prefix)));
    }
    return model;
}

}  // namespace limbeck
