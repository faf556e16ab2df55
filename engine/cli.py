"""``tritium <verb>``: what a user types. Verbs import what they need as they run: ``tritium --help`` loads no torch.

Flags are the fields of dataclasses (Config for ``train``, one small class per other verb); tyro writes the help
and builds the values, ``normalise`` reads what the user typed and answers mistakes with the nearest names. Exit
status: 0 done, 1 could not be done, 2 not understood, 130 stopped by Ctrl-C. TRITIUM_DEBUG=1 shows the
traceback of an expected error too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import fnmatch
import gc
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

try:
    import tyro
except ModuleNotFoundError as missing:  # a bare Python: what reads no flags by it works all the same
    if missing.name != "tyro":
        raise
    tyro = None  # type: ignore[assignment]

from tritium.engine import presets, waiting
from tritium.engine.config import Config, ConfigError
from tritium.engine.report import Progress, Reporter, bits_table, closing_report, duration, launcher, progress_line


class UsageError(Exception):
    """What the user typed is not understood; the message names the nearest things that are. Exit status 2."""


class MissingPackage(Exception):
    """A package that tritium needs for what was asked is not installed. Exit status 1."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status. argv: without the program's name; default: the command line."""
    waiting.begin()  # before torch loads its OpenMP
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a replaced stream
            # a terminal that has no "×" must not stop a run
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments else ""
    try:
        return _dispatch(arguments)
    except UsageError as error:
        return _fail(verb, str(error), 2)
    except KeyboardInterrupt as interrupt:
        return _fail(verb, str(interrupt) or "stopped by Ctrl-C", 130)
    except BrokenPipeError:  # the reader went away: ``tritium kernels | head``
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        message = _expected(error)
        if message is None or os.environ.get("TRITIUM_DEBUG", "0") not in ("", "0"):
            raise
        return _fail(verb, message, 1)


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(_overview(), file=sys.stderr)
        return 2
    verb, rest = arguments[0], arguments[1:]
    if verb in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if verb in ("-V", "--version"):
        print(f"tritium {importlib.metadata.version('tritium')}")
        return 0
    if verb not in VERBS:
        what = "option" if verb.startswith("-") else "verb"
        raise UsageError(
            f"there is no {what} {verb!r}; the nearest verbs are {_nearest(verb, VERBS)}. All: {command()} --help"
        )
    try:
        return VERBS[verb][1](rest)
    except SystemExit as stop:  # tyro prints help and leaves
        return stop.code if isinstance(stop.code, int) else 1


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {about}" for name, (about, _) in VERBS.items())
    return (
        f"tritium trains GPTs fast, with every operation swappable.\n\nusage: {command()} VERB ...\n\n{verbs}\n\n"
        f"{command()} VERB --help explains a verb. To begin: {command()} train tiny"
    )


def command() -> str:
    """How this user calls tritium, for the commands we suggest: what they can paste."""
    called = pathlib.Path(sys.argv[0])
    if called.name != "tritium":
        return "tritium" if shutil.which("tritium") else f"{_python()} -m tritium.engine.cli"
    found = shutil.which("tritium")
    return "tritium" if found and pathlib.Path(found).absolute() == called.absolute() else _shown(called)


def _python() -> str:
    found = shutil.which("python")
    same = found and pathlib.Path(found).absolute() == pathlib.Path(sys.executable).absolute()
    return "python" if same else _shown(pathlib.Path(sys.executable))


def _shown(path: pathlib.Path) -> str:
    """A path relative to here when it lies below."""
    path = path.absolute()  # not resolved: .venv/bin/python is a link
    return str(path.relative_to(pathlib.Path.cwd())) if path.is_relative_to(pathlib.Path.cwd()) else str(path)


# ------------------------------------------------------------------------------------------------------------ mistakes


def _fail(verb: str, message: str, status: int) -> int:
    rank = os.environ.get("RANK", "0")
    place = f"[process {rank}] " if rank != "0" else ""
    name = f"tritium {verb}" if verb in VERBS else "tritium"
    print(f"{place}{name}: {message}", file=sys.stderr, flush=True)
    return status


def _expected(error: Exception) -> str | None:
    """The message of an error that is the user's to mend; None for one that is ours.

    Looks classes up among the modules that are loaded: an error of a class comes from its module, and nothing
    is imported for it.
    """
    places = (
        ("tritium.kernels.op", "KernelError"),
        ("tritium.engine.data.errors", "DataError"),
        ("tritium.engine.checkpoint", "CheckpointError"),
        ("tritium.engine.bad_steps", "BadSteps"),
        ("tritium.engine.generate", "GenerateError"),
        ("tritium.engine.hf", "HFError"),
        ("tritium.engine.plan", "OutOfMemory"),
    )
    known = [getattr(sys.modules[module], name, None) for module, name in places if module in sys.modules]
    if isinstance(error, (ConfigError, MissingPackage, *(k for k in known if k is not None))):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename else ""
        remedy = {
            errno.ENOSPC: "; free space, or choose a folder on another disk (train: --run.out)",
            errno.EDQUOT: "; free space, or choose a folder on another disk (train: --run.out)",
            errno.EACCES: "; choose a folder that may be written (train: --run.out)",
            errno.EROFS: "; choose a folder that may be written (train: --run.out)",
            errno.ENOENT: "; check the path",
        }.get(error.errno, "")
        return f"{error.strerror}{where}{remedy}"
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        first = str(error).splitlines()[0] if str(error) else "out of memory"
        return f"{first}; use fewer rows at a time (train: --train.micro_rows) or --train.recompute full"
    return None


def _nearest(word: str, known: Sequence[str] | Any, count: int = 3) -> str:
    """The ``count`` known names most like ``word``, best first; "train.steps" is as near to "steps" as to itself."""

    def likeness(name: str) -> float:
        candidates = (name, name.rpartition(".")[2])
        return max(
            difflib.SequenceMatcher(None, word, candidate).ratio() - 0.01 * i for i, candidate in enumerate(candidates)
        )

    return ", ".join(sorted(known, key=likeness, reverse=True)[:count])


# --------------------------------------------------------------------------------------------------------------- flags


