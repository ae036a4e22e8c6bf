"""The `limbeck` command: one table of subcommands, nothing heavy imported until one runs.

    limbeck COMMAND [RECIPE.yaml] [--section.key value …] [--json]

Exit codes: 0 done, 1 failed, 2 bad usage or configuration.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from limbeck.errors import ConfigError, LimbeckError


@dataclass(frozen=True)
class _Subcommand:
    """A line of the table: the function in `limbeck.commands`, its help, its own switches and spellings."""

    function: str
    help: str
    switches: tuple[str, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)
    needs_recipe: bool = False
    positional: str = ""  # the key that a bare first word sets, where it is no recipe


_SUBCOMMANDS: dict[str, _Subcommand] = {
    "run": _Subcommand(
        "run",
        "run every stage of a recipe; what is done already is skipped",
        ("dry-run",),
        {"output-dir": "output_dir"},
        needs_recipe=True,
    ),
    "data pack": _Subcommand(
        "data_pack",
        "tokenise text and pack it into Parquet rows",
        ("dry-run", "force", "skip-existing"),
        {"input": "dataset.name", "output": "dataset.packed_dir", "output-dir": "dataset.packed_dir"},
    ),
    "teacher cache": _Subcommand(
        "teacher_cache",
        "run the teacher once and keep its top-k targets in HDF5",
        ("dry-run", "force", "skip-existing"),
        {"output-dir": "teacher.cache.dir", "batch-size": "teacher.local.batch_size", "device": "teacher.local.device"},
    ),
    "teacher probe": _Subcommand(
        "teacher_probe",
        "find out what an endpoint speaks and gives, test its alignment, measure it",
        (),
        {
            "endpoint": "teacher.remote.endpoint",
            "protocol": "teacher.remote.protocol",
            "model": "teacher.model",
            "api-key-env": "teacher.remote.api_key_env",
        },
        positional="teacher.remote.endpoint",
    ),
    "teacher serve": _Subcommand(
        "teacher_serve",
        "serve a model's targets over HTTP",
        (),
        {
            "model": "teacher.model",
            "dtype": "teacher.local.dtype",
            "device": "teacher.local.device",
            "max-batch-tokens": "teacher.local.max_batch_tokens",
            "host": "teacher_server.host",
            "port": "teacher_server.port",
            "quantization": "teacher_server.quantization",
            "adapter": "teacher_server.adapter",
            "api-key-env": "teacher_server.api_key_env",
        },
        positional="teacher.model",
    ),
    "train": _Subcommand(
        "train",
        "train the student, with its teacher or with cross-entropy alone",
        ("dry-run", "force"),
    ),
    "eval": _Subcommand(
        "evaluate",
        "score a model on the held-out rows: perplexity, bits/byte, fidelity",
        (),
        {"model": "evaluation.model", "batch-size": "evaluation.batch_size", "max-rows": "evaluation.max_rows"},
    ),
    "generate": _Subcommand(
        "generate",
        "write a sample of text",
        (),
        {
            "model": "generation.model",
            "prompt": "generation.prompt",
            "max-new-tokens": "generation.max_new_tokens",
            "temperature": "generation.temperature",
            "top-k": "generation.top_k",
        },
    ),
    "export": _Subcommand(
        "export",
        "write a finished student for other programs: GGUF, or packed safetensors",
        ("verify",),
        {
            "input": "export.input",
            "output": "export.output",
            "format": "export.format",
            "type": "export.type",
            "embedding": "export.embedding",
            "rest": "export.rest",
            "group-size": "export.group_size",
        },
        positional="export.input",
    ),
    "inspect": _Subcommand(
        "inspect",
        "list a GGUF file's tensors, types, sizes and bits a weight",
        (),
        {"input": "export.input"},
        positional="export.input",
    ),
    "config schema": _Subcommand("config_schema", "print the JSON schema of recipes"),
    "config show": _Subcommand("config_show", "print the resolved recipe"),
}


#: How usage names a bare first word, by the key that it sets.
_WORDS = {"teacher.remote.endpoint": "[URL]", "teacher.model": "[MODEL]", "export.input": "[PATH]"}


def _usage(group: str = "") -> str:
    shown = {name: sub for name, sub in _SUBCOMMANDS.items() if name.startswith(group)}
    width = max(map(len, shown))
    commands = "\n".join(f"  {name:<{width}}  {sub.help}" for name, sub in shown.items())
    return (
        "usage: limbeck COMMAND [RECIPE.yaml] [--section.key value …] [--json]\n\n"
        "Distil large language models into small ones that run anywhere.\n\n"
        f"commands:\n{commands}\n\n"
        "`limbeck COMMAND --help` lists every key. Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 "
        "interrupted, 143 terminated."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_usage() + "\n")
        return 0 if words else 2
    if words[0] == "--version":
        from limbeck import __version__

        sys.stdout.write(f"limbeck {__version__}\n")
        return 0
    if any(name.startswith(words[0] + " ") for name in _SUBCOMMANDS) and words[1:] in ([], ["--help"], ["-h"]):
        sys.stdout.write(_usage(words[0] + " ") + "\n")
        return 0 if words[1:] else 2
    as_json = "--json" in words
    signal.signal(signal.SIGTERM, _terminated)
    try:
        name, rest = _find_command(words)
        return _execute(name, [word for word in rest if word != "--json"], as_json)
    except LimbeckError as error:
        return _failed(str(error), error.exit_code, as_json)
    except Exception as error:
        from limbeck.storage import disk_problem

        problem = disk_problem(error)
        if problem is None:
            raise
        return _failed(f"a file {problem}. Make room, or choose a folder that can be written.", 1, as_json)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to continue\n")
        return 130


def _failed(message: str, exit_code: int, as_json: bool) -> int:
    sys.stderr.write(f"error: {message}\n")
    if as_json:
        sys.stdout.write(json.dumps({"error": message, "exit_code": exit_code}) + "\n")
    return exit_code


def console() -> NoReturn:
    """The `limbeck` command as a process of its own."""
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from limbeck import ranks

        ranks.end(code)
    sys.exit(code)


def _terminated(number: int, frame: object) -> None:
    """A polite end (a job scheduler's, torchrun's): say how to go on."""
    sys.stderr.write("terminated; run the same command again to continue\n")
    sys.stderr.flush()
    os._exit(128 + number)


def _find_command(words: list[str]) -> tuple[str, list[str]]:
    for length in (2, 1):
        name = " ".join(words[:length])
        if name in _SUBCOMMANDS:
            return name, words[length:]
    from difflib import get_close_matches

    near = get_close_matches(" ".join(words[:2]), _SUBCOMMANDS, n=1) or get_close_matches(words[0], _SUBCOMMANDS, n=1)
    near = near or [name for name in _SUBCOMMANDS if name.startswith(words[0] + " ")]
    hint = f"; did you mean `limbeck {near[0]}`?" if near else ""
    raise ConfigError(f"unknown command {words[0]!r}{hint} `limbeck --help` lists them.")


def _execute(name: str, words: list[str], as_json: bool) -> int:
    sub = _SUBCOMMANDS[name]
    from limbeck.recipe import ALIASES, load_recipe, parse_flags

    if "--help" in words or "-h" in words:
        from limbeck.commands import key_help

        switches = "".join(f" [--{switch}]" for switch in sub.switches)
        word = _WORDS.get(sub.positional, "[RECIPE.yaml]")
        title = f"usage: limbeck {name} {word} [--config RECIPE.yaml]{switches} [--json] [--key value …]"
        own = f"flags of this command:\n{key_help(sub.aliases, only=True)}\n\n" if sub.aliases else ""
        sys.stdout.write(f"{title}\n\n{sub.help}\n\n{own}keys:\n{key_help({**ALIASES, **sub.aliases})}\n")
        return 0
    path, switches_given, flags = _split(name, sub, words)
    overrides = parse_flags(flags, sub.aliases, f"limbeck {name}")
    if sub.needs_recipe and path is None:
        raise ConfigError(f"limbeck {name} needs a recipe: `limbeck {name} recipes/quickstart.yaml`.")
    recipe = load_recipe(path, overrides)
    from limbeck import commands, ranks
    from limbeck.console import set_up_logging

    set_up_logging()
    _quieten_libraries()
    function: commands.Command = getattr(commands, sub.function)
    with contextlib.redirect_stdout(sys.stderr):  # stdout carries the result alone
        result = function(recipe, commands.Options(**switches_given))
        ranks.shut_down()
    commands.print_result(result, as_json)
    return 0


def _split(name: str, sub: _Subcommand, words: list[str]) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The recipe's path, the switches and the flags among a command's words."""
    path: Path | None = None
    switches: dict[str, Any] = {}
    flags: list[str] = []
    remaining = list(words)
    if remaining and not remaining[0].startswith("-"):
        word = remaining.pop(0)
        if sub.positional:
            flags += [f"--{sub.positional}", word]
        else:
            path = Path(word)
    while remaining:
        word = remaining.pop(0)
        if word == "--config" or word.startswith("--config="):
            if path is not None:
                raise ConfigError(f"limbeck {name}: the recipe is given twice ({path} and --config).")
            value = word.partition("=")[2] or (remaining.pop(0) if remaining else "")
            path = Path(value)
        elif word.removeprefix("--").replace("_", "-") in sub.switches:
            switches[word.removeprefix("--").replace("-", "_")] = True
        elif word == "--pretrain-ce-only":
            flags += ["--training.mode", "ce"]
        else:
            flags.append(word)
    return path, switches, flags


def _quieten_libraries() -> None:
    """Only limbeck's own messages and real warnings reach the user."""
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
