"""Microbenchmarks of attention: what runs, is it right, how fast. Exit code 1 when an implementation is wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import compare, peers, schema, session, table
from .case import Case
from .cases import OPS, all_cases, free, models
from .report import page

PRESETS = ("quick", "ci", "cpu", "masks", "linear", "decode", "model", "gpu", "full", *models.MODELS)
DEFAULT_PRESET = "quick"
FREE = ("dtype", "causal", "mask", "backward")  # options that say something about --shape


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="fastattn-bench", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="show cases, presets and implementations")
    check = commands.add_parser("check", help="environment and correctness, no timing")
    run = commands.add_parser("run", help="environment, correctness, speed")
    for command in (listing, check, run):
        _add_selection(command)
    for command in (check, run):
        command.add_argument("--json", metavar="FILE", help="write the report there, anew after every case")
        command.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's)")
        command.add_argument(
            "--backend",
            default="auto",
            choices=("auto", *peers.BACKENDS),
            help="hold fastattn to this one (default: auto)",
        )
        command.add_argument(
            "--impl", type=lambda text: text.split(","), default=[], metavar="NAME,...",
            help="measure these as well, or all; `list` names them",
        )  # fmt: skip
    run.add_argument("--rounds", type=_positive, metavar="N", help="rounds per case (default: as many as fit the time)")
    run.add_argument("--graph", action="store_true", help="replay CUDA graphs: no time of Python or the driver")
    check.set_defaults(rounds=None, graph=False)
    comparison = commands.add_parser("compare", help="two reports, judged by confidence intervals")
    comparison.add_argument("base", help="JSON of the earlier run")
    comparison.add_argument("new", help="JSON of the later run")
    comparison.add_argument(
        "--fail-if-slower", type=compare.share, metavar="5%",
        help="exit code 1 if fastattn is slower by more than that beyond doubt, or no longer right",
    )  # fmt: skip
    comparison.add_argument(
        "--relative", action="store_true", help="compare times over the baseline's: a slower machine does not count"
    )
    report = commands.add_parser("report", help="one HTML page of a report")
    report.add_argument("results", help="JSON of a run")
    report.add_argument("-o", "--output", default="report.html", metavar="FILE")
    return top


def _add_selection(command: argparse.ArgumentParser) -> None:
    command.add_argument("--preset", choices=PRESETS, help=f"which cases (default of run and check: {DEFAULT_PRESET})")
    command.add_argument("--case", metavar="PATTERN", help="only cases whose name contains this")
    command.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one and cases for it")
    command.add_argument(
        "--shape", type=_shape, action="append", metavar=free.SIZES, help="a case of your own; may be repeated"
    )
    command.add_argument(
        "--dtype", type=_dtypes, metavar="NAME,...", help="of --shape: fp32, bf16, fp16 (default fp32)"
    )
    command.add_argument("--causal", nargs="?", const="top_left", choices=("top_left", "bottom_right"))
    command.add_argument("--mask", metavar="EXPRESSION", help='of --shape: such as "causal() & window(1024)"')
    command.add_argument("--backward", action="store_true", help="of --shape: the backward pass")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    try:
        return free.parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(OPS["softmax"].DTYPES):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(OPS['softmax'].DTYPES)}, got {text!r}")
    return names


@contextmanager
def refusals() -> Iterator[None]:
    """What cannot be done as asked is one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"fastattn-bench: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def select(args: argparse.Namespace) -> list[Case]:
    """The cases that are asked for. Errors: ValueError for options that contradict each other."""
    if args.shape:
        if args.preset:
            raise ValueError("--shape and --preset exclude each other")
        if args.causal and args.mask:
            raise ValueError("--causal and --mask exclude each other: write causal() & ... in the mask")
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        found = free.cases(args.shape, args.dtype or ["fp32"], args.causal, args.mask, args.backward, device)
    else:
        if any(getattr(args, name) for name in FREE):
            raise ValueError("--dtype, --causal, --mask and --backward need a --shape")
        found = [case for case in all_cases() if args.preset in (None, *case.presets)]
        if args.preset == "full":
            found = [case for case in all_cases() if case.presets != ("ci",)]
        devices = {case.device for case in found}
        usable = "cuda" in devices and torch.cuda.is_available()
        device = args.device or ("cuda" if usable or devices == {"cuda"} else "cpu")
        if args.command != "list" or args.device:
            found = [case for case in found if case.device == device]
    return [case for case in found if args.case is None or args.case in case.name]


def check_names(names: list[str]) -> None:
    """Errors: ValueError for an implementation that no case of any op has."""
    known = {name for case in all_cases() for name in OPS[case.op].peers(case)}
    unknown = set(names) - known - {peers.ALL, "fastattn"}
    if unknown:
        raise ValueError(
            f"no implementation is called {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
        )


def measure(args: argparse.Namespace) -> int:
    if args.preset is None and not args.shape:
        args.preset = DEFAULT_PRESET
    with refusals():
        cases = select(args)
        check_names(args.impl)
        if args.command == "check" and args.preset in session.WITHOUT_CASES:
            raise ValueError(
                f"preset {args.preset} has no cases to check: `run` trains it, and judges its losses and words"
            )
        if args.graph and any(case.device != "cuda" for case in cases):
            raise ValueError("--graph replays CUDA graphs: these cases run on the CPU")
        if args.json and not Path(args.json).parent.is_dir():
            raise ValueError(f"there is no folder {Path(args.json).parent} to write {Path(args.json).name} to")
    if any(case.device == "cuda" for case in cases) and not torch.cuda.is_available():
        print(f"n/a: preset {args.preset} needs a CUDA device, and torch sees none")
        return 2
    if not cases and args.preset not in session.WITHOUT_CASES:
        print(f"no case of preset {args.preset} contains {args.case!r}; see `fastattn-bench list`")
        return 2
    return session.Session(args, cases).run(timed=args.command == "run")


def show(args: argparse.Namespace) -> int:
    with refusals():
        cases = select(args)
    table.cases(cases)
    names: dict[str, None] = {name: None for case in cases for name in OPS[case.op].peers(case)}
    print(f"\npresets: {', '.join(PRESETS)}\nimplementations: fastattn, {', '.join(names)}")
    return 0


def judge(args: argparse.Namespace) -> int:
    with refusals():
        base, new = schema.load(args.base), schema.load(args.new)
    return compare.judge(base, new, args.fail_if_slower, args.relative)


def write_page(args: argparse.Namespace) -> int:
    with refusals():
        report = schema.load(args.results)
        Path(args.output).write_text(page.html(report, Path(args.results).name))
    print(f"wrote {args.output}")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    commands = {"list": show, "run": measure, "check": measure, "compare": judge, "report": write_page}
    return commands[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