def flags_of(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Flag → type for every field of a dataclass, fields of nested ones as section.field."""
    hints = typing.get_type_hints(kind)
    flags: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        flags |= flags_of(hint, f"{field.name}.") if dataclasses.is_dataclass(hint) else {prefix + field.name: hint}
    return flags


def normalise(argv: Sequence[str], kind: type, positional: Sequence[str] = (), about: str = "tritium") -> list[str]:
    """The user's arguments in the one form that tyro takes: positional values, then ``--flag=value``.

    Understands ``--a.b c``, ``--a.b=c``, ``-`` for ``_``, ``--kernels`` for ``--kernels.default``, ``--profile`` for
    ``--run.profile``,
    flags of yes-or-no fields bare, with ``no_`` or with a value, and lists as several values or repeated flags.
    UsageError for anything else, with the nearest names. about: the command whose ``--help`` lists the flags.
    positional: names of the fields given without a flag, in order.
    """
    flags = flags_of(kind)
    loose: list[str] = []
    found: dict[str, list[str]] = {}
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            return ["--help"]
        if not word.startswith("--") or word == "--":
            if word != "--":
                loose.append(word)
            continue
        typed, equals, value = word[2:].partition("=")
        name = typed.replace("-", "_")
        short = {"kernels": "kernels.default", "profile": "run.profile"}.get(name)
        name = short if short is not None and short in flags else name
        head, dot, last = name.rpartition(".")
        no = head + dot + last.removeprefix("no_")
        if name not in flags and last.startswith("no_") and flags.get(no) is bool:
            if equals:
                raise UsageError(f"--{typed} takes no value; use --{no} {value}")
            name, equals, value = no, "=", "false"
        if name not in flags or name in positional:
            near = _nearest(name, [f for f in flags if f not in positional])
            raise UsageError(
                f"there is no flag --{typed}; the nearest are --{near.replace(', ', ', --')}. All: {about} --help"
            )
        hint = flags[name]
        values = [value] if equals else []
        if hint is bool and not equals:
            values = [rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"]
        elif typing.get_origin(hint) is tuple:
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
        elif not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if not values:
            raise UsageError(f"--{name} wants {_wanted(hint)} and got none. All flags: {about} --help")
        for value in values:
            _check_value(name, hint, value)
        if typing.get_origin(hint) is tuple:
            found.setdefault(name, []).extend(values)
        else:
            found[name] = values[-1:]
    arguments = _positional(loose, positional, flags, about)
    for name, values in found.items():
        if flags[name] is bool:
            head, dot, last = name.rpartition(".")
            arguments.append(f"--{name}" if values[0].lower() == "true" else f"--{head}{dot}no-{last}")
        elif typing.get_origin(flags[name]) is tuple:
            arguments += [f"--{name}", *values]
        else:
            arguments.append(f"--{name}={values[0]}")
    return arguments


def _positional(loose: list[str], positional: Sequence[str], flags: dict[str, Any], about: str) -> list[str]:
    many = bool(positional) and typing.get_origin(flags[positional[-1]]) is tuple
    if len(loose) < len(positional):
        missing = " ".join(name.upper() for name in positional[len(loose) :])
        raise UsageError(f"{missing} is missing; see {about} --help")
    if len(loose) > len(positional) and not many:
        extra = loose[len(positional)]
        raise UsageError(f"{extra!r} is one argument too many; flags begin with --. All: {about} --help")
    return loose


def _wanted(hint: Any) -> str:
    if hint is int:
        return "a whole number"
    if hint is float:
        return "a number"
    if hint is bool:
        return "true or false"
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(str(value) for value in typing.get_args(hint) if value != "")
    return "a value"


def _check_value(name: str, hint: Any, value: str) -> None:
    good = True
    if hint in (int, float):
        try:
            good = not math.isnan(hint(value))
        except ValueError:
            good = False
    elif hint is bool:
        good = value.lower() in ("true", "false")
    elif typing.get_origin(hint) is Literal:
        good = value in typing.get_args(hint)
    if not good:
        raise UsageError(f"--{name} wants {_wanted(hint)}, not {value!r}")


SEEDS = (-(1 << 63), (1 << 64) - 1)  # what torch's generators take


def _check_seed(flag: str, seed: int, more: int = 0, limits: tuple[int, int] = SEEDS) -> None:
    """more: how many seeds after this one are drawn from, too."""
    low, high = limits[0], limits[1] - more
    if not low <= seed <= high:
        raise UsageError(f"{flag} must be from {low} to {high}, not {seed}, which the random generators do not take")


def _check_utf8(flag: str, text: str) -> None:
    """UsageError for text that came as bytes of another encoding: Python keeps these as surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise _not_utf8(flag, code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else code, text[: error.start]) from None


def _not_utf8(flag: str, code: int, before: str) -> UsageError:
    return UsageError(
        f"{flag} must be UTF-8 text, and byte 0x{code:02x} after {before[-20:]!r} is not, so it stands for no tokens; "
        "convert it, e.g. with iconv -f latin1 -t utf-8"
    )


def parse(
    kind: type, argv: Sequence[str], verb: str, about: str, *, positional: Sequence[str] = (), default: Any = None
) -> Any:
    """A dataclass from the command line; prints help and raises SystemExit when asked for it.

    verb: as typed after ``tritium``. about: what the help says first. default: an instance to start from.
    """
    if tyro is None:
        raise MissingPackage(
            f"flags are read by the package tyro, which {sys.executable} does not have; install it there "
            f"({_python()} -m pip install tyro), or in a clone use the Python that `make` sets up: .venv/bin/tritium"
        )
    arguments = normalise(argv, kind, positional, f"{command()} {verb}")
    options: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        kind, prog=f"{command()} {verb}", description=about, args=arguments, use_underscores=True,
        **options,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- train


class LiveReporter(Reporter):
    """One status line, updated in place at the bottom of a terminal; everything else scrolls above it."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        self._group, self._table, self._text, self._bar = Group, Table, Text, ProgressBar
        self._spinner = Spinner("dots")
        self._console = Console(highlight=False)
        self._what = "setting up"
        self._since = time.monotonic()
        self._last: Progress | None = None
        # twice a second, from a thread: the clock and the ETA move on between two logged steps
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=2, transient=True)
        self._live.start()

    def _render(self) -> Any:
        now = time.monotonic()
        line = self._table.grid(padding=(0, 1))
        p = self._last
        if p is None or self._what:
            line.add_row(self._spinner, self._text(f"{self._what} · {duration(now - self._since)}"))
            return line
        moved = dataclasses.replace(p, eta_s=max(0.0, p.eta_s - (now - self._since)) if p.step < p.steps else p.eta_s)
        line.add_row(self._spinner, self._text(progress_line(moved)))
        bar = self._table.grid(expand=True)  # a bar ends without a line break, a row with one
        bar.add_row(self._bar(total=max(1, p.steps), completed=p.step))
        return self._group(bar, line)

    def write(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def status(self, text: str) -> None:
        self._what, self._since = text, time.monotonic()

    def progress(self, p: Progress) -> None:
        self._last, self._what, self._since = p, "", time.monotonic()

    def close(self) -> None:
        """Leaves the last line standing, as text."""
        if self._live.is_started:
            self._live.stop()
            if self._last is not None:
                self.write(progress_line(self._last))


def _reporter() -> Reporter:
    live = sys.stdout.isatty() and not os.environ.get("CI") and os.environ.get("RANK", "0") == "0"
    return LiveReporter() if live else Reporter()


def _train(argv: list[str]) -> int:
    first = bool(argv) and not argv[0].startswith("-")
    helping = any(word in ("-h", "--help") for word in argv)
    if not first and not helping:
        flags = f" (a preset comes first, before {argv[0]})" if argv else ""
        raise UsageError(f"which preset?{flags}\n{_preset_list()}")
    start = _start(argv[0]) if first else Config()
    about = (
        "Train a GPT: TRITIUM TRAIN PRESET [FLAGS], or continue a run: give its folder instead of a preset.".replace(
            "TRITIUM TRAIN", f"{command()} train"
        )
    )
    about += f" Defaults below are those of {argv[0]}.\n\n" if first else "\n\n"
    verb = f"train {argv[0]}" if first else "train PRESET"
    config = parse(Config, argv[1:] if first else argv, verb, about + _preset_list(), default=start)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    config.check(processes)
    _check_seed("--train.seed", config.train.seed, processes - 1)
    _check_seed("--data.seed", config.data.seed)
    _find_modules_here(config.kernels.choices().values())

    reporter = _reporter()
    try:
        with _garbage_left():
            from tritium.engine import train

            outcome = train.main(config, reporter)
    except KeyboardInterrupt:
        folder = config.run.out or f"runs/{config.name}"
        raise KeyboardInterrupt(
            f"stopped at once, without saving; {command()} train {folder} goes on from its last checkpoint, if any"
        ) from None
    finally:
        reporter.close()
    if os.environ.get("RANK", "0") == "0":
        for message in outcome.messages:
            print(message)
        report = closing_report(
            outcome.status,
            outcome.out,
            outcome.checkpoint,
            max(outcome.step, config.train.steps),
            outcome.bits_per_byte,
            command=command(),
        )
        print(f"\n{report}", flush=True)
    return outcome.exit_code


@contextlib.contextmanager
def _garbage_left() -> Iterator[None]:
    """For the duration objects are looked through for garbage once in 500,000, and not in 700: torch and its compiler
    make a million as they are imported, which stay (0.3 s of a start; the steps themselves let all garbage lie).
    """
    before = gc.get_threshold()
    gc.set_threshold(500_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _preset_list() -> str:
    lines = [f"presets ({command()} train NAME; NAME --help shows its values):"]
    width = max(map(len, presets.names()))
    for name in presets.names():
        about = (importlib.import_module(f"tritium.engine.presets.{name}").__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {name:<{width}}  {about.removeprefix(name + ': ')}")
    return "\n".join(lines)


def _start(name: str) -> Config:
    """The configuration to start from: a preset's, or the stored one of a run folder."""
    if name in presets.names():
        return presets.load(name)
    folder = pathlib.Path(name)
    if not folder.is_dir():
        raise UsageError(
            f"{name!r} is neither a preset nor the folder of a run; the nearest presets are "
            f"{_nearest(name, presets.names())}. All: {command()} train --help"
        )
    config = _stored(folder)
    resume = "auto" if config.run.resume == "never" else config.run.resume
    return config.replace(run={"out": str(folder), "resume": resume})


def _stored(folder: pathlib.Path) -> Config:
    """The configuration of a run: its config.json, or that of its newest good checkpoint where this one is damaged."""
    path = folder / "config.json"
    problem = None
    try:
        values = json.loads(path.read_text())
        problem = _mistyped(values)
        if problem is None:
            return Config.from_json(json.dumps(values))
        problem = f"{path} is damaged: {problem}"
    except FileNotFoundError:
        problem = f"{folder} holds no config.json"
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; remove the field, or use the version that wrote it") from None
    except (ValueError, RecursionError) as error:
        problem = f"{path} is damaged: it is not JSON ({error})"
    remedy = "name the folder of a run, or begin one with a preset and --run.out OTHER_FOLDER; presets: "
    remedy += ", ".join(presets.names())
    if not any((folder / "checkpoints").glob("step_*")):
        raise ConfigError(f"{problem}, and there is no checkpoint to take the configuration from; {remedy}")
    from tritium.engine import checkpoint

    def warn(text: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {text}", file=sys.stderr)

    try:
        found = checkpoint.newest(folder, warn)
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"{problem}, and {error}\n{remedy}") from None
    if found is None or _mistyped(found.meta["config"]) is not None:
        raise ConfigError(f"{problem}, and no checkpoint holds a configuration that can be read; {remedy}")
    warn(f"{problem}; going on with the configuration that {found.path} holds")
    return found.config


def _mistyped(values: Any) -> str | None:
    """What is wrong with the types of a stored configuration; None when nothing is."""
    if not isinstance(values, dict):
        return f"it must be a JSON object, not {_json(values)}"
    for name, hint in flags_of(Config).items():
        section, dot, field = name.rpartition(".")
        part = values.get(section, {}) if dot else values
        if not isinstance(part, dict):
            return f"{section} must be a JSON object, not {_json(part)}"
        if field in part and not _fits(part[field], hint):
            wanted = {str: "a text", tuple[str, ...]: "a list of texts"}.get(hint, _wanted(hint))
            return f"{name} wants {wanted}, not {_json(part[field])}"
    return None


def _fits(value: Any, hint: Any) -> bool:
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, hint)


