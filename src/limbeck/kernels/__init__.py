"""Products with ternary and block-quantised weights: our C++ kernels, or NumPy where they were not built.

    pool = Pool(threads=2)
    weights = Weights("tq2_0", blocks, pool)     # a GGUF tensor's blocks `[matrices, rows, bytes]`
    y = weights.multiply(x, pool)                # `[tokens, columns]` to `[tokens, rows]`, activations in int8

The one idea: both implementations have the same names and the same arithmetic (`reference` is the definition, `_native`
the fast one), so what holds for one is tested against the other; `native()` says which one is there.

Shapes: M matrices (experts), R rows, C columns, T tokens.
"""

from functools import cache
from types import ModuleType
from typing import Any

from limbeck.console import warn


def native() -> ModuleType | None:
    """The C++ module; None where it was not built."""
    try:
        from limbeck.kernels import _native
    except ImportError:
        return None
    return _native


@cache
def implementation() -> Any:
    """The C++ module, or the NumPy one with a warning."""
    found = native()
    if found is None:
        from limbeck.kernels import reference as found

        warn(
            "limbeck's C++ kernels are not built, NumPy does their work, slowly. Install a C++17 compiler and CMake "
            "and install limbeck again (`make kernels` in a checkout)."
        )
    return found


def _part_of(name: str) -> Any:
    """Pool, Weights, the functions on blocks and level of whichever implementation there is."""
    if name in ("Pool", "Weights", "pack_blocks", "unpack_blocks", "quantise_activations", "level"):
        return getattr(implementation(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__getattr__ = _part_of  # (PEP 562)
