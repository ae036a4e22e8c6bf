#include "model.hpp"

#include "architectures/architectures.hpp"

namespace limbeck {

const ArchitectureEntry kArchitectures[] = {
    {"llama", build_paired},
    {"qwen2", build_halved},
    {"qwen3", build_halved},
    {"qwen3moe", build_halved},
    {"qwen3next", build_qwen3next},
    {"gemma3", build_gemma3},
    {"olmo2", build_halved},
    {"phi3", build_halved},
    {"granite", build_paired},
    {"smollm3", build_smollm3},
    {"limbeck-retnet-hrm", build_retnet_hrm},
};
const size_t kArchitectureCount = sizeof kArchitectures / sizeof kArchitectures[0];

uint64_t parameters_of(const GgufFile& file) {
    uint64_t sum = 0;
    for (const auto& [name, tensor] : file.tensors()) {
        uint64_t count = 1;
        for (uint64_t size : tensor.shape) count *= size;
        sum += count;
        (void)name;
    }
    return sum;
}

std::string base_of(const std::string& architecture) {
    for (const std::string prefix : {"limbeck-mhc-", "limbeck-compressed-"}) {
        if (architecture.compare(0, prefix.size(), prefix) == 0) return architecture.substr(prefix.size());
    }
    return architecture;
}

std::unique_ptr<Model> load_model(const GgufFile& file, Pool& pool, const ModelOptions& options) {
    const std::string architecture = file.text("general.architecture");
    std::string known;
    for (const ArchitectureEntry& entry : kArchitectures) {
        if (base_of(architecture) == entry.name) {
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