def _json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _find_modules_here(choices: typing.Iterable[str]) -> None:
    """A backend of the user's own, named as a module, may lie here, where a console script does not look."""
    for choice in choices:
        package = choice.partition(".")[0]
        here = pathlib.Path.cwd()
        if "." in choice and importlib.util.find_spec(package) is None and any(here.glob(f"{package}*")):
            sys.path.append(str(here))


# -------------------------------------------------------------------------------------------------------------- replay


def _replay(argv: list[str]) -> int:
    first = bool(argv) and not argv[0].startswith("-")
    if not first and not any(word in ("-h", "--help") for word in argv):
        raise UsageError(
            "which bad step? They are dumped into RUN/bad_steps when training skips them: "
            f"{command()} replay RUN/bad_steps/step_…"
        )
    about = (
        f"Repeat a bad step that training dumped: {command()} replay RUN/bad_steps/step_… [FLAGS]. Says whether its "
        "loss and gradient norm come out equal to the bit (exit status 0; 1 where not), and where numbers were first "
        "not finite, or largest. With flags (--kernels reference, --train.precision fp32, …) the step is repeated with "
        "these too: does the fault go away (1) or stay (0)? Defaults are the dump's.\n"
    )
    if not first:
        parse(Config, argv, "replay DUMP", about)
    from tritium.engine import replay

    dump = replay.open_dump(argv[0])
    asked = parse(Config, argv[1:], f"replay {argv[0]}", about, default=replay.as_it_was(dump))
    asked.check(int(dump.meta["world_size"]))
    _find_modules_here(asked.kernels.choices().values())
    _find_modules_here(dump.config.kernels.choices().values())
    return 0 if replay.replay(dump, asked) else 1


