"""``tritium <verb>``: what a user types. Verbs import what they need when they run, so ``tritium --help`` imports no torch.

Flags are the fields of dataclasses (Config for ``train``, one small class per other verb); tyro writes the help and builds the values,
``normalise`` reads what the user typed and answers mistakes with the nearest names. Exit status: 0 done, 1 could not be done,
2 not understood, 130 stopped by Ctrl-C. TRITIUM_DEBUG=1 shows the traceback of an expected error too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import shutil
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tritium.engine import presets
from tritium.engine.config import Config, ConfigError
from tritium.engine.report import Progress, Reporter, closing_report, duration, progress_line


class UsageError(Exception):
    """What the user typed is not understood; the message names the nearest things that are. Exit status 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status. argv: without the program's name; default: the command line."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a replaced stream
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal without "×" must not stop a run
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
        return "tritium" if shutil.which("tritium") else f"{_shown(pathlib.Path(sys.executable))} -m tritium.engine.cli"
    found = shutil.which("tritium")
    return "tritium" if found and pathlib.Path(found).absolute() == called.absolute() else _shown(called)


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

    Looks classes up among the modules that are loaded: an error of a class comes from its module, and nothing is imported for it.
    """
    places = (
        ("tritium.kernels.op", "KernelError"),
        ("tritium.engine.data.errors", "DataError"),
        ("tritium.engine.checkpoint", "CheckpointError"),
        ("tritium.engine.hf", "HFError"),
    )
    known = [getattr(sys.modules[module], name, None) for module, name in places if module in sys.modules]
    if isinstance(error, (ConfigError, *(k for k in known if k is not None))):
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

    Understands ``--a.b c``, ``--a.b=c``, ``-`` for ``_``, ``--kernels=NAME`` for ``--kernels.default=NAME``, flags of yes-or-no fields bare,
    with ``no_`` or with a value, and lists as several values or repeated flags. UsageError for anything else, with the nearest names.
    about: the command whose ``--help`` lists the flags. positional: names of the fields given without a flag, in order.
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
        name = "kernels.default" if name == "kernels" and "kernels.default" in flags else name
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
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
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


def parse(
    kind: type, argv: Sequence[str], verb: str, about: str, *, positional: Sequence[str] = (), default: Any = None
) -> Any:
    """A dataclass from the command line; prints help and raises SystemExit when asked for it.

    verb: as typed after ``tritium``. about: what the help says first. default: an instance to start from.
    """
    import tyro

    arguments = normalise(argv, kind, positional, f"{command()} {verb}")
    options: dict[str, Any] = {} if default is None else {"default": default}
    return tyro.cli(
        kind, prog=f"{command()} {verb}", description=about, args=arguments, use_underscores=True,
        config=(tyro.conf.PositionalRequiredArgs,), **options,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- train


class LiveReporter(Reporter):
    """One status line, updated in place at the bottom of a terminal; everything else scrolls above it."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.live import Live
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        self._table, self._text, self._bar = Table, Text, ProgressBar
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
        line.add_row(
            self._spinner,
            self._bar(total=max(1, p.steps), completed=p.step, width=16),
            self._text(progress_line(moved)),
        )
        return line

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
    config.check(int(os.environ.get("WORLD_SIZE", "1")))
    _find_modules_here(config.kernels.choices().values())

    reporter = _reporter()
    try:
        from tritium.engine import train

        outcome = train.main(config, reporter)
    except KeyboardInterrupt:
        folder = config.run.out or f"runs/{config.name}"
        raise KeyboardInterrupt(
            f"stopped at once, without saving; {command()} train {folder} continues from the last checkpoint there, if there is one"
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
            config.train.steps,
            outcome.bits_per_byte,
            command=command(),
        )
        print(f"\n{report}", flush=True)
    return outcome.exit_code


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
            f"{name!r} is neither a preset nor the folder of a run; the nearest presets are {_nearest(name, presets.names())}. "
            f"All: {command()} train --help"
        )
    stored = folder / "config.json"
    if not stored.is_file():
        raise ConfigError(
            f"{folder} holds no config.json, so it is not the folder of a run; name one, or a preset: {', '.join(presets.names())}"
        )
    config = Config.from_json(stored.read_text())
    resume = "auto" if config.run.resume == "never" else config.run.resume
    return dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(folder), resume=resume))


def _find_modules_here(choices: typing.Iterable[str]) -> None:
    """A backend of the user's own, named as a module, may lie in the current folder, which a console script does not look into."""
    for choice in choices:
        package = choice.partition(".")[0]
        here = pathlib.Path.cwd()
        if "." in choice and importlib.util.find_spec(package) is None and any(here.glob(f"{package}*")):
            sys.path.append(str(here))


# ------------------------------------------------------------------------------------------------------------- prepare


@dataclass(frozen=True)
class PrepareOptions:
    """Flags of ``tritium prepare``."""

    sources: tuple[str, ...]
    """Files, folders, globs (text, JSONL, .gz, .zst), or `demo` for the built-in corpus."""
    out: str = ""
    """Folder that gets the shards; empty: the one that `train` looks into for these sources and this tokenizer."""
    tokenizer: str = "gpt2"
    """gpt2, bytes, bpe:SIZE (trained on the sources), a path to a tokenizer.json, or a prepared folder to take it from."""
    field: str = "text"
    """Which JSONL field holds the text."""
    separator: str = ""
    """What separates documents in text files (write \\n for a line break); empty: each file is cut into pieces at paragraphs."""
    val_fraction: float = 0.02
    """Fraction of documents held out for validation."""
    seed: int = 0
    """Seed of the split."""
    workers: int = -1
    """Tokenizing processes; -1: one per core, none for small sources."""
    overwrite: bool = False
    """Replace the prepared data that the folder holds (it stays usable until the new data is complete)."""


def _prepare(argv: list[str]) -> int:
    about = "Turn text into checksummed token shards. Running it again after an interruption goes on where it stopped."
    options = parse(PrepareOptions, argv, "prepare", about, positional=("sources",))
    from tritium.engine.data.prepare import prepare

    out = pathlib.Path(options.out)
    if not options.out:
        from tritium.engine.train import data_folder

        data = dataclasses.replace(Config().data, sources=options.sources, tokenizer=options.tokenizer)
        out = data_folder(dataclasses.replace(Config(), data=data))
    began = time.monotonic()
    with _preparation_bar() as (progress, say):
        manifest = prepare(
            options.sources, out, tokenizer=options.tokenizer, field=options.field,
            separator=options.separator.replace("\\n", "\n").replace("\\t", "\t") or None,
            val_fraction=options.val_fraction, workers=None if options.workers < 0 else options.workers, seed=options.seed,
            progress=progress, overwrite=options.overwrite, say=say,
        )  # fmt: skip
    print(f"\n{out} is ready ({duration(time.monotonic() - began)} min:s)")
    identity = manifest.tokenizer
    print(f"  {'tokenizer':<12}{identity['kind']}, {identity['vocab_size']:,} ids")
    for name, split in manifest.splits.items():
        ratio = f", {split.bytes / split.tokens:.2f} bytes a token" if split.tokens else ""
        print(
            f"  {name:<12}{split.tokens:,} tokens, {split.documents:,} documents, {split.bytes:,} bytes of text{ratio}"
        )
    print(
        f"  {'on disk':<12}{manifest.total_bytes / 1e6:,.1f} MB in {sum(len(s.shards) for s in manifest.splits.values())} shards"
    )
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


VERBS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "train": ("train a preset, or continue a run", _train),
    "prepare": ("turn text into token shards", _prepare),
}

if __name__ == "__main__":
    sys.exit(main())
