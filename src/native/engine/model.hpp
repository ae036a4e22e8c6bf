// A model: tokens of some sequences in, logits out.
#pragma once

#include <memory>
#include <string>

#include "rope.hpp"
#include "step.hpp"
#include "weights.hpp"

namespace limbeck {

struct ModelOptions {
    CacheKind cache = CacheKind::f16;
};

// What is known of a model without its weights.
struct ModelInfo {
    std::string architecture;
    size_t vocabulary = 0, width = 0, context = 0;
    uint64_t parameters = 0;
};

uint64_t parameters_of(const GgufFile& file);

class Model {
 public:
    virtual ~Model() = default;
    virtual States new_states() const = 0;
    virtual size_t memory(size_t tokens, int threads) const = 0;
    // Hidden states of all tokens, then logits `[rows.size(), V]` of those that are asked for. Every thread calls it.
    virtual void run(Worker& worker, Step& step, uint8_t* memory, const std::vector<size_t>& rows,
                     float* logits) const = 0;
    virtual Load load() const = 0;  // of one token

    ModelInfo info;
};

// Reads the file's architecture and builds the model; throws FileError.
std::unique_ptr<Model> load_model(const GgufFile& file, Pool& pool, const ModelOptions& options);

// "llama" of "limbeck-mhc-llama", "qwen3moe" of "limbeck-compressed-qwen3moe"; of others the name itself.
std::string base_of(const std::string& architecture);

// One architecture's way to be built, by its name in GGUF.
using Builder = std::unique_ptr<Model> (*)(Weights& weights, const std::string& architecture,
                                           const ModelOptions& options);
struct ArchitectureEntry {
    const char* name;
    Builder build;
};
extern const ArchitectureEntry kArchitectures[];
extern const size_t kArchitectureCount;

}  // namespace limbeck