# ---------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class PlanOptions:
    """Flags of ``tritium plan``, beside those of ``tritium train``."""

    preset: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PRESET")]
    """A preset, or the folder of a run."""
    gpu: Literal["", "a100", "h100", "h200", "b200"] = ""
    """The GPU to plan for, which need not be here; empty: this machine."""
    gpus: int = 1
    """Devices that train together (data parallel)."""
    memory_gb: float = 0.0
    """Memory of a device that may be used, in GB (10⁹ bytes); 0: all that it has, or that is free on this machine."""
    json: str = ""
    """Write the plan as data to this file."""
    picture: str = ""
    """Draw the plan into this file (PNG)."""


def _plan(argv: list[str]) -> int:
    sections = [field.name for field in dataclasses.fields(Config)]
    own: list[str] = []
    fields: list[str] = []
    into = own
    for word in argv:
        if word.startswith("--"):
            into = fields if word[2:].partition("=")[0].partition(".")[0] in sections else own
        into.append(word)
    about = (
        "Peak memory by kind and the least time of a training step for every recompute policy with the largest "
        "micro-batch that fits under it, and the fastest that fits; nothing is run. It takes a minute or two for a "
        "compiled step, seconds with --train.compile false. Every field of the configuration is a flag too, as for "
        f"{command()} train (--train.batch_rows 64, --kernels.default triton).\n\n" + _preset_list()
    )
    options = parse(PlanOptions, own, "plan", about, positional=("preset",))
    if options.gpus < 1:
        raise UsageError(f"--gpus must be at least 1, not {options.gpus}")
    if options.memory_gb < 0:
        raise UsageError(f"--memory_gb must not be negative, it is {options.memory_gb:g}")
    config = parse(Config, fields, f"plan {options.preset}", about, default=_start(options.preset))
    config.replace(train={"micro_rows": 0}).check(options.gpus)
    _find_modules_here(config.kernels.choices().values())
    import torch

    from tritium.engine import plan
    from tritium.kernels.site import Machine

    say = (lambda text: print(text, file=sys.stderr, flush=True)) if sys.stderr.isatty() else (lambda text: None)
    if options.gpu:
        target = plan.Target.gpu(options.gpu)
    else:
        cuda = config.train.device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda" if cuda else "cpu")
        dtype = _dtype(config.train.precision, Machine.here(device))
        target = plan.Target.here(device, dtype)
    if options.memory_gb:
        target = dataclasses.replace(target, memory=int(options.memory_gb * 1e9))
    made = plan.make(config, target, options.gpus, compiled=config.train.compile != "false", say=say)
    print(plan.text(made))
    if made.chosen is not None:
        start = command() if options.gpus == 1 else launcher(command(), options.gpus)
        print(f"\n{start} train {options.preset} {' '.join([*fields, made.chosen.flags])}")
    if options.json:
        pathlib.Path(options.json).write_text(plan.to_json(made))
    if options.picture:
        plan.draw(made, pathlib.Path(options.picture))
    return 0 if made.chosen is not None else 1


# ------------------------------------------------------------------------------------------------------------- prepare


@dataclass(frozen=True)
class PrepareOptions:
    """Flags of ``tritium prepare``."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE ...")]
    """Files, folders, globs (text, JSONL, .gz, .zst), or `demo` for the built-in corpus."""
    out: str = ""
    """Folder that gets the shards; empty: the one that `train` looks into for these sources and this tokenizer."""
    tokenizer: str = "gpt2"
    """gpt2, bytes, bpe:SIZE (trained on the sources), a path to a tokenizer.json, or a prepared folder."""
    field: str = "text"
    """Which JSONL field holds the text."""
    separator: str = ""
    """What separates documents in text files (write \\n for a line break); empty: files become pieces of 64 KiB."""
    val_fraction: float = 0.02
    """Fraction of documents held out for validation."""
    seed: int = 0
    """Seed of the split."""
    workers: int = -1
    """Tokenizing processes; -1: one per core, none for small sources."""
    overwrite: bool = False
    """Replace the prepared data that the folder holds (it stays usable until the new data is complete)."""


def _prepare(argv: list[str]) -> int:
    about = (
        "Turn text into checksummed token shards. Running it again after an interruption goes on after the last "
        "finished shard (33,554,432 tokens); what came after that is tokenized again."
    )
    options = parse(PrepareOptions, argv, "prepare", about, positional=("sources",))
    _check_utf8("--separator", options.separator)
    _check_seed("--seed", options.seed)
    from tritium.engine.data.prepare import prepare

    out = pathlib.Path(options.out)
    if not options.out:
        from tritium.engine.config import data_folder

        data = dataclasses.replace(Config().data, sources=options.sources, tokenizer=options.tokenizer)
        out = data_folder(dataclasses.replace(Config(), data=data))
    began = time.monotonic()
    with _preparation_bar() as (progress, say):
        manifest = prepare(
            options.sources, out, tokenizer=options.tokenizer, field=options.field,
            separator=options.separator.replace("\\n", "\n").replace("\\t", "\t") or None,
            val_fraction=options.val_fraction, workers=None if options.workers < 0 else options.workers,
            seed=options.seed, progress=progress, overwrite=options.overwrite, say=say,
        )  # fmt: skip
    print(f"\n{out} is ready, after {time.monotonic() - began:.0f} s")
    identity = manifest.tokenizer
    shards = sum(len(split.shards) for split in manifest.splits.values())
    print(f"  {'tokenizer':<12}{identity['kind']}, {identity['vocab_size']:,} ids")
    for name, split in manifest.splits.items():
        ratio = f", {split.bytes / split.tokens:.2f} bytes a token" if split.tokens else ""
        print(
            f"  {name:<12}{split.tokens:,} tokens, {split.documents:,} documents, {split.bytes:,} bytes of text{ratio}"
        )
    print(f"  {'on disk':<12}{manifest.total_bytes / 1e6:,.1f} MB in {shards} shards")
    print(f"\ntrain on it   {command()} train PRESET --data.folder {out}")
    return 0


@contextlib.contextmanager
def _preparation_bar() -> Iterator[tuple[Callable[[Any], None], Callable[[str], None]]]:
    """(progress, say) for ``prepare``: a bar on a terminal, otherwise a line every few seconds."""
    names = {
        "tokenizer": "training the tokenizer",
        "tokens": "tokenizing",
        "split": "tokenizing again, to hold documents out",
    }
    if not sys.stdout.isatty() or os.environ.get("CI"):
        shown = {"at": time.monotonic()}

        def line(p: Any) -> None:
            done = p.bytes >= p.bytes_total
            if done or time.monotonic() - shown["at"] > 5.0:
                shown["at"] = time.monotonic()
                share = f"{p.bytes / max(1, p.bytes_total):.0%}"
                rate = f", {p.tokens_per_s:,.0f} tokens/s" if p.tokens_per_s else ""
                print(f"{names[p.phase]}: {share}, {p.documents:,} documents, {p.tokens:,} tokens{rate}", flush=True)

        yield line, lambda text: print(text, flush=True)
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        DownloadColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns) as bar:
        tasks: dict[str, Any] = {}

        def draw(p: Any) -> None:
            if p.phase not in tasks:
                tasks[p.phase] = bar.add_task(names[p.phase], total=p.bytes_total, rate="")
            rate = f"{p.tokens_per_s:,.0f} tokens/s" if p.tokens_per_s else ""
            bar.update(tasks[p.phase], completed=p.bytes, rate=rate)

        yield draw, lambda text: bar.console.print(text, markup=False, highlight=False, soft_wrap=True)


# --------------------------------------------------------------------------------------------- sample, evaluate, export


@dataclass
class Loaded:
    """A trained model for inference, kernels bound. data: the folder it was trained on, if known."""

    model: Any
    tokenizer: Any
    device: Any
    data: pathlib.Path | None
    documents: bool
    about: str


def _load(run: str, device: str, precision: str, kernels: str, phases: Sequence[str]) -> Loaded:
    """The model of a run folder, a checkpoint folder, or a folder with GPT-2 weights as safetensors."""
    import torch

    from tritium.engine import checkpoint
    from tritium.engine.data.tokenizer import load_tokenizer
    from tritium.engine.precision import resolve, to_compute_dtype
    from tritium.kernels import op
    from tritium.kernels.site import Machine

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda needs a GPU that this torch can use, and it sees none; use --device cpu or auto"
        )
    place = torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")
    folder = pathlib.Path(run)
    if folder.suffix == ".safetensors" or any(folder.glob("*.safetensors*")):
        from tritium.engine import hf

        model = hf.load_gpt2(folder).to(place)
        beside = folder if folder.is_dir() else folder.parent
        tokenizer = load_tokenizer(beside if (beside / "tokenizer.json").is_file() else "gpt2")
        loaded = Loaded(model, tokenizer, place, None, False, f"GPT-2 weights of {folder}")
    else:
        restored = checkpoint.load_run(folder, place.type, lambda text: print(f"warning: {text}", file=sys.stderr))
        from tritium.engine.config import data_folder

        config = restored.config
        about = f"{config.name}, step {restored.step} ({restored.path})"
        loaded = Loaded(restored.model, restored.tokenizer, place, data_folder(config), config.data.documents, about)
    dtype = resolve(precision, place)
    to_compute_dtype(loaded.model, dtype, head=place.type == "cpu")
    _find_modules_here([kernels])
    op.bind(loaded.model, kernels, machine=Machine.here(place), dtype=dtype, phases=phases)
    return loaded


@dataclass(frozen=True)
class SampleOptions:
    """Flags of ``tritium sample``."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run or of one checkpoint, or a folder with GPT-2 weights (model.safetensors)."""
    prompt: str = ""
    """Text to continue; empty: begin a document; -: read it from standard input."""
    tokens: int = 200
    """Most tokens to write; a document that ends earlier ends the sample."""
    temperature: float = 0.8
    """Divides the logits: below 1 safer, above 1 wilder; 0: always the likeliest token."""
    top_k: int = 50
    """Draw from the k likeliest tokens only; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probability reaches p."""
    seed: int = 1
    """Seed of the first sample; the next one has seed + 1."""
    num: int = 1
    """Number of samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: a GPU when there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Compute dtype; auto: bf16 where the device multiplies bf16 matrices in hardware."""
    kernels: str = "auto"
    """A backend for every op that has it."""


