#include "model.hpp"

#include "architectures/architectures.hpp"

namespace limbeck {

const ArchitectureEntry kArchitectures[] = {
    {"llama", build_paired},        {"qwen2", build_halved},    {"qwen3", build_halved}, {"qwen3moe", build_halved},
    {"qwen3next", build_qwen3next}, {"gemma3", build_gemma3},   {"olmo2", build_halved}, {"phi3", build_halved},
    {"granite", build_paired},      {"smollm3", build_smollm3},
};
const size_t kArchitectureCount = sizeof kArchitectures / sizeof kArchitectures[0];

std::unique_ptr<Model> load_model(const GgufFile& file, Pool& pool, const ModelOptions& options) {
    const std::string architecture = file.text("general.architecture");
    std::string known;
    for (const ArchitectureEntry& entry : kArchitectures) {
        if (architecture == entry.name) {
            Weights weights(file, pool);
            std::unique_ptr<Model> model = entry.build(weights, architecture, options);
            weights.check_all_used();
            return model;
        }
        known += (known.empty() ? "" : ", ") + std::string(entry.name);
    }
    throw FileError(file.path() + " has the architecture " + architecture + "; those that run here are " + known + ".");
}

}  // namespace limbeck
