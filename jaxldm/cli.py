"""The command line: `jaxldm train | sample | eval | export | info`.

Each command is a frozen dataclass in `jaxldm.commands`; tyro makes the options and the help from its fields
and their docstrings. A mistake of the caller's is one line on stderr and exit code 2, never a traceback.
Nothing heavy is imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import sys
from collections.abc import Sequence

from jaxldm import __version__
from jaxldm.commands import COMMANDS, load_command
from jaxldm.errors import InvalidArgumentError, JaxldmError, one_of

HELP = """usage: jaxldm COMMAND ...

Latent diffusion: train a model, draw with it, measure it, hand it on.

commands:
{commands}

A first session (about ten minutes without an accelerator):
  jaxldm train mini-ldm --run-dir runs/mini-ldm
  jaxldm sample runs/mini-ldm --class-labels 3 7 --num-images 64 --output-dir samples
  jaxldm eval runs/mini-ldm
  jaxldm export runs/mini-ldm exported/mini-ldm

`jaxldm COMMAND --help` explains the options of a command, `jaxldm --version` says which version this is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    0: done. 2: something is to mend in what was typed, in a file or on the disk; stderr says what in one
      line.
    130: interrupted with Ctrl-C.
    """
    own_process = argv is None
    argv = list(sys.argv[1:] if own_process else argv)
    try:
        command = parse(argv)
        if command is not None:
            if own_process:  # a notebook or a test that calls `main([...])` keeps its own settings
                from jaxldm import host

                host.prepare()
            command.run()
        return 0
    except JaxldmError as error:
        return complain(str(error))
    except BrokenPipeError:  # the reader of our stdout, `head` say, has gone: nobody is left to tell
        sys.stdout = None
        return 0
    except OSError as error:
        return complain(describe_os_error(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return complain("out of memory: ask for fewer images, a smaller batch or a smaller model")
    except KeyboardInterrupt:
        resume = "; the same command with --resume goes on from the last checkpoint"
        print(f"\njaxldm: interrupted{resume if argv[:1] == ['train'] else ''}", file=sys.stderr)
        if own_process:
            # A computation under way cannot be stopped, and would call back into an interpreter that is gone.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        return 130


def parse(argv: list[str]):
    """Turns the words typed into a command dataclass; prints and returns None for `--help` and `--version`.

    Raises `UnknownNameError` for a command or option that does not exist, and `InvalidArgumentError` for
    values that cannot be read.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP.format(commands="\n".join(f"  {name:8}{what}" for name, what in COMMANDS.items())))
        return None
    if argv[0] == "--version":
        print(f"jaxldm {__version__}")
        return None
    name, *words = argv
    one_of("command", name, COMMANDS)
    command_class = load_command(name)
    check_options(words, command_class, name)

    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                command_class, prog=f"jaxldm {name}", args=words, config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as end:
        if not end.code:
            return None
        raise InvalidArgumentError(f"{one_line(complaint.getvalue())} (see `jaxldm {name} --help`)") from None


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


def one_line(complaint: str) -> str:
    """tyro's framed complaint as one line: frame, title, argument help and closing advice taken away."""
    lines = [line.strip("│|╭╮╰╯─+- ") for line in complaint.splitlines()[1:]]
    text = " ".join(line for line in lines if line)
    return re.split(r"Argument helptext|For full helptext|Perhaps you meant|Got errors", text)[0].strip(" :.")


def describe_os_error(error: OSError) -> str:
    """One line for what a library could not read or write, with the cure where it is known."""
    from jaxldm.files import storage_error

    target = error.filename or "the output"
    return str(storage_error(error, target) or f"{target}: {error.strerror or error}")


def complain(message: str) -> int:
    """Prints one line on stderr and returns exit code 2."""
    print("jaxldm: " + " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