def _sample(argv: list[str]) -> int:
    about = "Let a trained model write, token by token. The same seed writes the same text."
    options = parse(SampleOptions, argv, "sample", about, positional=("run",))
    if options.num < 1:
        raise UsageError(f"--num must be at least 1, not {options.num}")
    _check_seed("--seed", options.seed, options.num - 1)
    prompt, source = options.prompt, "--prompt"
    if prompt == "-":
        source = "standard input (--prompt -)"
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode("utf-8", "replace")
            raise _not_utf8(source, error.object[error.start], before) from None
    _check_utf8(source, prompt)
    loaded = _load(options.run, options.device, options.precision, options.kernels, ("prefill", "decode"))
    from tritium.engine.generate import stream

    tokenizer, block_size = loaded.tokenizer, loaded.model.config.block_size
    ids = [tokenizer.eot, *tokenizer.encode(prompt)]
    print(loaded.about, file=sys.stderr)
    if len(ids) > block_size:
        print(f"the prompt has {len(ids)} tokens, the model sees the last {block_size} (block_size)", file=sys.stderr)
    began, written = time.monotonic(), 0
    for number in range(options.num):
        if options.num > 1:
            print(f"--- sample {number + 1} of {options.num}, seed {options.seed + number} ---")
        print(prompt, end="", flush=True)
        steps = stream(
            loaded.model, [ids], options.tokens, temperature=options.temperature, top_k=options.top_k,
            top_p=options.top_p, seed=options.seed + number, stop_ids=(tokenizer.eot,),
        )  # fmt: skip
        tokens: list[int] = []
        for piece in _pieces(tokenizer.decode, (row[0] for row in steps), tokenizer.eot, tokens):
            print(piece, end="", flush=True)
        print(flush=True)
        written += len(tokens)
    print(f"{written} tokens, {written / (time.monotonic() - began):.1f} tokens/s", file=sys.stderr)
    return 0


def _pieces(
    decode: Callable[[list[int]], str], tokens: typing.Iterable[int | None], eot: int, seen: list[int]
) -> Iterator[str]:
    """Text as it comes, in whole characters; ``seen`` collects the tokens, ``eot`` is not shown.

    A character may be several tokens, and some tokenizers decode a token differently at the beginning: so each piece is
    the difference of two decodings that begin at the piece before it.
    """
    start = shown = 0
    for token in tokens:
        if token is None or token == eot:
            break
        seen.append(token)
        before, now = decode(seen[start:shown]), decode(seen[start:])
        if len(now) > len(before) and not now.endswith("\ufffd"):
            yield now[len(before) :]
            start, shown = shown, len(seen)
    yield decode(seen[start:])[len(decode(seen[start:shown])) :]


@dataclass(frozen=True)
class EvaluateOptions:
    """Flags of ``tritium evaluate``."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run or of one checkpoint, or a folder with GPT-2 weights (model.safetensors)."""
    data: str = ""
    """Prepared folder whose validation split is used; empty: the one the run was trained on."""
    tokens: int = 0
    """About so many validation tokens, spread over the split; 0: all."""
    rows: int = 8
    """Rows (sequences of block_size tokens) at a time."""
    baselines: bool = True
    """Also fit the unigram and bigram models of the training split."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: a GPU when there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Compute dtype; auto: bf16 where the device multiplies bf16 matrices in hardware."""
    kernels: str = "auto"
    """A backend for every op that has it."""


