"""Open a page in the browser: drop images and scans, type sentences, see what is found and how sure the model is.

    pvl-adapter app runs/MNI152-mni152-seed0/best --open
    pvl-adapter app MODEL --examples questions.csv --num-samples 8 --port 8000

The page asks nothing of the network and keeps nothing: what is dropped lies in memory and in a temporary folder, which
goes when the page ends (Ctrl-C). It is served to this computer alone unless --host says otherwise, and has no password:
give no address that strangers can reach. See docs/app.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
from pathlib import Path

from pvl_adapter.cli.options import add_model_options, load_model, stop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add = parser.add_argument
    add("--num-samples", help="a number, 0 for one pass without sampling, or auto (as calibrated, else 8)")
    add("--examples", type=Path, metavar="PATH", help="to click: a folder of images, or a table (a made-up head)")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is all of this computer's (%(default)s)")
    add("--port", type=int, help="port to listen at (7860, or the next that is free)")
    add("--open", action=argparse.BooleanOptionalAction, help="open a browser", default=False)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    samples = args.num_samples
    if samples not in (None, "auto") and not samples.isdecimal():
        parser.error(f"--num-samples is {samples}, expected a number, 0 or more, or auto")
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"--port is {args.port}, expected 1 to 65535")
    args.num_samples = int(samples) if samples and samples.isdecimal() else samples
    with tempfile.TemporaryDirectory(prefix="pvl-adapter-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = folder
        try:
            return serve(args)
        finally:
            tempfile.tempdir = None


def serve(args: argparse.Namespace) -> int:
    """Until Ctrl-C, or a request to end."""
    from pvl_adapter.app import build
    from pvl_adapter.app.examples import examples_of

    examples = None if args.examples is None else examples_of(args.examples)
    page = build(load_model(args), name=args.model, num_samples=args.num_samples, examples=examples)
    where = {"server_name": args.host, "server_port": args.port, "inbrowser": args.open}
    try:
        page.launch(**where, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        stop(f"--host {args.host} --port {args.port} cannot be had ({error}); give another, or leave them out")
    taken = " (7860 is taken)" if args.port is None and page.server_port != 7860 else ""
    print(f"{args.model} is at {page.local_url}{taken}; Ctrl-C ends it", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore the first
        signal.signal(number, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("ended", flush=True)
    finally:
        page.close(verbose=False)
    return 0
