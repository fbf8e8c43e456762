"""The command line: `jaxldm train | distill | sample | eval | serve | inspect | export |
quantize | prune | info`.

Each command is a frozen dataclass in `jaxldm.commands`; tyro derives the options and the help from its fields
and their docstrings. A user error is one line on stderr and exit code 2, without a traceback. Nothing heavy
is imported here, so that `--help` is fast.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import importlib
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from jaxldm import __version__
from jaxldm.commands import COMMANDS, IMPORTED, SUBCOMMANDS, load_command
from jaxldm.commands.words import check_text, check_words
from jaxldm.errors import InvalidArgumentError, JaxldmError, Stopped, cause, one_of
from jaxldm.files import storage_error, storage_errors

MAX_LINE = 390  # characters of a message
TRAINING = (["train"], ["distill"])  # commands that can be resumed
# Words of a failed computation or meeting when another process is gone.
SIGNS_OF_A_LOST_PROCESS = ("Gloo", "onnection closed", "onnection reset", "UNAVAILABLE", "DEADLINE_EXCEEDED")
RESUME = "the same command with --resume continues from the last checkpoint"

HELP = """usage: jaxldm [--import MODULE] COMMAND ...

Latent diffusion: train a model, sample from it, evaluate it, export it.

commands:
{commands}

A first session (four minutes on two cores):
  jaxldm train mini-ldm --run-dir runs/mini-ldm
  jaxldm sample runs/mini-ldm --class-labels 3 7 --num-images 64 --output-dir samples
  jaxldm eval runs/mini-ldm
  jaxldm export runs/mini-ldm exported/mini-ldm

Compiled functions are kept in the user's cache folder (`jaxldm info` shows it; at most 2 GiB), so that the
same command does not compile twice. JAXLDM_COMPILATION_CACHE is another folder for them, or "off".

A model with a class of your own, such as a path, needs its module: `jaxldm --import my_module sample RUN`.

`jaxldm COMMAND --help` explains the options of a command, `jaxldm --version` prints the version."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0: done. 2: invalid arguments, files, or a full disk, described in one line on stderr. 130:
        interrupted with Ctrl-C.
    """
    if argv is not None:
        return outcome(argv)
    try:
        code = outcome(None)
    except BaseException as error:
        if not is_one_of_several():
            raise
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
    if code and is_one_of_several():
        end_process(code)
    return code


def outcome(argv: Sequence[str] | None) -> int:
    """The exit code of one command, of `sys.argv` where this process is its own."""
    own_process, words = argv is None, []
    if own_process:
        sys.unraisablehook = repeat_interrupt
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored, as by nohup
            signal.signal(signal.SIGINT, on_interrupt)
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        check_text(words)
        modules, words = split_imports(words)
        if modules and own_process:  # a module may start JAX, which fixes its devices
            prepare_process(trains=words[:1] in TRAINING)
        with imported(modules):
            run(words, own_process)
        if own_process:  # a full disk shows when what was printed is written
            with storage_errors("what was printed"):
                sys.stdout.flush()
        return 0
    except JaxldmError as error:
        return print_error(str(error))
    except BrokenPipeError:  # the reader of our stdout, for example `head`, has ended
        sys.stdout = None
        return 0
    except OSError as error:
        return print_error(describe_os_error(error))
    except UnicodeEncodeError as error:  # of a name of a file that was printed
        return print_error(f"{error}: set PYTHONIOENCODING=utf-8, or use names that this terminal can show")
    except (MemoryError, RuntimeError) as error:
        if "KeyboardInterrupt" in str(error):  # in a callback, which XLA passes on as text
            return interrupted(own_process)
        if is_one_of_several() and any(sign in str(error) for sign in SIGNS_OF_A_LOST_PROCESS):
            return print_error(
                "the connection to another of the processes that train together is lost, and its output says "
                "why: start all of them again with --resume"
            )
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return print_error("out of memory: use fewer images, a smaller batch or a smaller model")
    except Stopped as error:  # its log has said so, where one is printed
        silent = "--quiet" in words or (is_one_of_several() and sys.modules["jax"].process_index() > 0)
        return interrupted(own_process, str(error) if silent else "")
    except KeyboardInterrupt as error:
        return interrupted(own_process, str(error) or (RESUME if words[:1] in TRAINING else ""))


def run(words: list[str], own_process: bool) -> None:
    """Parses and runs a command; a notebook or a test that calls `main([...])` keeps its own settings."""
    command = parse(words)
    if command is None:
        return
    if own_process:
        prepare_process(getattr(command, "computes", True), words[:1] in TRAINING)
    command.run()


def prepare_process(computes: bool = True, trains: bool = False) -> None:
    """JAX's settings for a process of its own, where it computes or trains, and warnings as lines."""
    from jaxldm.commands.terminal import print_warnings_as_lines

    if computes:
        from jaxldm import host

        host.prepare(keep_compiled=not trains)
        host.use_compilation_cache()
    print_warnings_as_lines()