def _evaluate(argv: list[str]) -> int:
    about = (
        "Loss, perplexity and bits per byte of a trained model on a validation split, beside unigram and bigram models."
    )
    options = parse(EvaluateOptions, argv, "evaluate", about, positional=("run",))
    if options.rows < 1 or options.tokens < 0:
        raise UsageError(f"--rows must be at least 1 and --tokens at least 0, not {options.rows} and {options.tokens}")
    loaded = _load(options.run, options.device, options.precision, options.kernels, ("eval",))
    data = pathlib.Path(options.data) if options.data else loaded.data
    if data is None:
        raise ConfigError(
            "weights from elsewhere come without data: name a prepared folder with --data (tritium prepare makes one)"
        )
    from tritium.engine.evaluate import evaluate

    print(f"evaluating {loaded.about} on {data}", flush=True)
    network = loaded.model.config
    result = evaluate(
        loaded.model, data, loaded.device, tokenizer=loaded.tokenizer.identity, T=network.block_size,
        batch_rows=options.rows, vocab_size=network.vocab_size, documents=loaded.documents, limit_tokens=options.tokens,
        baselines=options.baselines,
    )  # fmt: skip
    print(f"loss        {result.loss:.4f} nats per token, over {result.tokens:,} tokens")
    print(f"perplexity  {result.perplexity:.2f}")
    print(bits_table({**result.baselines, "model": result.bits_per_byte}))
    return 0


@dataclass(frozen=True)
class ExportOptions:
    """Flags of ``tritium export``."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run or of one checkpoint."""
    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """New folder for model.safetensors, config.json and the tokenizer, as transformers reads them."""


def _export(argv: list[str]) -> int:
    about = "Write a GPT-2-shaped model as safetensors that transformers' GPT2LMHeadModel loads."
    options = parse(ExportOptions, argv, "export", about, positional=("run", "folder"))
    from tritium.engine import hf

    loaded = _load(options.run, "cpu", "fp32", "auto", ("eval",))
    with tempfile.TemporaryDirectory() as temporary:
        loaded.tokenizer.save(temporary)
        files = sorted(pathlib.Path(temporary).iterdir())
        hf.export_gpt2(loaded.model, options.folder, tokenizer_files=files, eos_token_id=loaded.tokenizer.eot)
    print(f"exported {loaded.about} to {options.folder}")
    return 0


# ------------------------------------------------------------------------------------------------------------- kernels


@dataclass(frozen=True)
class KernelsOptions:
    """Flags of ``tritium kernels``."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Which device the answers are for; auto: a GPU when there is one. cuda needs no GPU: answers come from facts."""
    arch: str = ""
    """GPU architecture, e.g. sm_80, sm_90, sm_100; empty: this machine's, or sm_90 where it has no GPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute dtype; auto: what `train` would choose there."""
    phase: Literal["train", "eval", "prefill", "decode"] = "train"
    """Which use of the ops: with gradients, evaluation, or the two halves of generation."""
    compile: Literal["auto", "true", "false"] = "auto"
    """Whether the ops are called inside a torch.compile graph; auto: as `train` would."""
    kernels: str = "auto"
    """A choice to try out, as for `train`: a backend for every op that has it."""


@dataclass(frozen=True)
class CheckOptions:
    """Flags of ``tritium kernels check``."""

    backend: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[BACKEND]")] = ""
    """A backend's name, or the module path of your own; none: every backend, held to the contract alone."""
    op: tuple[str, ...] = ()
    """Ops to check; none: every op that has the backend (a module path needs an op)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: a GPU when there is one."""
    dtypes: tuple[Literal["fp32", "bf16", "fp16"], ...] = ()
    """Dtypes to check and to measure; none: fp32 and bf16. Triton's interpreter computes bf16 wrongly: there, fp32."""
    cases: tuple[str, ...] = ()
    """Patterns of case names, whatever their size; none: small ones for the contract, large ones for the rest."""
    arch: tuple[str, ...] = ()
    """GPUs to compile Triton kernels for; none: this machine's, or sm_80, sm_90 and sm_100 where it has none."""
    resources: bool = True
    """Compile Triton kernels and look at registers, spills and shared memory."""
    bench: bool = True
    """Measure the backend against the reference."""
    compile: bool = False
    """Check every case inside torch.compile graphs (slow); without it one case of each dtype is traced into a graph."""
    large: bool = False
    """Also hold the large cases to the contract, on a GPU."""
    seed: int = 0
    """Seed of the inputs."""


def _kernels(argv: list[str]) -> int:
    if argv[:1] == ["check"]:
        return _check_kernels(argv[1:])
    preset = argv[0] if argv and not argv[0].startswith("-") else ""
    if preset and preset not in presets.names():
        near = _nearest(preset, ["check", *presets.names()])
        raise UsageError(
            f"{preset!r} is neither a preset nor `check`; the nearest are {near}. All: {command()} train --help"
        )
    about = (
        "Which backends can compute each op, why not, and which one `auto` picks: for every op, or for a preset's. "
        f"`{command()} kernels check BACKEND --op OP` holds backends to the contract."
    )
    options = parse(KernelsOptions, argv[1:] if preset else argv, "kernels" + (f" {preset}" if preset else ""), about)
    _find_modules_here([options.kernels])
    import torch

    from tritium.engine.train import on_meta, should_compile
    from tritium.kernels import op as contract
    from tritium.kernels.lib import native
    from tritium.kernels.ops import OPS
    from tritium.kernels.site import Machine

    here = Machine.here(None if options.device == "auto" or not torch.cuda.is_available() else options.device)
    device = here.device if options.device == "auto" else options.device
    present = device == here.device and options.arch in ("", here.arch)
    machine = here if present else Machine(device, options.arch or "sm_90", "", here.interpreted)
    if machine.device == "cuda" and not machine.capability:
        raise UsageError(f"--arch wants a GPU architecture such as sm_90, not {machine.arch!r}")
    dtype = _dtype(options.precision, machine)
    config = presets.load(preset or "gpt2_124m")
    compiled = options.compile == "true"
    if options.compile == "auto":
        compiled = should_compile(config, torch.device(device))[0] if present else True
    named = str(dtype).removeprefix("torch.")
    about_machine = f"{machine.device} {machine.arch}" + (
        f" ({machine.name})" if machine.name not in ("", machine.arch) else ""
    )
    print(
        f"machine   {about_machine}"
        + ("" if present else "; not this machine: answered from facts, packages are this machine's")
    )
    print(
        f"asked     {named}, {options.phase}, {'compiled' if compiled else 'eager'}" + (f", {preset}" if preset else "")
    )
    version = machine.version("triton")
    print(
        f"triton    {version or 'not installed'}"
        + (", in its interpreter (TRITON_INTERPRET=1)" if machine.interpreted else "")
    )
    print(f"native    {native.missing() or 'loaded: ' + ', '.join(native.isas())}\n")

    holders = on_meta(config.replace(model={"vocab_size": config.model.vocab_size or 50257}), dtype)
    sites: dict[str, Any] = {}
    for path, call in contract.call_sites(holders):
        sites.setdefault(call.op.name, call.site(machine, path, options.phase, dtype, compiled=compiled))
    if not preset:  # ops that GPT-2 does not call: at the place that their first case stands for
        from tritium.kernels.contract import site_of

        for name, op in OPS.items():
            if name not in sites:
                sites[name] = site_of(op, op.cases.CASES[0], dtype, machine, phase=options.phase, compiled=compiled)
    print(_backend_table({OPS[name]: sites[name] for name in OPS if name in sites}))
    if preset or options.kernels != "auto":
        rows = contract.bind(holders, options.kernels, machine=machine, dtype=dtype, compiled=compiled)
        chosen = "" if options.kernels == "auto" else f" --kernels {options.kernels}"
        print(f"\n{command()} train {preset or 'gpt2_124m'}{chosen} would bind:\n{contract.format_table(rows)}")
    return 0


