"""`r8 watch | report | serve | plot | demo | suspects | export | crash | doctor`, a function each.

A room is loaded when its command runs.

Exit status: 0 done, 1 the doctor found something wrong, 2 a mistake in the command (one sentence says what to do),
130 interrupted, 141 whoever read the output left.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from learnit_r8._version import __version__
from learnit_r8.core.clock import Clock
from learnit_r8.errors import ConfigError, R8Error

MISTAKE, INTERRUPTED, READER_LEFT = 2, 130, 141
_RUN_HELP = "the folder that the run got as log_dir"


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one sentence, like everything else here."""

    def error(self, message: str) -> NoReturn:
        self.exit(MISTAKE, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    Args:
        arguments: Those after the program's name; `sys.argv` when None.
    """
    options = _parser().parse_args(arguments)
    try:
        status = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_LEFT
    except KeyboardInterrupt:
        return INTERRUPTED
    except (R8Error, OSError) as error:
        print(f"r8 {options.command}: {_sentence(error)}", file=sys.stderr)
        return MISTAKE
    return int(status)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="r8", description="Look at runs of learnit::r8.")
    parser.add_argument("--version", action="version", version=f"learnit_r8 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    sub = command("watch", _watch, "show runs that train elsewhere, live, without touching them")
    sub.add_argument("runs", nargs="+", metavar="RUN_DIR", help=f"{_RUN_HELP}; the first is shown, others overlaid")
    once = sub.add_mutually_exclusive_group()
    once.add_argument("--once", action="store_true", help="print one frame as text")
    once.add_argument("--json", action="store_true", help="print the numbers")
    sub.add_argument("--size", type=_size, metavar="WxH", help="size of the frame for --once, as 120x35")

    sub = command("report", _report, "write a run's report, or several runs side by side, as one HTML file")
    sub.add_argument("runs", nargs="+", metavar="RUN_DIR", help=_RUN_HELP)
    sub.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the file (%(default)s)")
    about = "a Python function that returns a text or a picture (array) of a sample, given its id, as mydata:show"
    sub.add_argument("--describe", metavar="MODULE:FUNCTION", help=about)

    sub = command("serve", _serve, "show runs in a browser, live, as their report")
    sub.add_argument("runs", nargs="+", metavar="RUN_DIR", help=_RUN_HELP)
    sub.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine only)")
    sub.add_argument("--port", type=_whole(0), default=6008, help="its port (%(default)d); 0 takes a free one")
    sub.add_argument("--token", default="", help="what each request must bring; made up where HOST is not this machine")

    sub = command("plot", _plot, "draw loss and learning rate as a picture, or write them as CSV")
    sub.add_argument("runs", nargs="+", metavar="RUN_DIR", help=_RUN_HELP)
    kind = sub.add_mutually_exclusive_group()
    kind.add_argument("--png", action="store_true", help="a picture (the default)")
    kind.add_argument("--csv", action="store_true", help="a table of one run: min, max, mean, smoothed loss, rate")
    sub.add_argument("-o", "--output", type=Path, help="the file (plot.png; a table goes to standard output)")

    sub = command("demo", _demo, "show a synthetic run with spikes, rollbacks and checkpoints")
    sub.add_argument("--ui", default="auto", help="auto, curses, rich or log")
    sub.add_argument("--speed", type=_speed, default=5.0, help="times faster than its own clock (%(default)g)")
    sub.add_argument("--epochs", type=_whole(1), default=10, help="epochs of 400 steps of 50 ms (%(default)d)")
    sub.add_argument("--seed", type=_whole(0), default=0)
    sub.add_argument("--log-dir", type=Path, help="also write the event log there, for r8 watch")

    sub = command("suspects", _suspects, "list the samples whose loss stays high, and whether they look wrong")
    sub.add_argument("folder", metavar="RUN_DIR", help=_RUN_HELP)
    sub.add_argument("--top", type=_whole(1), default=50, help="how many (%(default)d)")
    sub.add_argument("--csv", action="store_true", help="comma-separated, all digits")

    sub = command("export", _export, "write what a checkpoint knows of every sample as a table")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint, or the folder of a run's (the newest one)")
    sub.add_argument("--format", "--to", choices=("csv", "parquet", "cleanlab"), default="csv", help="(%(default)s)")
    sub.add_argument("-o", "--output", type=Path, help="the file (samples.csv, samples.parquet)")

    sub = command("crash", _crash, "print the evidence that a diverged run left")
    sub.add_argument("path", metavar="PATH", help="the bundle's folder, its crash.json, or the run's folder")
    sub.add_argument("--all", action="store_true", help="all steps, ids and settings")

    sub = command("doctor", _doctor, "check the installation, the terminal, the folders, and a run of one second")
    sub.add_argument("run_dir", nargs="?", help=argparse.SUPPRESS)
    return parser


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and 0 < int(width) <= 500 and 0 < int(height) <= 300):
        raise argparse.ArgumentTypeError(f"give columns x rows up to 500x300, as 120x35, not {text!r}")
    return int(width), int(height)


def _whole(low: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"give a whole number >= {low}, not {text!r}")
        return int(text)

    return convert


def _speed(text: str) -> float:
    with suppress(ValueError):
        if 0.01 <= (value := float(text)) <= 1000.0:
            return value
    raise argparse.ArgumentTypeError(f"give a number from 0.01 to 1000, not {text!r}")


def _folders(options: argparse.Namespace) -> list[Path]:
    from learnit_r8.watch import find_run

    return [find_run(folder) for folder in options.runs]


def _watch(options: argparse.Namespace) -> int:
    from learnit_r8.watch import WatchedRun
    from learnit_r8.watch.screen import frame, show

    runs = [WatchedRun(folder) for folder in _folders(options)]
    clock = Clock()
    if not (options.once or options.json):
        show(runs, os.environ, clock.wall)
        return 0
    for run in runs:
        run.read_all()
    now = clock.wall()
    if options.json:
        numbers = [run.to_json(now) for run in runs]
        print(json.dumps(numbers if len(numbers) > 1 else numbers[0], allow_nan=False, indent=1))
    else:
        width, height = options.size or shutil.get_terminal_size((120, 35))
        print(_printable(frame(runs, width, height, now, os.environ)))
    return 0


@contextmanager
def _needed(command: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError([f'r8 {command} needs {error.name}: pip install "learnit_r8[report]"']) from error


def _report(options: argparse.Namespace) -> int:
    from learnit_r8.report.run_data import load_run

    with _needed("report"):
        from learnit_r8.report.page import write_report
    _check_folder(options.output)
    describe = None if options.describe is None else _function(options.describe)
    write_report([load_run(folder) for folder in _folders(options)], options.output, describe)
    print(f"{options.output} ({options.output.stat().st_size / 1e6:.1f} MB)")
    return 0


def _function(name: str) -> Callable[..., Any]:
    """Return a function of a module that Python finds from here, given as `module:function`."""
    module, _, function = name.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError([f"--describe must be MODULE:FUNCTION, as mydata:show, got {name!r}: {error}"]) from error
    finally:
        sys.path.remove(here)  # the module may have put its own in front
    return found


def _serve(options: argparse.Namespace) -> int:
    with _needed("serve"):
        from learnit_r8.report.serve import Server
    with Server(_folders(options), options.host, options.port, options.token) as server:
        print(f"{server.url}  (Ctrl-C ends)", flush=True)
        server.serve_forever()
    return 0


def _plot(options: argparse.Namespace) -> int:
    from learnit_r8.report.plot import as_csv, write_png
    from learnit_r8.report.run_data import load_run

    if options.csv and len(options.runs) > 1:
        raise ConfigError(["--csv writes one run: give one RUN_DIR"])
    output = options.output or Path("plot.png")
    to_file = not options.csv or options.output is not None
    if to_file:
        _check_folder(output)
    runs = [load_run(folder) for folder in _folders(options)]
    if not options.csv:
        write_png(runs, output)
    elif to_file:
        output.write_text(as_csv(runs[0]) + "\n", encoding="utf-8")
    print(output if to_file else as_csv(runs[0]))
    return 0


def _check_folder(output: Path) -> None:
    """Find out before the work, not after it, that there is no place for its result."""
    if output.is_dir():
        raise ConfigError([f"{output} is a folder: give a file with -o"])
    if not output.parent.is_dir():
        raise ConfigError([f"there is no folder {output.parent}: make it, or give another file with -o"])


def _demo(options: argparse.Namespace) -> int:
    from learnit_r8.watch.demo import play

    play(options.ui, options.speed, options.epochs, options.seed, options.log_dir, os.environ, Clock())
    return 0


def _suspects(options: argparse.Namespace) -> int:
    from learnit_r8.report.suspects import as_csv, as_text, logged_catalog, rows, verdict
    from learnit_r8.watch import find_run

    catalog = logged_catalog(find_run(options.folder))
    found = rows(catalog, options.top)
    print(as_csv(found) if options.csv else f"{as_text(found)}\n{verdict(catalog)}")
    if len(found) < min(options.top, catalog.num_samples):
        print(f"r8 suspects: a run logs its {len(catalog.suspects)} worst samples", file=sys.stderr)
    return 0


def _export(options: argparse.Namespace) -> int:
    from learnit_r8.report.export import sample_table, write_table

    ending = "parquet" if options.format == "parquet" else "csv"
    output = options.output or Path(f"samples.{ending}")
    _check_folder(output)
    table = sample_table(options.checkpoint)
    write_table(table, output, options.format)
    print(f"{output} ({len(table['id'])} samples, {output.stat().st_size / 1e6:.1f} MB)")
    return 0


def _crash(options: argparse.Namespace) -> int:
    from learnit_r8.report.crash import crash_text

    print(_printable(crash_text(options.path, everything=options.all)))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from learnit_r8.report.doctor import as_text, examine

    if run := options.run_dir:
        what = "it looks at the place where a run would start, and takes no RUN_DIR. Of a run,"
        raise ConfigError([f"{what} `r8 watch --once {run}` tells how it stands, `r8 crash {run}` why it diverged"])
    topic, wrong = "", 0
    for finding in examine(Path.cwd(), os.environ, Clock()):
        print(as_text(finding, topic), flush=True)
        topic = finding.topic
        wrong += finding.good is False
    print(f"\n{'All is well.' if not wrong else f'{wrong} marked with ! need a look.'}")
    return 1 if wrong else 0


def _printable(text: str) -> str:
    """Return text that standard output can take: a pipe in the C locale is ASCII."""
    encoding = sys.stdout.encoding or "ascii"
    return text.encode(encoding, "replace").decode(encoding)
