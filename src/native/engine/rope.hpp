// Rotary positions (RoFormer, arXiv 2104.09864): pairs of a head's dimensions turned by angles that grow with the
// position.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "weights.hpp"

namespace limbeck {

struct Rope {
    std::vector<float> frequencies;  // [dimensions / 2]
    float magnitude = 1;             // of cosines and sines (YaRN, arXiv 2309.00071)
    bool neighbours = false;         // pairs are (2i, 2i + 1), not (i, i + dimensions / 2)

    size_t dimensions() const { return 2 * frequencies.size(); }
    // Cosines, then sines of one position: [2, dimensions / 2].
    void angles(int32_t position, float* to) const;
    void turn(const float* angles, float* head) const;
};

// As a file's metadata under `architecture.rope.` have it; `base` is the frequency base where it is not the file's own.
Rope rope_of(Weights& weights, const std::string& architecture, size_t head_width, bool neighbours);
Rope plain_rope(size_t dimensions, double base, bool neighbours);

}  // namespace limbeck
