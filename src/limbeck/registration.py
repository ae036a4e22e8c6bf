"""Makes transformers know ternary checkpoints as soon as both packages are imported, in either order.

The one idea: `import limbeck` must stay light, so nothing of transformers is imported here; two entries are put
into its tables of quantisation methods when the module that holds them is there, and they import the real
classes when a ternary checkpoint is loaded.
"""

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "limbeck-ternary"  # quantization_config.quant_method of our checkpoints
_TABLES = "transformers.quantizers.auto"


class _LazyConfig:
    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        return _quantizer().TernaryQuantizationConfig.from_dict(*args, **kwargs)


def _lazy_quantizer(*args: Any, **kwargs: Any) -> Any:
    return _quantizer().TernaryQuantizer(*args, **kwargs)


def _quantizer() -> Any:
    """The module of the real classes, by name: it stands far above this one, and imports this one's `METHOD`."""
    return importlib.import_module("limbeck.students.quantizer")


def _add(tables: ModuleType) -> None:
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _LazyConfig
    tables.AUTO_QUANTIZER_MAPPING[METHOD] = _lazy_quantizer


class _Wrapped(Loader):
    """A module's own loader, and then our entries."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _add(module)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Wrapped(spec.loader)
        return spec


def register() -> None:
    """Add the entries now, or when transformers' tables are imported; calling it again changes nothing."""
    if _TABLES in sys.modules:
        _add(sys.modules[_TABLES])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