def _backend_table(sites: dict[Any, Any]) -> str:
    """op, backend, whether it can serve the op's site, and which one auto picks."""
    from tritium.kernels.op import KernelError, auto

    lines = []
    for op, site in sites.items():
        picked, why = auto(op, site)
        for name, reason in op.why_not(site).items():
            text = "can" if reason is None else f"no: {reason}"
            try:
                unproven = op.load(name).unproven
            except KernelError:
                unproven = None  # it cannot even be loaded: why_not has said so
            text += f"  [unproven: {unproven}]" if unproven else ""
            text += f"  <- {why}" if name == picked else ""
            lines.append((op.name, name, text))
    width = [max(len(line[i]) for line in lines) for i in range(2)]
    shown, previous = [], ""
    for op_name, name, text in lines:
        shown.append(f"{op_name if op_name != previous else '':<{width[0]}}  {name:<{width[1]}}  {text}")
        previous = op_name
    return "\n".join(shown)


def _dtype(precision: str, machine: Any) -> Any:
    """The compute dtype `train` would use on ``machine``, which need not be this one."""
    import torch

    from tritium.engine.precision import resolve

    if precision == "auto" and machine.device == "cuda":
        return torch.bfloat16 if machine.capability >= 80 else torch.float32
    return resolve(precision, torch.device(machine.device))


def _check_kernels(argv: list[str]) -> int:
    named = bool(argv) and not argv[0].startswith("-")
    about = (
        "Is this backend right, does it fit the GPU, how fast is it: the contract (values, gradients, strides, "
        "determinism, memory, against the fp64 reference; one graph under torch.compile; no host that waits for the "
        "device), what its Triton kernels take, and its speed against the reference. Exit status 0 only for all three."
    )
    options = parse(CheckOptions, argv, "kernels check", about, positional=("backend",) if named else ())
    _check_seed("--seed", options.seed, limits=(-(1 << 32), (1 << 32) - 1))  # of it the contract makes others
    _find_modules_here([options.backend])
    import torch

    from tritium.kernels.ops import OPS
    from tritium.kernels.site import interpreting

    for name in options.op:
        if name not in OPS:
            raise UsageError(f"there is no op {name!r}; the nearest are {_nearest(name, OPS)}. All: {', '.join(OPS)}")
    ops = [OPS[name] for name in options.op] or list(OPS.values())
    if not named:
        pairs = [(op, backend) for op in ops for backend in op.backends() if backend != "reference"]
    elif options.op:
        pairs = [(op, options.backend) for op in ops]
    else:
        pairs = [(op, options.backend) for op in ops if options.backend in op.backends()]
    if named and not pairs:
        known = sorted({name for op in OPS.values() for name in op.backends()})
        near = (
            "a module path needs --op"
            if "." in options.backend
            else f"the nearest are {_nearest(options.backend, known)}"
        )
        raise UsageError(f"no op has a backend {options.backend!r}; {near}")
    names = sorted({case.name for op, _ in pairs for case in op.cases.CASES})
    for pattern in options.cases:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"--cases {pattern} matches no case; the nearest are {_nearest(pattern, names)}")
    if bad := [arch for arch in options.arch if not re.fullmatch(r"sm_\d{2,3}", arch)]:
        raise UsageError(f"--arch wants GPU architectures such as sm_90, not {bad[0]!r}")
    device = options.device if options.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = options.dtypes or (("fp32",) if interpreting() else DEFAULT_DTYPES)
    if interpreting() and not options.dtypes:
        print("Triton's interpreter computes bfloat16 wrongly: fp32 alone is held to the contract")
    words = {}
    for op, backend in pairs:
        words[f"{op.name}.{backend}"] = _verdict(op, backend, device, dtypes, options, alone=named)
    kinds = [word.partition(":")[0] for word in words.values()]
    if len(words) == 1:
        print(f"\nverdict: {next(iter(words.values()))}")
        return 0 if kinds == ["right"] else 1
    print("\n" + "\n".join(f"{name}: {word}" for name, word in words.items()))
    # a backend asked for by name must have been tried; of all there are, some are for other machines
    worst = ("wrong", "not measured", "refused", "right") if named else ("wrong", "right", "refused")
    overall = next(kind for kind in worst if kind in kinds)
    print(f"verdict: {overall} ({', '.join(f'{kinds.count(kind)} {kind}' for kind in dict.fromkeys(kinds))})")
    return 0 if overall == "right" else 1


DEFAULT_DTYPES = ("fp32", "bf16")


def _verdict(op: Any, backend: str, device: str, names: Sequence[str], options: CheckOptions, *, alone: bool) -> str:
    """Hold one backend to the contract, and look at its kernels and its speed where ``alone``; prints what was found.

    Returns ``right``, ``wrong: why``, ``refused: why`` or ``not measured: why``: right, as far as that shows.
    """
    import torch

    from tritium.engine import syncs
    from tritium.kernels.contract import check, check_all, format_reports

    dtypes = [{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name] for name in names]
    cases = [c for c in op.cases.CASES if any(fnmatch.fnmatchcase(c.name, p) for p in options.cases)]
    if alone:
        print(f"== contract of {op.name}.{backend}")
    reports = check_all(
        op, backend, dtypes, device, compiled=options.compile, seed=options.seed,
        large=options.large or bool(cases), cases=cases or None, watch=syncs.forbidden,
    )  # fmt: skip
    if not options.compile:
        for dtype in dtypes:
            if (chosen := _to_trace(op, reports, dtype)) is not None:
                case, phase = chosen
                reports.append(
                    check(op, backend, case, dtype, device, compiled="aot_eager", seed=options.seed, phase=phase)
                )
    print(format_reports(reports))
    count = {status: sum(r.status == status for r in reports) for status in ("passed", "failed", "refused")}
    word = (
        "BREAKS the contract" if count["failed"] else "holds the contract" if count["passed"] else "refuses every case"
    )
    numbers = ", ".join(f"{n} {status}" for status, n in count.items())
    print(f"{op.name}.{backend} on {device} {word} ({numbers})", flush=True)
    wrong = [f"breaks the contract ({count['failed']} of {len(reports)} cases)"] if count["failed"] else []
    if alone and options.resources:
        print(f"\n== resources of {op.name}.{backend}", flush=True)
        wrong += _check_resources(op, backend, device, options)
    unmeasured = ""
    if alone and options.bench:
        print(f"\n== benchmark of {op.name}.{backend}", flush=True)
        if wrong:
            unmeasured = "not made: no speed is shown of a backend that is wrong"
        elif not count["passed"]:
            unmeasured = "not made: no case could be run here"
        else:
            unmeasured = _check_speed(op, backend, device, dtypes, reports, options)
        print(unmeasured or "measured", flush=True)
    if wrong:
        return "wrong: " + "; ".join(wrong)
    if not count["passed"]:
        reasons = list(dict.fromkeys(r.reason for r in reports)) or ["there was none"]
        return f"refused: no case could be run on {device}: {reasons[0]}"
    if unmeasured:
        return (
            f"not measured: right as far as the contract shows, its speed unknown ({unmeasured}); --no-bench is content"
        )
    return "right"


