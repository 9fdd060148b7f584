"""The command line: `tandem COMMAND`. It imports no torch before a command needs it."""

from tandem.cli.app import main

__all__ = ["main"]
