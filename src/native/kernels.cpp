#include "kernels.hpp"

namespace limbeck {

const Kernels& kernels_of(Level level) {
#if defined(LIMBECK_NEON)
    if (level == Level::neon) return kNeonKernels;
#endif
#if defined(LIMBECK_X86)
    if (level == Level::avx512) return kAvx512Kernels;
    if (level == Level::avx2) return kAvx2Kernels;
#endif
    (void)level;
    return kScalarKernels;
}

const Kernels& kernels() {
    static const Kernels& chosen = kernels_of(level_in_use());
    return chosen;
}

}  // namespace limbeck
