"""`limbeck --install-completion`: the shell completes commands, flags and the choices of keys.

The one idea: click writes the script; this puts it where the user's shell reads it, and nothing else of theirs changes.
"""

from pathlib import Path

import click
from click.shell_completion import get_completion_class

from limbeck.errors import ConfigError

VARIABLE = "_LIMBECK_COMPLETE"
_FILES = {"bash": ".bashrc", "zsh": ".zshrc"}
_SHELLS = ("bash", "zsh", "fish")


def script(command: click.Command, shell: str) -> str:
    """What a shell runs to complete the command.

    Raises:
        ConfigError: click knows no completion for that shell.
    """
    kind = get_completion_class(shell)
    if kind is None or shell not in _SHELLS:
        raise ConfigError(f"--install-completion: no completion for the shell {shell!r}; choose bash, zsh or fish.")
    return kind(command, {}, "limbeck", VARIABLE).source()


def install(command: click.Command, shell: str | None) -> Path:
    """Install the completion for a shell; returns the file that was written.

    Args:
        command: the root.
        shell: bash, zsh or fish; None finds out which one is running.

    Raises:
        ConfigError: the shell cannot be told, or has no completion.
    """
    shell = shell or _running_shell()
    text, home = script(command, shell), Path.home()
    if shell == "fish":
        path = home / ".config" / "fish" / "completions" / "limbeck.fish"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path
    path = home / ".local" / "share" / "limbeck" / f"completion.{shell}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(("autoload -Uz compinit && compinit\n" if shell == "zsh" else "") + text)
    start, line = home / _FILES[shell], f'. "{path}"\n'
    held = start.read_text() if start.exists() else ""
    if line not in held:
        with start.open("a") as file:
            file.write(("" if held.endswith("\n") or not held else "\n") + line)
    return path


def _running_shell() -> str:
    import shellingham

    try:
        name: str = shellingham.detect_shell()[0]
    except shellingham.ShellDetectionFailure:
        raise ConfigError("--install-completion: which shell? Name one: bash, zsh or fish.") from None
    return name
