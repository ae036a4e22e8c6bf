// The builders of all architectures, and what they share.
#pragma once

#include "experts.hpp"
#include "model.hpp"

namespace limbeck {

std::string block_prefix(size_t layer);  // "blk.3."
// Of the layer `prefix`: compressed ones may have fewer experts than the metadata say.
ExpertShape expert_shape(Weights& weights, const std::string& architecture, const std::string& prefix);

std::unique_ptr<Model> build_paired(Weights& weights, const std::string& architecture, const ModelOptions& options);
std::unique_ptr<Model> build_halved(Weights& weights, const std::string& architecture, const ModelOptions& options);
std::unique_ptr<Model> build_smollm3(Weights& weights, const std::string& architecture, const ModelOptions& options);
std::unique_ptr<Model> build_qwen3next(Weights& weights, const std::string& architecture, const ModelOptions& options);
std::unique_ptr<Model> build_gemma3(Weights& weights, const std::string& architecture, const ModelOptions& options);
std::unique_ptr<Model> build_retnet_hrm(Weights& weights, const std::string& architecture, const ModelOptions& options);

}  // namespace limbeck
