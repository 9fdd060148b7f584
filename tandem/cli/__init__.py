"""The command line: `tandem COMMAND`. It imports torch only when a command needs it."""

from tandem.cli.app import main

__all__ = ["main"]
