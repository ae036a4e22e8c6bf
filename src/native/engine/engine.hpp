// Sequences in work, and steps that carry several of them on at once.
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "model.hpp"

namespace limbeck {

struct EngineOptions {
    int threads = 0;
    Placement placement;
    ModelOptions model;
    size_t tokens_at_once = 512;  // of a step: longer texts take several
};

// Tokens that continue a sequence; logits of the last one, or of all.
struct Request {
    int64_t sequence;
    std::vector<int32_t> tokens;
    bool all_logits;
};

class Engine {
 public:
    Engine(const std::string& path, const EngineOptions& options);

    const GgufFile& file() const { return file_; }
    const ModelInfo& info() const { return model_->info; }
    Pool& pool() { return pool_; }
    Load load() const { return model_->load(); }  // of one token

    int64_t create();
    void drop(int64_t sequence);
    int64_t fork(int64_t sequence);
    bool can_truncate() const { return can_truncate_; }  // the model's memory can go back
    bool truncate(int64_t sequence, size_t length);      // false where it can not
    size_t length(int64_t sequence) const;
    size_t bytes(int64_t sequence) const;

    // Logits `[rows, V]` in the order of the requests; a sequence may stand in one request only.
    // Throws std::invalid_argument before anything is changed.
    std::vector<float> forward(const std::vector<Request>& requests);

 private:
    struct Sequence {
        States states;
        size_t length = 0;
        bool lost = false;  // a step with it failed
    };
    struct Part {  // of a request, in one step
        Sequence* sequence;
        const int32_t* tokens;
        size_t count;
        float* logits;  // of this part's rows; nullptr: none
        bool all;
    };
    Sequence& at(int64_t sequence);
    void check(const std::vector<Request>& requests);
    void step(const std::vector<Part>& parts);

    GgufFile file_;
    Pool pool_;
    EngineOptions options_;
    std::unique_ptr<Model> model_;
    std::map<int64_t, Sequence> sequences_;
    int64_t next_ = 0;
    bool can_truncate_ = true;
    Buffer memory_;
    mutable std::mutex mutex_;
};

}  // namespace limbeck
