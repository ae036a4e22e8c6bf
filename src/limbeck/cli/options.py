"""Every key of a recipe as an option of a command: its spellings, its choices, its place in the help.

The one idea: options follow from the recipe's models, so a key that is defined is a flag, completed by the shell and
documented; click finds them in the command line and hands their values on as text, which `limbeck.recipe` reads.
"""

import typing
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from limbeck.cli.table import SUBCOMMANDS, SWITCHES, Subcommand, usage_word

#: Below these any key may be given: what is known there is the model's or the part's.
OPEN = ("student.config.", "loss.divergence.")


def normalised_flag(name: str) -> str:
    """A flag as it is compared: `_` and `-` are the same."""
    return name.replace("_", "-")


class KeyOption(click.Option):
    """A key of the recipe.

    Args:
        key: dotted.
        field: its pydantic field; None for a section as a whole, and for keys of earlier versions.
        names: its spellings without dashes, short ones first.
        hidden: not listed.
    """

    def __init__(self, key: str, field: Any, names: Sequence[str], *, hidden: bool = False) -> None:
        self.key, self.field = key, field
        self.alone = field is not None and bool in _kinds(field.annotation)  # given without a value it is true
        alone: dict[str, Any] = {"flag_value": "true"} if self.alone else {}
        super().__init__(
            [f"key_{key.replace('.', '__')}", *(f"--{name}" for name in names)],
            is_flag=False,
            default=None,
            expose_value=False,
            hidden=hidden,
            help=None if field is None else field.description,
            callback=_remember,
            **alone,
        )
        self.shown = names

    @cached_property
    def choices(self) -> list[str]:
        """What the key may be, where that is a list of names."""
        return [] if self.field is None else _choices(self.field)

    def make_metavar(self, ctx: click.Context) -> str:
        """The choices, or the kind of value."""
        if self.choices:
            return "|".join(self.choices)
        kinds = [] if self.field is None else _kinds(self.field.annotation)
        named = {bool: "true|false", int: "NUMBER", float: "NUMBER", Path: "PATH", str: "TEXT"}
        return next((word for kind, word in named.items() if kind in kinds), "VALUE")

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Spellings and kind; meaning and default."""
        default = None if self.field is None else self.field.get_default(call_default_factory=True)
        known = default is not None and str(default) not in ("", "[]", "{}", "PydanticUndefined")
        shown = f" [{_as_text(default)}]" if known else ""
        return ", ".join(f"--{name}" for name in self.shown) + f" {self.make_metavar(ctx)}", f"{self.help}{shown}"

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The choices, or files."""
        if self.choices:
            return [CompletionItem(choice) for choice in self.choices if choice.startswith(incomplete)]
        return [CompletionItem(incomplete, type="file")]


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(_as_text(one) for one in value)
    return str(getattr(value, "name", value))


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    assert isinstance(param, KeyOption)
    if value is not None:
        ctx.meta.setdefault("keys", {})[param.key] = value


def _inside(annotation: Any) -> list[Any]:
    """The annotation and everything inside it."""
    found = [annotation]
    for argument in typing.get_args(annotation):
        if not isinstance(argument, str | int | float):
            found += _inside(argument)
    return found


def _kinds(annotation: Any) -> list[Any]:
    return [part for part in _inside(annotation) if isinstance(part, type)]


def _choices(field: Any) -> list[str]:
    from limbeck.registry import OneOf

    parts = [part for one in (field.annotation, *field.metadata) for part in _inside(one)]
    found: list[str] = []
    for part in parts:
        if typing.get_origin(part) is typing.Literal:
            found += [str(value) for value in typing.get_args(part)]
        elif isinstance(part, OneOf):
            found += part.names()
    others = {int, float, str} & set(_kinds(field.annotation)) if found else set()
    return found + (["true", "false"] if found and bool in _kinds(field.annotation) else []) + (
        ["NUMBER"] if others & {int, float} else []
    )  # fmt: skip


def key_options(aliases: Mapping[str, str]) -> list[KeyOption]:
    """An option for every key, with all its spellings.

    Args:
        aliases: the command's own spellings, and the keys they set; they win over those that all commands share.
    """
    from limbeck.config.moved import EARLIER, present_key
    from limbeck.recipe import ALIASES, keys, optional_sections

    own = {normalised_flag(name): key for name, key in {**ALIASES, **aliases}.items()}
    spellings: dict[str, list[str]] = {}
    for name, key in own.items():
        spellings.setdefault(key, []).append(name)
    short: dict[str, list[str]] = {}
    for name in EARLIER:
        short.setdefault(present_key(name), []).append(name)
    known = dict(keys())
    found = []
    for key, field in known.items():
        names = [name for name in spellings.get(key, []) if name != normalised_flag(key)]
        if own.get(normalised_flag(key), key) == key:  # else the command means something else by that name
            names.append(key)
        if names:
            found.append(KeyOption(key, field, names))
    taken = {normalised_flag(name) for option in found for name in option.shown}
    for key, names in short.items():
        hidden = [name for name in names if normalised_flag(name) not in taken]
        if hidden:
            found.append(KeyOption(key, known.get(key), hidden, hidden=True))
    found += [
        KeyOption(key, None, [key], hidden=True) for key in optional_sections() if normalised_flag(key) not in taken
    ]
    return found


