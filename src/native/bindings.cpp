#include "bindings.hpp"

NB_MODULE(_native, module) {
    module.doc() = "limbeck's kernels for ternary and block-quantised weights, and the engine on top of them.";
    limbeck::bind_kernels(module);
    limbeck::bind_engine(module);
}
