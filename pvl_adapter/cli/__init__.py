"""The command line: `pvl-adapter COMMAND`, or `python -m pvl_adapter COMMAND`.

A command is a module of this package with `add_arguments(parser)` and `run(args, parser)`, which returns the exit code:
0 if all went well, 1 if an input failed; 2 for what cannot be begun is raised by `stop` or by argparse. Only the module
that is asked for is imported, and none imports torch before it computes.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from pvl_adapter.cli.options import stop

COMMANDS = {
    "predict": "find what sentences describe in images, scans and DICOM series",
    "evaluate": "score a model on images with masks",
    "calibrate": "count on held-out subjects what a model may promise",
    "info": "say what a model is, without loading it",
    "list": "list the published checkpoints, with the scores that are known",
    "download": "download published datasets",
    "convert": "make an official .pth file into a folder that needs no network",
    "export": "write a model as ONNX",
    "app": "open a page for images and sentences in the browser",
}
EXAMPLES = """MODEL is a folder, a .pth file, or a repository of the hub, as TahaKoleilat/MedCLIPSeg.

  pvl-adapter predict MODEL scan.nii.gz --text "the left hippocampus" --output found
  pvl-adapter predict --help
"""
_MODULES = {"list": "listing"}  # a module `list` would hide the builtin here


class Parser(argparse.ArgumentParser):
    """Whose errors are one line; argparse prints all options before them."""

    def error(self, message: str) -> NoReturn:
        stop(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    if argv is None:  # as a program
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without its place in the code
    argv = sys.argv[1:] if argv is None else list(argv)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    if chosen is not None and chosen not in COMMANDS:
        near = get_close_matches(chosen.lower(), COMMANDS)
        stop(f"there is no command {chosen!r}" + (f"; did you mean {near[0]}?" if near else "; see pvl-adapter --help"))
    parser = Parser(
        prog="pvl-adapter",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="Text-guided segmentation with uncertainty. Not a medical device.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND    ", title="commands", prog="pvl-adapter")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:
            module = import_module(f"pvl_adapter.cli.{_MODULES.get(name, name)}")
            command.description = module.__doc__
            module.add_arguments(command)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        of = commands.choices[args.command] if args.command else parser
        near = get_close_matches(unknown[0].partition("=")[0], re.findall("--[a-z-]+", of.format_help()), n=1)
        of.error(f"unrecognized arguments: {' '.join(unknown)}" + "".join(f", did you mean {each}?" for each in near))
    if args.version:
        from pvl_adapter import __version__

        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        code = int(module.run(args, commands.choices[args.command]))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads the output has seen enough, as in `pvl-adapter list | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to be written
        return 141
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "pvl_adapter":
            raise
        stop(f'{error.name or error} is not installed: pip install "pvl-adapter[app]"')
    except (OSError, ValueError, TypeError) as error:
        if type(error) is TypeError:  # a bug; UnsupportedModelError is one for the user
            raise
        stop(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
