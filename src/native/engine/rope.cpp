#include "rope.hpp"

#include <algorithm>
#include <cmath>

namespace limbeck {
namespace {

constexpr double kTwoPi = 6.283185307179586;

// YaRN: dimensions that turn often keep their frequency, those that never turn once are stretched, those between are
// mixed.
void stretch(Rope& rope, double base, double factor, double original, double fast, double slow) {
    const double dimensions = double(rope.dimensions());
    const auto dimension_turning = [&](double turns) {
        return dimensions * std::log(original / (turns * kTwoPi)) / (2 * std::log(base));
    };
    const double low = std::max(0.0, std::floor(dimension_turning(fast)));
    const double high = std::min(dimensions - 1, std::ceil(dimension_turning(slow)));
    for (size_t i = 0; i < rope.frequencies.size(); ++i) {
        const double ramp = std::clamp((double(i) - low) / std::max(0.001, high - low), 0.0, 1.0);
        rope.frequencies[i] = float(double(rope.frequencies[i]) * (1 - ramp + ramp / factor));
    }
}

}  // namespace

void Rope::angles(int32_t position, float* to) const {
    for (size_t i = 0; i < frequencies.size(); ++i) {
        const float angle = float(position) * frequencies[i];
        to[i] = std::cos(angle) * magnitude;
        to[frequencies.size() + i] = std::sin(angle) * magnitude;
    }
}

void Rope::turn(const float* angles, float* head) const {
    const size_t half = frequencies.size();
    const size_t far = neighbours ? 1 : half, next = neighbours ? 2 : 1;
    for (size_t i = 0; i < half; ++i) {
        float &x = head[i * next], &y = head[i * next + far];
        const float cosine = angles[i], sine = angles[half + i], was = x;
        x = was * cosine - y * sine;
        y = y * cosine + was * sine;
    }
}

Rope plain_rope(size_t dimensions, double base, bool neighbours) {
    Rope rope;
    rope.neighbours = neighbours;
    for (size_t i = 0; i < dimensions / 2; ++i)
        rope.frequencies.push_back(float(std::pow(base, -2.0 * double(i) / double(dimensions))));
    return rope;
}

Rope rope_of(Weights& weights, const std::string& architecture, size_t head_width, bool neighbours) {
    const GgufFile& file = weights.file();
    const std::string key = architecture + ".rope.";
    const uint64_t dimensions = file.whole(key + "dimension_count", head_width);
    if (dimensions == 0 || dimensions % 2 != 0 || dimensions > head_width) {
        throw FileError(file.path() + " has " + key + "dimension_count " + std::to_string(dimensions) +
                        " and heads of " + std::to_string(head_width) + ".");
    }
    const double base = file.real(key + "freq_base", 10000.0);
    if (!(base > 1))
        throw FileError(file.path() + " has " + key + "freq_base " + std::to_string(base) + "; it is above 1.");
    Rope rope = plain_rope(dimensions, base, neighbours);
    if (weights.has("rope_freqs.weight")) {  // Llama 3: a divisor for each frequency
        const std::vector<float> divisors = weights.vector("rope_freqs.weight", dimensions / 2);
        for (size_t i = 0; i < divisors.size(); ++i) rope.frequencies[i] /= divisors[i];
    }
    // Without a type a factor is linear, as in older files, which call it scale_linear.
    const std::string old = key + "scale_linear", now = key + "scaling.factor";
    const bool scaled = file.has(now) || file.has(old);
    const std::string kind = file.has(key + "scaling.type") ? file.text(key + "scaling.type")
                             : scaled                       ? "linear"
                                                            : "none";
    if (kind == "none") return rope;
    const double factor = file.has(now) || !file.has(old) ? file.real(now) : file.real(old);
    if (!(factor >= 1))
        throw FileError(file.path() + " has " + key + "scaling.factor " + std::to_string(factor) +
                        "; it is at least 1.");
    if (kind == "linear") {
        for (float& frequency : rope.frequencies) frequency = float(double(frequency) / factor);
    } else if (kind == "yarn") {
        const double original =
            file.real(key + "scaling.original_context_length", file.real(architecture + ".context_length"));
        stretch(rope, base, factor, original, file.real(key + "scaling.yarn_beta_fast", 32.0),
                file.real(key + "scaling.yarn_beta_slow", 1.0));
        // The file's factor stands beside the magnitude that llama.cpp derives from the stretching itself.
        rope.magnitude = float(file.real(key + "scaling.attn_factor", 1.0) * (1.0 + 0.1 * std::log(factor)));
    } else {
        throw FileError(file.path() + " scales RoPE by '" + kind + "'; none, linear and yarn are known.");
    }
    return rope;
}

}  // namespace limbeck
