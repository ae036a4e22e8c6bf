#include "engine.hpp"

#include <algorithm>
#include <set>
#include <stdexcept>

namespace limbeck {

Engine::Engine(const std::string& path, const EngineOptions& options)
    : file_(path),
      pool_(options.threads, options.placement),
      options_(options),
      model_(load_model(file_, pool_, options.model)) {
    for (const auto& state : model_->new_states()) can_truncate_ = can_truncate_ && (!state || state->can_truncate());
}

Engine::Sequence& Engine::at(int64_t sequence) {
    const auto found = sequences_.find(sequence);
    if (found == sequences_.end())
        throw std::invalid_argument("there is no sequence " + std::to_string(sequence) + ".");
    return found->second;
}

int64_t Engine::create() {
    std::lock_guard<std::mutex> lock(mutex_);
    sequences_[next_].states = model_->new_states();
    return next_++;
}

void Engine::drop(int64_t sequence) {
    std::lock_guard<std::mutex> lock(mutex_);
    at(sequence);
    sequences_.erase(sequence);
}

int64_t Engine::fork(int64_t sequence) {
    std::lock_guard<std::mutex> lock(mutex_);
    const Sequence& from = at(sequence);
    Sequence made;
    made.length = from.length;
    for (const auto& state : from.states) made.states.push_back(state ? state->copy() : nullptr);
    sequences_[next_] = std::move(made);
    return next_++;
}

bool Engine::truncate(int64_t sequence, size_t length) {
    std::lock_guard<std::mutex> lock(mutex_);
    Sequence& found = at(sequence);
    if (length >= found.length) return true;
    if (length > 0 && !can_truncate_) return false;
    for (const auto& state : found.states) {
        if (state) state->truncate(length);
    }
    found.length = length;
    return true;
}

size_t Engine::length(int64_t sequence) const {
    std::lock_guard<std::mutex> lock(mutex_);
    return const_cast<Engine*>(this)->at(sequence).length;
}

size_t Engine::bytes(int64_t sequence) const {
    std::lock_guard<std::mutex> lock(mutex_);
    size_t sum = 0;
    for (const auto& state : const_cast<Engine*>(this)->at(sequence).states) sum += state ? state->bytes() : 0;
    return sum;
}

void Engine::check(const std::vector<Request>& requests) {
    std::set<int64_t> seen;
    for (const Request& request : requests) {
        const Sequence& sequence = at(request.sequence);
        if (!seen.insert(request.sequence).second)
            throw std::invalid_argument("sequence " + std::to_string(request.sequence) +
                                        " stands in two requests of one step.");
        if (request.tokens.empty())
            throw std::invalid_argument("a request for sequence " + std::to_string(request.sequence) +
                                        " has no tokens.");
        if (sequence.lost) {
            throw std::invalid_argument("sequence " + std::to_string(request.sequence) +
                                        " was lost when a step failed.");
        }
        const size_t length = sequence.length + request.tokens.size();
        if (model_->info.context != 0 && length > model_->info.context) {
            throw std::invalid_argument("the sequence would have " + std::to_string(length) +
                                        " tokens and the model's context is " + std::to_string(model_->info.context) +
                                        ".");
        }
        for (int32_t token : request.tokens) {
            if (token < 0 || size_t(token) >= model_->info.vocabulary) {
                throw std::invalid_argument("token " + std::to_string(token) + " is not in the vocabulary of " +
                                            std::to_string(model_->info.vocabulary) + ".");
            }
        }
    }
}

std::vector<float> Engine::forward(const std::vector<Request>& requests) {
    std::lock_guard<std::mutex> lock(mutex_);
    check(requests);
    const size_t vocabulary = model_->info.vocabulary;
    size_t rows = 0;
    for (const Request& request : requests) rows += request.all_logits ? request.tokens.size() : 1;
    std::vector<float> logits(rows * vocabulary);
    std::vector<Part> parts;
    size_t row = 0, taken = 0;
    for (const Request& request : requests) {
        Sequence& sequence = at(request.sequence);
        for (size_t begin = 0; begin < request.tokens.size();) {
            if (taken == options_.tokens_at_once) {
                step(parts);
                parts.clear();
                taken = 0;
            }
            const size_t count = std::min(request.tokens.size() - begin, options_.tokens_at_once - taken);
            const bool last = begin + count == request.tokens.size();
            float* to = request.all_logits || last ? logits.data() + row * vocabulary : nullptr;
            parts.push_back({&sequence, request.tokens.data() + begin, count, to, request.all_logits});
            if (request.all_logits)
                row += count;
            else if (last)
                ++row;
            begin += count;
            taken += count;
        }
    }
    step(parts);
    return logits;
}

void Engine::step(const std::vector<Part>& parts) {
    if (parts.empty()) return;
    Step step;
    std::vector<int32_t> ids;
    std::vector<size_t> rows;
    for (const Part& part : parts) {
        step.spans.push_back({ids.size(), part.count, part.sequence->length, &part.sequence->states});
        for (size_t i = 0; i < part.count; ++i) {
            if (part.logits && (part.all || i + 1 == part.count)) rows.push_back(ids.size());
            ids.push_back(part.tokens[i]);
            step.positions.push_back(int32_t(part.sequence->length + i));
        }
        for (const auto& state : part.sequence->states) {
            if (state) state->reserve(part.sequence->length + part.count);
        }
    }
    step.tokens = ids.size();
    step.ids = ids.data();
    const size_t needed = model_->memory(step.tokens, pool_.threads());
    if (needed > memory_.size()) memory_ = Buffer(needed);
    float* logits = nullptr;
    for (const Part& part : parts) {
        if (part.logits && logits == nullptr) logits = part.logits;  // rows of one step stand one behind the other
    }
    try {
        pool_.run([&](Worker& worker) { model_->run(worker, step, memory_.data(), rows, logits); });
    } catch (...) {  // states may be half-written
        for (const Part& part : parts) part.sequence->lost = true;
        throw;
    }
    for (const Part& part : parts) part.sequence->length += part.count;
}

}  // namespace limbeck
