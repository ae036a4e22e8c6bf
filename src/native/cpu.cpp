#include "cpu.hpp"

#include <cstdlib>
#include <stdexcept>

#if defined(LIMBECK_NEON)
#include <sys/auxv.h>
#endif

namespace limbeck {

Level detected_level() {
#if defined(LIMBECK_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    if (avx2 && avx512) return Level::avx512;
    if (avx2) return Level::avx2;
#elif defined(LIMBECK_NEON)
    constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
    if (getauxval(AT_HWCAP) & kDotProducts) return Level::neon;
#endif
    return Level::scalar;
}

const char* name_of(Level level) {
    switch (level) {
        case Level::avx512:
            return "avx512";
        case Level::avx2:
            return "avx2";
        case Level::neon:
            return "neon";
        default:
            return "scalar";
    }
}

Level level_named(const std::string& name) {
    for (Level level : {Level::scalar, Level::neon, Level::avx2, Level::avx512}) {
        if (name == name_of(level)) return level;
    }
    throw std::invalid_argument("kernel level '" + name + "' is not known; there are scalar, neon, avx2 and avx512.");
}

Level level_in_use() {
    const char* wanted = std::getenv("LIMBECK_KERNELS");
    const Level best = detected_level();
    if (wanted == nullptr || *wanted == '\0') return best;
    const Level level = level_named(wanted);
    const bool other_family = (level == Level::neon) != (best == Level::neon);
    if (level > best || (other_family && level != Level::scalar)) {
        throw std::invalid_argument(std::string("LIMBECK_KERNELS is ") + wanted + " and this processor runs " +
                                    name_of(best) + " at most. Unset it, or name a lower level.");
    }
    return level;
}

}  // namespace limbeck
