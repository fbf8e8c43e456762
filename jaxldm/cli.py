"""The command line: `jaxldm train | sample | eval | export | info`.

Each command is a frozen dataclass in `jaxldm.commands`; tyro derives the options and the help from its fields
and their docstrings. A user error is one line on stderr and exit code 2, without a traceback. Nothing heavy
is imported here, so that `--help` is fast.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence

from jaxldm import __version__
from jaxldm.commands import COMMANDS, load_command
from jaxldm.errors import InvalidArgumentError, JaxldmError, one_of

HELP = """usage: jaxldm [--import MODULE] COMMAND ...

Latent diffusion: train a model, sample from it, evaluate it, export it.

commands:
{commands}

A first session (about ten minutes without an accelerator):
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
    own_process = argv is None
    argv = list(sys.argv[1:] if own_process else argv)
    try:
        command = parse(argv)
        if command is not None:
            if own_process:  # a notebook or a test that calls `main([...])` keeps its own settings
                from jaxldm import host

                host.prepare()
                host.use_compilation_cache()
            command.run()
        return 0
    except JaxldmError as error:
        return print_error(str(error))
    except BrokenPipeError:  # the reader of our stdout, for example `head`, has ended
        sys.stdout = None
        return 0
    except OSError as error:
        return print_error(describe_os_error(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return print_error("out of memory: use fewer images, a smaller batch or a smaller model")
    except KeyboardInterrupt:
        resume = "; the same command with --resume continues from the last checkpoint"
        print(f"\njaxldm: interrupted{resume if argv[:1] == ['train'] else ''}", file=sys.stderr)
        if own_process:
            # A running computation cannot be stopped, and would call back into an interpreter that has ended.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        return 130


def parse(argv: list[str]):
    """Parses the arguments into a command dataclass; prints and returns None for `--help` and `--version`.

    Raises:
        UnknownNameError: a command or option that does not exist.
        InvalidArgumentError: values that cannot be parsed.
    """
    while argv and argv[0].split("=")[0] == "--import":
        argv = import_module(argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print_help()
        return None
    if argv[0] == "--version":
        print(f"jaxldm {__version__}")
        return None
    name, *words = argv
    one_of("command", name, COMMANDS)
    command_class = load_command(name)
    check_options(words, command_class, name)

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


def import_module(argv: list[str]) -> list[str]:
    """Imports the module of `--import MODULE` or `--import=MODULE`; the words behind it.

    Raises:
        InvalidArgumentError: no module, or one that cannot be imported.
    """
    first, *words = argv
    name = first.partition("=")[2] or (words.pop(0) if words and "=" not in first else "")
    try:
        importlib.import_module(name)
    except (ImportError, ValueError) as error:
        raise InvalidArgumentError(
            f"--import needs the name of a module that Python can import, got {name!r}: {error} (for a file "
            "in this folder put PYTHONPATH=. in front of the command)"
        ) from error
    return words


def print_help() -> None:
    """Prints the commands and a first session."""
    commands = "\n".join(f"  {name:8}{description}" for name, description in COMMANDS.items())
    print(HELP.format(commands=commands))


def check_options(words: list[str], command_class: type, name: str) -> None:
    """Raises `UnknownNameError` for an option that the command does not have."""
    options = [
        "--help",
        *(
            "--" + field.name.replace("_", "-")
            for field in dataclasses.fields(command_class)
            if "Positional" not in str(field.type)
        ),
    ]
    for word in words:
        if word.startswith("--"):
            one_of(f"option of `jaxldm {name}`", word.split("=")[0].replace("_", "-"), options)


def one_line(message: str) -> str:
    """An error message of tyro as one line, without frame, title, argument help and closing advice."""
    lines = [line.strip("│|╭╮╰╯─+- ") for line in message.splitlines()[1:]]
    text = " ".join(line for line in lines if line)
    return re.split(r"Argument helptext|For full helptext|Perhaps you meant|Got errors", text)[0].strip(" :.")


def describe_os_error(error: OSError) -> str:
    """One line about a file that a library could not read or write, with the fix where it is known."""
    from jaxldm.files import storage_error

    target = error.filename or "the output"
    return str(storage_error(error, target) or f"{target}: {error.strerror or error}")


def print_error(message: str) -> int:
    """Prints one line on stderr and returns exit code 2."""
    print("jaxldm: " + " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
