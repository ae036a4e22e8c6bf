// Which instructions this processor has, and which of our kernels it therefore runs.
#pragma once

#include <string>

namespace limbeck {

enum class Level { scalar, neon, avx2, avx512 };

// The best level that was compiled in and that this processor runs.
Level detected_level();

// The level in use: LIMBECK_KERNELS where it is set, else the detected one.
// Throws std::invalid_argument for a level that is unknown or that the processor lacks.
Level level_in_use();

const char* name_of(Level level);
Level level_named(const std::string& name);

}  // namespace limbeck