class KeyCommand(click.Command):
    """A command whose options are its switches and the recipe's keys."""

    def __init__(self, name: str, sub: Subcommand, run: Any) -> None:
        switches = [
            click.Option([f"--{switch}"], is_flag=True, help=SWITCHES[switch]) for switch in (*sub.switches, "json")
        ]
        params: list[click.Parameter] = [
            click.Argument(["words"], nargs=-1, metavar=usage_word(sub), type=click.Path()),
            click.Option(["--config"], type=click.Path(), metavar="RECIPE.yaml", help="The recipe."),
            *switches,
            click.Option(["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_help_all,
                         help="This help with every key."),
        ]  # fmt: skip
        settings = {
            "token_normalize_func": normalised_flag,
            "help_option_names": ["-h", "--help"],
            "max_content_width": 120,
        }
        super().__init__(name, params=params, callback=run, help=sub.help, context_settings=settings)
        self.sub = sub

    @cached_property
    def keys(self) -> list[KeyOption]:
        """The recipe's keys, but for one that is a switch; made when the command runs or its help is wanted."""
        return [option for option in key_options(self.sub.aliases) if option.key not in SWITCHES]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Switches and keys."""
        return [*super().get_params(ctx), *self.keys]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Flags in any order; those of open sections are taken out first, for they have no options.

        `ctx.meta` holds `keys`, the text given for each key, and `origins`, the flag by which it was given.
        """
        given: dict[str, str] = ctx.meta.setdefault("keys", {})
        origins: dict[str, str] = ctx.meta.setdefault("origins", {})
        names = {f"--{normalised_flag(name)}": option.key for option in self.keys for name in option.shown}
        wanting = {f"--{normalised_flag(name)}" for option in self.keys if not option.alone for name in option.shown}
        rest: list[str] = []
        words = list(args)
        while words:
            word = words.pop(0)
            flag, equals, value = word.partition("=")
            key = flag.removeprefix("--").replace("-", "_")
            is_open = flag.startswith("--") and key.startswith(OPEN)
            if (is_open or normalised_flag(flag) in names) and not equals and words and not words[0].startswith("--"):
                value, equals = words.pop(0), "="  # here, because a value may begin with a dash
            elif normalised_flag(flag) in wanting and not equals and not ctx.resilient_parsing:
                raise click.UsageError(f"{flag} needs a value", ctx)
            if is_open:
                given[key], origins[key] = value if equals else "true", flag
                continue
            if normalised_flag(flag) in names:
                origins[names[normalised_flag(flag)]] = flag
            rest.append(f"{flag}={value}" if equals else word)
        return super().parse_args(ctx, rest)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command's own flags and most used keys; with `--help-all` every key, by section."""
        own = [param for param in super().get_params(ctx) if isinstance(param, click.Option)]
        with formatter.section("Flags of this command"):
            formatter.write_dl([record for param in own if (record := param.get_help_record(ctx)) is not None])
        listed = {option.key: option for option in self.keys if not option.hidden}
        first = [*dict.fromkeys((*self.sub.aliases.values(), *self.sub.first))]
        title = "Its keys" if self.sub.aliases and not self.sub.first else "Most used keys"
        shown = [listed.pop(key) for key in first if key in listed]
        if shown:
            with formatter.section(title):
                formatter.write_dl([option.get_help_record(ctx) for option in shown])
        if not ctx.meta.get("all"):
            formatter.write_paragraph()
            formatter.write_text(f"`{ctx.command_path} --help-all` lists the other {len(listed)} keys.")
            return
        by_section: dict[str, list[KeyOption]] = {}
        for key, option in listed.items():
            by_section.setdefault(key.rpartition(".")[0], []).append(option)
        for section, options in by_section.items():
            with formatter.section(section or "Recipe"):
                formatter.write_dl([option.get_help_record(ctx) for option in options])


def _help_all(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["all"] = True
        click.echo(ctx.get_help())
        ctx.exit()


def parse_flags(words: Sequence[str], name: str = "config show") -> dict[str, Any]:
    """The tree of keys that flags stand for, as the command `name` reads them.

    Values are YAML, so `true`, `null`, `1e-3` and `[a, b]` mean what they mean in a recipe; a flag of a switch without
    a value is `true`.

    Raises:
        ConfigError: a value is no YAML.
        click.UsageError: a flag is neither a key nor one of the command's.
    """
    from limbeck.recipe import tree_of

    command = KeyCommand(name, SUBCOMMANDS[name], None)
    with command.make_context(name, list(words)) as ctx:
        return tree_of(ctx.meta["keys"], ctx.meta["origins"])
