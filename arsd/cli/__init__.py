"""The command line: ``arsd generate | describe | verify | bench | evaluate | profile | ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from arsd.cli.common import show_warnings_in_one_line
from arsd.errors import ArsdError
from arsd.plugins import import_plugin


class _Parser(argparse.ArgumentParser):
    """A mistake is one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print the mistake and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """All commands; each module adds its own."""
    import arsd
    from arsd.cli import app, bench, check_rule, demo, describe, evaluate, generate, models, profile, train, verify

    parser = _Parser(prog="arsd", description="Fast autoregressive image generation that proves what it did.")
    parser.add_argument("--version", action="version", version=f"arsd {arsd.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (generate, describe, verify, bench, evaluate, app, profile, check_rule, demo, models, train):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake is one line on stderr and exit status 2."""
    arguments = build_parser().parse_args(argv)
    show_warnings_in_one_line()
    try:
        for plugin in getattr(arguments, "plugins", ()):  # they register what the command's options may name
            import_plugin(plugin)
        return int(arguments.run(arguments) or 0)
    except ArsdError as error:
        print(f"arsd: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"arsd: {error.strerror or error}" + (f": {error.filename}" if error.filename else ""), file=sys.stderr)
        return 2
    except MemoryError:
        print("arsd: not enough memory: lower the window, the batch or the number of threads", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        print("arsd: not enough memory: lower the window, the batch or the size of the model", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("arsd: interrupted", file=sys.stderr)
        return 130
