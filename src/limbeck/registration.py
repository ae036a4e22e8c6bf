"""Makes transformers know our checkpoints as soon as both packages are imported, in either order.

The one idea: `import limbeck` must stay light, so nothing of transformers is imported here; entries are put into its
tables (methods of quantisation, architectures) when the module that holds a table is there, and they import the real
classes when a checkpoint of ours is loaded.
"""

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

METHOD = "limbeck-ternary"  # quantization_config.quant_method of our checkpoints
#: Architectures of transformers whose decoders can have mHC-lite streams: `mhc_llama` and so on.
MHC_BASES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "qwen3_moe", "smollm3")
MHC_PREFIX = "mhc_"
#: Architectures whose routed experts can be compressed: `compressed_qwen3_moe` and so on.
MOE_BASES = ("qwen3_moe", "qwen3_next", "qwen2_moe", "olmoe", "mixtral")
COMPRESSED_PREFIX = "compressed_"
#: The module that gives their classes by name.
AUTO = "limbeck.students.auto"
#: model_type of every architecture of our own.
OWN_TYPES = (
    "retnet_hrm",
    *(MHC_PREFIX + base for base in MHC_BASES),
    *(COMPRESSED_PREFIX + base for base in MOE_BASES),
)


class _LazyQuantizationConfig:
    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        return _quantizer().TernaryQuantizationConfig.from_dict(*args, **kwargs)


def _lazy_quantizer(*args: Any, **kwargs: Any) -> Any:
    return _quantizer().TernaryQuantizer(*args, **kwargs)


def _quantizer() -> Any:
    """The module of the real classes, by name: it stands far above this one, and imports this one's `METHOD`."""
    return importlib.import_module("limbeck.students.quantizer")


def _add_quantizer(tables: ModuleType) -> None:
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _LazyQuantizationConfig
    tables.AUTO_QUANTIZER_MAPPING[METHOD] = _lazy_quantizer


class _Architectures(dict[str, Any]):
    """Config classes by model_type that are made when they are asked for; transformers reads it as a plain dict."""

    def __missing__(self, model_type: str) -> Any:
        if model_type not in OWN_TYPES:
            raise KeyError(model_type)
        self[model_type] = importlib.import_module(AUTO).own_config_class(model_type)
        return self[model_type]

    def __contains__(self, model_type: object) -> bool:
        return model_type in OWN_TYPES or super().__contains__(model_type)


def _add_architectures(tables: ModuleType) -> None:
    mapping = tables.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _Architectures):
        mapping._extra_content = _Architectures(mapping._extra_content)


#: Modules of transformers -> what is added to them.
_ADDITIONS: dict[str, Callable[[ModuleType], None]] = {
    "transformers.quantizers.auto": _add_quantizer,
    "transformers.models.auto.configuration_auto": _add_architectures,
}


class _Wrapped(Loader):
    """A module's own loader, and then our entries."""

    def __init__(self, loader: Loader, add: Callable[[ModuleType], None]) -> None:
        self._loader, self._add = loader, add

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._add(module)


class _Finder(MetaPathFinder):
    """Stands first in line until both modules have been imported."""

    def __init__(self) -> None:
        self._waiting = {name: add for name, add in _ADDITIONS.items() if name not in sys.modules}
        self._searching = threading.local()

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in self._waiting or getattr(self._searching, "name", None) == fullname:
            return None
        self._searching.name = fullname
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.name = None
        add = self._waiting.pop(fullname)
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Wrapped(spec.loader, add)
        return spec


def register() -> None:
    """Add the entries now, or when transformers' tables are imported; calling it again changes nothing."""
    for name, add in _ADDITIONS.items():
        if name in sys.modules:
            add(sys.modules[name])
    missing = any(name not in sys.modules for name in _ADDITIONS)
    if missing and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