def on_interrupt(number: int, frame: Any) -> None:
    """Raises `KeyboardInterrupt`; while a module is imported, which may be C that it would crash, ends."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            interrupted(own_process=True, more=RESUME if sys.argv[1:2] in TRAINING else "")
        frame = frame.f_back
    raise KeyboardInterrupt


def repeat_interrupt(unraisable: Any, later: float = 0.05) -> None:
    """A hook of Python for exceptions in callbacks of the garbage collector, where Ctrl-C would be lost."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        threading.Timer(later, _thread.interrupt_main).start()
    else:
        sys.__unraisablehook__(unraisable)


def interrupted(own_process: bool, more: str = "") -> int:
    """Prints one line on stderr and returns, or in its own process ends with, exit code 130."""
    stderr = sys.__stderr__ if own_process else sys.stderr  # the parser's is redirected
    print(f"\njaxldm: interrupted{': ' if more else ''}{more}", file=stderr)
    if own_process:
        # A running computation cannot be stopped, and would call back into an interpreter that has ended.
        end_process(130)
    return 130


def is_one_of_several() -> bool:
    """Whether this process trains with others."""
    hosts: Any = sys.modules.get("jaxldm.commands.hosts")
    return hosts is not None and hosts.are_joining()


def end_process(code: int) -> None:
    """Ends this process without waiting for anything but other processes that end now, too."""
    for stream in (sys.stdout, sys.__stderr__):
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.flush()
    if is_one_of_several():
        from jaxldm.commands import hosts

        hosts.leave()
    os._exit(code)


def parse(words: list[str]):
    """Parses the arguments into a command dataclass; prints and returns None for `--help` and `--version`.

    Raises:
        UnknownNameError: a command or option that does not exist.
        InvalidArgumentError: values that cannot be parsed.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        print_help()
        return None
    if words[0] == "--version":
        print(f"jaxldm {__version__}")
        return None
    name, *words = words
    one_of("command", name, COMMANDS)
    if words and words[0] in SUBCOMMANDS.get(name, ()):
        command_class = load_command(words[0])
        name = f"{name} {words.pop(0)}"
    else:
        command_class = load_command(name)
    check_words(words, command_class, name)

    import tyro

    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(
                command_class, prog=f"jaxldm {name}", args=words, config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as end:
        if not end.code:
            return None
        raise InvalidArgumentError(f"{one_line(stderr.getvalue())} (see `jaxldm {name} --help`)") from None


def split_imports(words: list[str]) -> tuple[list[str], list[str]]:
    """(modules, words behind) of `--import MODULE` or `--import=MODULE` in front of the command."""
    modules = []
    while words and words[0].split("=")[0] == "--import":
        first, *words = words
        given = words.pop(0) if words and "=" not in first else ""
        modules.append(first.partition("=")[2] or given)
    return modules, words


@contextlib.contextmanager
def imported(modules: Sequence[str]) -> Iterator[None]:
    """Imports modules, and has their names in the commands that are suggested inside the block.

    Raises:
        InvalidArgumentError: no module, or one that cannot be imported.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except (ImportError, ValueError) as error:
            raise InvalidArgumentError(
                f"--import needs the name of a module that Python can import, got {name!r}: {error} (for a "
                "file in this folder put PYTHONPATH=. in front of the command)"
            ) from error
        except JaxldmError:
            raise
        except Exception as error:
            raise InvalidArgumentError(f"--import {name}: {type(error).__name__}: {error}") from error
    token = IMPORTED.set(tuple(modules))
    try:
        yield
    finally:
        IMPORTED.reset(token)


def print_help() -> None:
    """Prints the commands and a first session."""
    commands = "\n".join(f"  {name:10}{description}" for name, description in COMMANDS.items())
    print(HELP.format(commands=commands))


def one_line(message: str) -> str:
    """An error message of tyro as one line, without frame, title, argument help and closing advice."""
    lines = [line.strip("│|╭╮╰╯─+- ") for line in message.splitlines()[1:]]
    text = " ".join(line for line in lines if line)
    return re.split(r"Argument helptext|For full helptext|Perhaps you meant|Got errors", text)[0].strip(" :.")


def describe_os_error(error: OSError) -> str:
    """One line about a file that a library could not read or write, with the fix where it is known."""
    target = error.filename or "the output"
    if error.errno in (errno.EACCES, errno.EPERM) and not isinstance(error, JaxldmError):
        return f"{target}: {cause(error)}"  # it may have been to be read
    return str(storage_error(error, target) or f"{target}: {error.strerror or error}")


def print_error(message: str) -> int:
    """Prints one line of at most `MAX_LINE` characters on stderr and returns exit code 2."""
    with contextlib.suppress(OSError):  # nobody reads it
        print(in_one_line("jaxldm: " + message), file=sys.stderr)
    return 2


def in_one_line(message: str) -> str:
    """A message in one line, without its middle where it is too long: what to type is at the end."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 165]} ... {line[-160:]}"


if __name__ == "__main__":
    sys.exit(main())