def _to_trace(op: Any, reports: Sequence[Any], dtype: Any) -> tuple[Any, str] | None:
    """(case, phase) to compile in a dtype: of what passed eagerly, for training if any was, with the most options."""
    cases = {case.name: case for case in op.cases.CASES}
    passed = [(cases[r.case], r.phase) for r in reports if r.ok and r.dtype == dtype]
    return max(passed, key=lambda p: (p[1] == "train", all(p[0].shape.values()), len(p[0].options)), default=None)


def _check_resources(op: Any, backend: str, device: str, options: CheckOptions) -> list[str]:
    """Compile the backend's Triton kernels in a process of its own; prints what they take, returns what is wrong."""
    from tritium.kernels.site import Machine

    if importlib.util.find_spec("triton") is None:
        print("not applicable: the package triton is not installed")
        return []
    from tritium.kernels import aot

    archs = options.arch or ((Machine.here("cuda").arch,) if device == "cuda" else aot.ARCHS)
    if unknown := [a for a in archs if a.removeprefix("sm_") not in map(str, aot.SHARED_LIMIT)]:
        print(f"not looked at: nothing is known here of {', '.join(unknown)}")
        return []
    named = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    command = [
        op.name,
        "--backend",
        backend,
        "--arch",
        *archs,
        "--dtype",
        *(named[p] for p in options.dtypes or DEFAULT_DTYPES),
    ]
    command += ["--quiet", *(["--case", *options.cases] if options.cases else [])]
    with tempfile.TemporaryDirectory() as folder:
        found = aot.in_process(command, pathlib.Path(folder) / "found.json")
    if found["lines"]:
        print(aot.format_lines({found["version"]: found["lines"]}))
    elif found["no_triton"]:
        print("no Triton kernels: resources not applicable")
        for text in found["notes"][:1]:
            print(f"(called on tensors without memory: {text.splitlines()[0]})")
    for text in found["errors"]:
        print(f"FAILED: {text}")
    for text in dict.fromkeys(text.split(": ", 1)[1] for text in found["refused"]):
        print(f"refused: {text}")
    over = {(line.resources.kernel, line.resources.arch, line.tile) for line in found["lines"] if line.problem}
    wrong = [f"{len(over)} kernel{'s' if len(over) > 1 else ''} over the limits of the GPU"] if over else []
    return wrong + ([f"{len(found['errors'])} calls fail when they are compiled"] if found["errors"] else [])


def _check_speed(
    op: Any, backend: str, device: str, dtypes: Sequence[Any], reports: Sequence[Any], options: CheckOptions
) -> str:
    """Time a backend that is right, interleaved with the reference; returns why that could not be done, or nothing."""
    from tritium.benchmarks import kernels, timing
    from tritium.kernels.site import interpreting

    if interpreting():
        return "not made: Triton's interpreter says nothing about speed; run this on a GPU, without TRITON_INTERPRET"
    gate = kernels.Gate(device)
    if not options.cases:  # else the gate sees to all small cases itself
        gate.trust(reports)
    request = kernels.check_request(op, backend, device, dtypes, ",".join(options.cases))
    request.compiled = options.compile
    refused: list[dict[str, str]] = []
    made = False
    for row in kernels.bench_ops(request, gate, timing.clock_for(device, scrub_bytes=256 << 20), refused):
        print(row, flush=True)
        made = made or row.backend == backend
    if made:
        return ""
    reasons = [*gate.red, *(item["why"] for item in refused), "no case of the op was chosen"]
    return f"not made: {reasons[0]}"


# --------------------------------------------------------------------------------------------------------------- bench


BENCHMARKS: dict[str, tuple[str, str]] = {  # what → (about, module of tritium.benchmarks)
    "train": ("tokens/s, utilisation, memory and anatomy of training a preset", "training"),
    "peers": ("a preset against other implementations of the same model", "throughput"),
    "kernels": ("every op, backend by backend", "kernels"),
    "ladder": ("the sizes of GPT-2, rung by rung: eager, compiled, fused", "ladder"),
    "compare": ("two records: ratios, intervals, a verdict", "compare"),
    "report": ("every record of a folder, on one HTML page", "report"),
}


def _bench(argv: list[str]) -> int:
    what = argv[0] if argv else ""
    if what in ("", "-h", "--help", "help"):
        width = max(map(len, BENCHMARKS))
        lines = "\n".join(f"  {name:<{width}}  {about}" for name, (about, _) in BENCHMARKS.items())
        print(
            f"usage: {command()} bench WHAT ...\n\n{lines}\n\n{command()} bench WHAT --help explains one. "
            f"To begin: {command()} bench train tiny",
            file=sys.stdout if what else sys.stderr,
        )
        return 0 if what else 2
    if what not in BENCHMARKS:
        hint = f"; did you mean `{command()} bench train {what}`, or `peers`?" if what in presets.names() else ""
        raise UsageError(
            f"there is no benchmark {what!r}{hint or '; the nearest are ' + _nearest(what, BENCHMARKS)}. "
            f"All: {command()} bench --help"
        )
    return importlib.import_module(f"tritium.benchmarks.{BENCHMARKS[what][1]}").main(argv[1:])


def _ablate(argv: list[str]) -> int:
    from tritium.benchmarks import ablate

    return ablate.main(argv)


VERBS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "train": ("train a preset, or continue a run", _train),
    "replay": ("repeat a bad step that training dumped: the kernel, the data or the precision?", _replay),
    "plan": ("memory and time of a training step before it runs, for a GPU that need not be here", _plan),
    "prepare": ("turn text into token shards", _prepare),
    "sample": ("let a trained model write", _sample),
    "evaluate": ("loss, perplexity and bits per byte of a trained model", _evaluate),
    "export": ("write a trained model as GPT-2 safetensors for transformers", _export),
    "kernels": ("which backends can compute each op here, and why not; check one", _kernels),
    "bench": ("measure: training a preset, against other implementations too; kernels", _bench),
    "ablate": ("what each choice of kernel or setting is worth: speed, memory, loss", _ablate),
}

if __name__ == "__main__":
    sys.exit(main())
