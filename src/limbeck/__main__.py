"""`python -m limbeck` is the `limbeck` command."""

from limbeck.cli import console

if __name__ == "__main__":
    console()
