"""From the words of a command line to a command that runs, and from what goes wrong to one line and an exit code."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

import click

from limbeck.cli.completion import VARIABLE, install, script
from limbeck.cli.options import KeyCommand
from limbeck.cli.table import GROUPS, SUBCOMMANDS, Subcommand
from limbeck.errors import ConfigError, LimbeckError, StoppedError

_EPILOG = (
    "`limbeck COMMAND --help` shows the most used keys, `--help-all` every one. Exit codes: 0 done, 1 failed, 2 bad "
    "usage or configuration, 130 interrupted, 143 terminated."
)


class _Group(click.Group):
    """Commands whose help lists those of their groups too, and whose unknown words name the nearest."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if self.get_command(ctx, word) is None and not word.startswith("-"):
            raise click.UsageError(_unknown(f"{ctx.info_name or ''} {' '.join(args[:2])}".split()), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        start = " ".join(ctx.command_path.split()[1:])
        shown = [(name, sub.help) for name, sub in SUBCOMMANDS.items() if name.startswith(start)]
        with formatter.section("Commands"):
            formatter.write_dl(shown)


def _unknown(words: list[str]) -> str:
    words = [word for word in words if word != "limbeck"]
    near = get_close_matches(" ".join(words[:2]), SUBCOMMANDS, n=1) or get_close_matches(words[0], SUBCOMMANDS, n=1)
    near = near or [name for name in SUBCOMMANDS if name.startswith(words[0] + " ")]
    hint = f"; did you mean `limbeck {near[0]}`?" if near else ""
    return f"unknown command {' '.join(words[:1] if near == [] else words[:2])!r}{hint} `limbeck --help` lists them."


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from limbeck import __version__

        click.echo(f"limbeck {__version__}")
        ctx.exit()


def _install_completion(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        path = install(ctx.find_root().command, value if value != "?" else None)
        click.echo(f"completion is in {path}; open a new terminal to use it")
        ctx.exit()


def _show_completion(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        click.echo(script(ctx.find_root().command, value))
        ctx.exit()


def root() -> click.Group:
    """The whole command line."""
    eager: dict[str, Any] = {"is_eager": True, "expose_value": False}
    options: list[click.Parameter] = [
        click.Option(["--version"], is_flag=True, callback=_version, help="Print the version.", **eager),
        click.Option(["--install-completion"], is_flag=False, flag_value="?", default=None, metavar="[SHELL]",
                     callback=_install_completion, help="Let the shell complete commands, flags and choices.", **eager),
        click.Option(["--show-completion"], default=None, metavar="SHELL", callback=_show_completion,
                     help="Print what --install-completion installs.", **eager),
    ]  # fmt: skip
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
    about = "Distil large language models into small ones that run anywhere."
    top = _Group("limbeck", help=about, epilog=_EPILOG, params=options, context_settings=settings)
    groups = {name: _Group(name, help=text, context_settings=settings) for name, text in GROUPS.items()}
    for name, group in groups.items():
        top.add_command(group, name)
    for name, sub in SUBCOMMANDS.items():
        group_name, _, leaf = name.rpartition(" ")
        (groups[group_name] if group_name else top).add_command(KeyCommand(leaf, sub, _runner(name, sub)))
    return top


def _runner(name: str, sub: Subcommand) -> Any:
    @click.pass_context
    def run(ctx: click.Context, /, words: Sequence[str], config: str | None, **switches: bool) -> int:
        return _execute(name, sub, ctx, list(words), config, switches)

    return run


def _execute(
    name: str, sub: Subcommand, ctx: click.Context, words: list[str], config: str | None, switches: dict[str, bool]
) -> int:
    from limbeck.cli.words import interpret_words
    from limbeck.recipe import load_recipe, tree_of

    keys, origins = ctx.meta["keys"], ctx.meta["origins"]
    as_json = switches.pop("json")
    if switches.pop("pretrain_ce_only", False):
        keys.setdefault("training.mode", "ce")
        origins.setdefault("training.mode", "--pretrain-ce-only")
    path, found = interpret_words(f"limbeck {name}", sub, words, config)
    if sub.needs_recipe and path is None:
        raise ConfigError(f"limbeck {name} needs a recipe: `limbeck {name} recipes/quickstart.yaml`.")
    recipe = load_recipe(path, tree_of({**found, **keys}, origins), origins, tiny=switches.pop("tiny", False))
    from limbeck import commands, ranks
    from limbeck.console import set_up_logging

    set_up_logging()
    _quieten_libraries()
    function: commands.Command = getattr(commands, sub.function)
    with contextlib.redirect_stdout(sys.stderr):  # stdout carries the result alone
        result = function(recipe, commands.Options(**switches))
        ranks.shut_down()
    commands.print_result(result, as_json)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    command = root()
    if VARIABLE in os.environ:
        command.main([], prog_name="limbeck", complete_var=VARIABLE)
    signal.signal(signal.SIGTERM, _terminated)
    if not words:
        return _usage(command)
    try:
        return int(command.main(words, prog_name="limbeck", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.NoSuchOption as error:
        return _failed(_unknown_flag(error), 2, as_json)
    except click.UsageError as error:
        return _failed(_usage_problem(error), 2, as_json)
    except LimbeckError as error:
        return _failed(str(error), error.exit_code, as_json)
    except StoppedError as stopped:
        sys.stderr.write(f"{stopped}\n")
        return stopped.exit_code
    except (KeyboardInterrupt, click.Abort):
        sys.stderr.write("interrupted; what is finished is kept, and the same command goes on after it\n")
        return 130
    except Exception as error:
        from limbeck.storage import disk_problem

        problem = disk_problem(error)
        if problem is None:
            raise
        return _failed(f"a file {problem}. Make room, or choose a folder that can be written.", 1, as_json)


def _usage(command: click.Group) -> int:
    with click.Context(command, info_name="limbeck", max_content_width=120) as ctx:
        click.echo(command.get_help(ctx))
    return 2


def _unknown_flag(error: click.NoSuchOption) -> str:
    """The nearest flag, by its whole name or by its last part alone: `alhpa` is nearest to that of `loss.alpha`."""
    from limbeck.config.messages import did_you_mean

    ctx = error.ctx
    assert ctx is not None
    names = [
        name.removeprefix("--") for param in ctx.command.get_params(ctx) for name in param.opts if name[:2] == "--"
    ]
    hint = did_you_mean(error.option_name.lstrip("-").replace("-", "_"), names, "--")
    return f"{ctx.command_path}: unknown flag {error.option_name}{hint or '.'}"


def _usage_problem(error: click.UsageError) -> str:
    path = error.ctx.command_path if error.ctx is not None else "limbeck"
    text = error.format_message()
    return text if text.startswith("unknown command") else f"{path}: {text}"


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
    sys.stderr.write("terminated; what is finished is kept, and the same command goes on after it\n")
    sys.stderr.flush()
    os._exit(128 + number)


def _quieten_libraries() -> None:
    """Only limbeck's own messages and real warnings reach the user."""
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
