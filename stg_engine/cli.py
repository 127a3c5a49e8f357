"""The command `stg-engine`: parse arguments, call the code that does the work, print results and errors."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from stg_engine.bench import command as bench_command
from stg_engine.bench.sweep import add_arguments as add_sweep_arguments

PROG = "stg-engine"
EXIT_FAILURE, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Errors are one line on stderr, with --debug a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = _parser().parse_args(argv)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _warn(message)
            args.run(args)
    except KeyboardInterrupt as stop:
        return _fail(f"interrupted; {str(stop) or 'nothing was written'}", EXIT_INTERRUPTED)
    except Exception as error:
        if "--debug" in argv:
            raise
        if isinstance(error, ValueError | TypeError):
            return _fail(error, EXIT_BAD_INPUT)
        return _fail(f"{type(error).__name__}: {error}", EXIT_FAILURE)
    return 0


def _fail(message: object, status: int) -> int:
    print(f"{PROG}: error: {_one_line(message)}", file=sys.stderr)
    return status


def _warn(message: object) -> None:
    print(f"{PROG}: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _generate(args: argparse.Namespace) -> None:
    from stg_engine.generate import Request, generate

    print(generate(_typed(Request, args), _warn))


def _plan(args: argparse.Namespace) -> None:
    from stg_engine.settings import Options, choose_setting, find_model

    options = _typed(Options, args)
    model = find_model(options.model)
    setting = choose_setting(model, options)
    plan = setting.plan(model)
    print(f"{model.name}: {model.spec.family}, {model.num_layers} blocks\n{setting}\n\n{plan}")


def _bench(args: argparse.Namespace) -> None:
    bench_command.bench(_typed(bench_command.BenchRequest, args))


def _sweep(args: argparse.Namespace) -> None:
    from stg_engine.bench import sweep_output
    from stg_engine.bench.sweep import SweepRequest, sweep

    request = _typed(SweepRequest, args)
    print(sweep_output.table(sweep(request)))
    if request.plot is not None:
        sweep_output.plot(request.out, request.plot, request.force)
    print(f"\nwrote {', '.join(filter(None, (request.out, request.plot)))}")


def _typed(kind: type[Any], args: argparse.Namespace) -> Any:
    return kind(**{field.name: getattr(args, field.name) for field in fields(kind)})


def _env(args: argparse.Namespace) -> None:
    import stg_engine
    from stg_engine import env

    lines = {"stg_engine": stg_engine.__version__, **env.describe()}
    width = max(map(len, lines)) + 1
    for name, value in lines.items():
        print(f"{name + ':':<{width}} {value}")


class _Parser(argparse.ArgumentParser):
    """ArgumentParser that raises ValueError where the standard one prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        import stg_engine

        print(f"{PROG} {stg_engine.__version__}")
        parser.exit()


def _parser() -> _Parser:
    parser = _Parser(prog=PROG, description="Video generation with Spatiotemporal Skip Guidance.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{generate,plan,bench,sweep,env}")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> _Parser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        added.set_defaults(run=run)
        added.add_argument("--debug", action="store_true", help="print a traceback where something fails")
        return added

    generate = command("generate", _generate, "turn a prompt into a clip, a contact sheet and a metadata file")
    _add_setting(generate)
    _add_run(generate)
    plan = command(
        "plan", _plan, "print which branches have rows at which block and what a step costs; loads no weights"
    )
    _add_setting(plan)
    bench_command.add_arguments(
        command("bench", _bench, "measure what a guided step costs, against what could be used instead")
    )
    add_sweep_arguments(command("sweep", _sweep, "what each layer's skip costs, changes and does to clips, as CSV"))
    command("env", _env, "print what a bug report needs")
    return parser


def _add_setting(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and guidance (what is not given is the preset's, or the model's own)")
    group.add_argument(
        "--model", metavar="M", help="pipeline folder, hub id or, for plan, a preset's name (default: shipped)"
    )
    group.add_argument(
        "--preset",
        metavar="NAME",
        help="published setting, such as ltx-video-2b, or with --stg-layers a way of combining, such as wan-official",
    )
    group.add_argument("--guidance-scale", type=float, metavar="G", help="CFG scale g; 1 or less is off")
    group.add_argument("--stg-scale", type=float, metavar="S", help="skip scale s; 0 is off")
    group.add_argument(
        "--stg-layers", type=_layers, metavar="K,K,...", help="blocks to skip, 0-based, such as 19 or 14,19"
    )
    group.add_argument("--stg-mode", metavar="MODE", help="residual (STG-R) or attention (STG-A)")
    group.add_argument("--stg-axis", metavar="AXIS", help="spatial or temporal, in models with blocks for each (Latte)")
    group.add_argument("--rescale", type=float, metavar="R", help="std-rescale, 0 (off) to 1")


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("clip (what is not given is the model's default)")
    group.add_argument(
        "--prompt", metavar="TEXT", help="what the clip shows (needed unless the model is the shipped one)"
    )
    group.add_argument("--negative-prompt", metavar="TEXT", help="what it must not show (default: empty)")
    group.add_argument("--out", required=True, metavar="CLIP.mp4", help="also writes CLIP.png and CLIP.json")
    group.add_argument("--force", action="store_true", help="overwrite them")
    group.add_argument(
        "--seed", type=_integer(0, 2**63 - 1), default=0, metavar="N", help="seed of the noise (default: 0)"
    )
    group.add_argument("--steps", type=_integer(1), metavar="N", help="denoising steps")
    group.add_argument("--frames", type=_integer(1), metavar="N", help="number of frames")
    group.add_argument("--height", type=_integer(1), metavar="N", help="pixels")
    group.add_argument("--width", type=_integer(1), metavar="N", help="pixels")
    group.add_argument(
        "--fps", type=_integer(1), metavar="N", help="frames per second in the file, and for a model that takes them"
    )
    group = parser.add_argument_group("execution")
    group.add_argument("--device", metavar="D", help="such as cuda, cuda:1, cpu (default: cuda where there is one)")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="(default: float32 on cpu, else bfloat16)"
    )
    group.add_argument("--execution", choices=("batched", "serial"), default="batched", help="(default: %(default)s)")
    group.add_argument("--kernels", choices=("auto", "off"), default="auto", help="(default: %(default)s)")
    group.add_argument(
        "--compile",
        nargs="?",
        const="default",
        choices=("default", "max-autotune-no-cudagraphs"),
        metavar="MODE",
        help="compile the blocks (torch.compile): default, or max-autotune-no-cudagraphs; takes its time at the start",
    )
    group.add_argument("--max-rows", type=_integer(1), metavar="N", help="at most N rows at once (default: all)")
    group.add_argument("--graph", action="store_true", help="launch each step as one CUDA graph")
    group.add_argument(
        "--compare",
        action="store_true",
        help="add rows without guidance and with CFG alone to the contact sheet; time plain passes and check parity",
    )


def _integer(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; it must be an integer from {low} to {high}")
        return value

    return parse


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; it must be block numbers such as 19 or 14,19"
        ) from None
