// What the products of every vector level share: one token's activations.
#pragma once

#include "kernels.hpp"

namespace limbeck {

struct Column {
    const int8_t* codes;
    const float* scales;
    const int32_t* sums;
};

inline Column column_of(const Activations& x, size_t token) {
    return {x.codes + token * x.columns, x.scales + token * x.blocks, x.sums + token * x.blocks};
}

}  // namespace limbeck
