"""The `limbeck` command: one table of subcommands, nothing heavy imported until one runs.

    limbeck COMMAND [RECIPE.yaml] [--section.key value …] [--json]

Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 interrupted, 143 terminated.
"""

from limbeck.cli.main import console, main

__all__ = ["console", "main"]
