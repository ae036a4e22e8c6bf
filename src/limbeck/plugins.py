"""Code of the user's own that a recipe names: it registers parts in the tables of `limbeck.registry`.

The one idea: `plugins: [my_losses.py, package.module]` imports each of them once, before the recipe's names are
checked; nothing else ever chooses code to run.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from limbeck.errors import ConfigError
from limbeck.storage import sha256_file


def named_plugins(value: object) -> list[str]:
    """The plugins of a recipe's key or a flag: a list, or names with commas between them."""
    words = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    return [word.strip() for word in words if isinstance(word, str)]


def load_plugins(names: Sequence[str]) -> None:
    """Import the files and modules, in order; one that has been imported is left alone.

    Raises:
        ConfigError: one cannot be found, or does not run; says why.
    """
    for name in names:
        try:
            if name.endswith(".py"):
                _load_file(Path(name))
            else:
                import_module(name)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"plugins: {name} cannot be imported ({type(error).__name__}: {error}).") from error


def _load_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"plugins: {path} does not exist. Give the path of a Python file, or a module's name.")
    name = _module_name(path)
    digest = sha256_file(path)
    if name in sys.modules:
        if _LOADED[name] != digest:
            raise ConfigError(f"plugins: {path} has changed since it was imported. Start a new process.")
        return
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name], _LOADED[name] = module, digest  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def plugin_identity(names: Sequence[str]) -> list[str]:
    """What the plugins are to a result that depends on them: the hash of a file, the name of a module."""
    files = {name: Path(name) for name in names if name.endswith(".py")}
    return [_LOADED.get(_module_name(files[name])) or sha256_file(files[name]) if name in files else name
            for name in names]  # fmt: skip


#: Module name of a file -> the hash of what was imported, which the file may be no longer.
_LOADED: dict[str, str] = {}


def _module_name(path: Path) -> str:
    return f"limbeck_plugin_{path.resolve().as_posix().encode().hex()}"
