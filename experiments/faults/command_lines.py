"""Question: does every mistake in a command line end in one line for people, and nothing else?

Command: python -m experiments.faults.command_lines
Needs: a minute on a CPU.

The lines are made from the parser's own options: each with wrong types, extremes, nothing, twice, and texts
that are not UTF-8; options that do not exist, that exclude or need each other, or belong to another model;
arguments that are missing or too many. Each must be refused with exit code 2 and one line of less than 400
characters on stderr, before anything is trained, compiled or written.
"""

from __future__ import annotations

import contextlib
import io
import random
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from experiments.faults.result import Result
from experiments.faults.small_folders import write_export, write_run, write_texts
from jaxldm import cli
from jaxldm.commands import COMMANDS, load_command
from jaxldm.commands.words import Option, options_of

LONGEST = 400  # characters of the line
NOT_UTF_8 = "a\udcffb"
WRONG = {
    int: ["", "many", "1.5", "1e3", "nan", "None", "-1", "9" * 30, "9" * 5000, NOT_UTF_8, "0x10", "1 2"],
    float: ["", "many", "nan", "inf", "-inf", "1e39", "-1e400", "None", "1,5", "9" * 5000, NOT_UTF_8, "-1"],
    str: ["", " ", "None", "no such thing", "x" * 5000, "a\0b", NOT_UTF_8, "../nowhere/at/all"],
    bool: ["True", "0", ""],
}
# Where one of these is right: texts may be any, and images may be put anywhere.
RIGHT = {
    "--prompt": {"", " ", "None", "no such thing", "x" * 5000, "../nowhere/at/all"},
    "--output-dir": {"no such thing", "../nowhere/at/all"},
    "--run-dir": {"no such thing", "../nowhere/at/all"},
    "OUT": {"no such thing", "../nowhere/at/all"},
    "--lora-scale": {"-1"},
    "--cache-dir": {" ", "None", "no such thing", "../nowhere/at/all"},
}
RIGHT["--negative-prompt"] = RIGHT["--prompt"]
TOO_MUCH = {
    "--num-images": "1000000000",
    "--num-inference-steps": "1000000000",
    "--height": "1000000000",
    "--width": "1000000000",
    "--epochs": "1000000000",
    "--autoencoder-epochs": "1000000000",
    "--devices": "1000000000",
    "--seed": "4294967296",
    "--guidance-rescale": "1.5",
    "--class-labels": "3",
    "--negative-class-labels": "1000000000",
    "--strength": "0",
}
# More of a command line, behind the right words of a command: what excludes, lacks or does not belong.
TOGETHER = {
    "sample classes": [
        "--sigmas 3 1 --spacing karras",
        "--sigmas 3 nan",
        "--sigmas 1 3",
        "--sigmas 3 -1",
        "--sigmas many",
        "--prompt cat",
        "--lora nowhere.safetensors",
        "--lora-scale 0.5",
        "--refiner nowhere",
        "--refiner-start 0.5",
        "--height 8",
        "--image cat.png",
        "--guidance-scale 1 --guidance-rescale 0.5",
        "--guidance-scale 1 --negative-class-labels 0",
        "--true-cfg-scale 2",
        "--eta 0.5 --solver dpmpp_2m",
        "--eta -1 --solver ddim",
        "--dtype float64",
        "--num-inference-steps 1001",
        "--token-merging 0.8",
        "--import os",
        "--import=os",
    ],
    "sample texts": [
        "--class-labels 3",
        "--strength 0.5",
        "--mask hat.png",
        "--lora-scale 0.5",
        "--refiner-start 0.5",
        "--image nowhere.png",
        "--image . --strength 0.5",
        "--height 17",
        "--width 0",
        "--true-cfg-scale 2",
        "--negative-prompt a b c",
        "--guidance-scale 1 --guidance-rescale 0.5",
        "--height 100000 --width 100000",
        "--image bomb.png",
        "--image torn.png",
        "--image float.tiff",
        "--image cat.png --strength nan",
        "--image cat.png --strength 1.5",
        "--image cat.png --mask colours.png",
        "--image cat.png --mask transparent.png",
        "--image cat.png --mask bomb.png",
        "--image cat.png --height 1000000000 --width 1000000000",
        "--image cat.png --height 0",
        "--image cat.png --guidance-scale -1",
        "--batch-size 1000000000",
    ],
    "serve": [
        "--host 0.0.0.0",
        "--port 70000",
        "--sizes 8x8",
        "--sizes 8",
        "--solvers ddim no",
        "--slots 0",
        "--max-steps 1001",
        "--dtype float64",
    ],
    "quantize": [
        "--bits int3",
        "--activations bf16",
        "--smooth 1.5",
        "--rank -1",
        "--group-size 1",
        "--modulation int4",
        "--prompt cat",
        "--smooth 0.5 --prompt cat",
        "--output-dir run",
    ],
    "prune": [
        "--heads 0",
        "--mlp 1.5",
        "--heads 1 --mlp 1",
        "--heads 0.001",
        "--timesteps 0",
        "--num-images 0",
        "--data nowhere/at/all",
        "--output-dir run",
    ],
    "train": [
        "--resume",
        "--preset digit-classifier",
        "--dataset huggingface:a/b",
        "--dataset a/../../b",
        "--autoencoder-epochs 3",
        "--batch-size 1000000000",
        "--learning-rate 0",
        "--devices 9",
        "--epochs 0",
    ],
    "distill": [
        "--num-steps 4",
        "--guidance-scale 1 2 3",
        "--guidance-scale 5 1",
        "--options hubber=1",
        "--options huber=-1",
        "--options huber",
        "--method lcm",
        "--run-dir run",
        "--resume",
    ],
    "eval": [
        "--sigmas 3 1 --spacing karras",
        "--num-images 3",
        "--guidance-scale 1 nan",
        "--guidance-scale 3 -1",
        "--solver no.such:module",
        "--spacing even",
        "--batch-size 0",
        "--resize clean",
        "--metrics is --dinov2 nowhere",
        "--metrics is --output-dir out",
        "--metrics cmmd --real run --clip nowhere --resize clean",
        "--metrics fdi",
    ],
}
ALONE = [
    ["smaple"],
    ["--import"],
    ["--import="],
    ["--import", "no_such_module", "info"],
    ["--import", "..", "info"],
    ["--version=1"],
    ["-q"],
    [""],
    ["train"],
    ["distill"],
    ["distill", "nowhere"],
    ["distill", "nowhere", "--method", "lcm"],
    ["sample"],
    ["eval"],
    ["export"],
    ["quantize"],
    ["quantize", "nowhere"],
    ["prune"],
    ["prune", "nowhere"],
    ["info", "a", "b"],
    ["info", "--compare", "a"],
    ["info", "no such thing"],
    ["info", "x" * 5000],
    ["info", NOT_UTF_8],
    [NOT_UTF_8],
    ["sample", "nowhere"],
    ["sample", "/dev/null"],
    ["eval", "nowhere"],
    ["export", "nowhere", "out"],
]


def run(count: int | None = None, seed: int = 0) -> Result:
    """Runs `count` of the command lines, by chance, or for None all.

    Args:
        count: of lines.
        seed: of the choice.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        every = list(lines(Path(folder)))
        if count is not None:
            every = random.Random(seed).sample(every, min(count, len(every)))
        before = set(Path(folder).rglob("*"))
        faults = [fault for words in every if (fault := fault_of(words))]
        faults += [f"a file was written: {path}" for path in set(Path(folder).rglob("*")) - before]
    return Result("command lines", len(every), faults, time.perf_counter() - start)


def lines(folder: Path) -> Iterator[list[str]]:
    """Every command line, of models that are written into `folder`."""
    write_pictures(folder)
    texts = [str(write_texts(folder / "texts")), "--prompt", "a cat"]
    right = {
        "train": ["smoke-dit"],
        "distill": [str(folder / "run"), "--method", "lcm"],
        "sample classes": [str(write_export(folder / "export"))],
        "sample texts": texts,
        "eval": [str(write_run(folder / "run"))],
        "export": [str(folder / "run"), "out"],
        "quantize": [str(folder / "run"), "--output-dir", "out"],
        "prune": [str(folder / "run"), "--output-dir", "out"],
        "info": [str(folder / "run")],
        "inspect": [str(folder / "run")],
        "serve": [str(folder / "export"), "--slots", "1"],
    }
    yield from ALONE
    for kind, words in right.items():
        name = kind.split()[0]
        for option in options_of(load_command(name)):
            yield from of_option(name, words, option, kind)
        yield [name, words[0], "one", "too", "many", *words[1:]]
        yield [name, *words, "--no-such-option", "3"]
        yield [name, *words, "-x"]
        yield [name, *words, "--"]
        yield from ([name, *words, *more.split()] for more in TOGETHER.get(kind, ()))
    assert {kind.split()[0] for kind in right} == set(COMMANDS)


def write_pictures(folder: Path) -> None:
    """A picture, and files that are no pictures, or no masks."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    Image.fromarray(pixels[..., :3]).save(folder / "cat.png")
    Image.fromarray(pixels[..., :3]).save(folder / "colours.png")
    Image.fromarray(pixels).save(folder / "transparent.png")
    Image.fromarray(pixels[..., 0].astype(np.float32)).save(folder / "float.tiff")
    whole = (folder / "cat.png").read_bytes()
    (folder / "torn.png").write_bytes(whole[: len(whole) // 2])
    header = b"IHDR" + (60_000).to_bytes(4) * 2 + b"\x08\x02\x00\x00\x00"
    content = (13).to_bytes(4) + header + zlib.crc32(header).to_bytes(4)
    (folder / "bomb.png").write_bytes(whole[:8] + content + whole[33:])


def of_option(name: str, words: list[str], option: Option, kind: str) -> Iterator[list[str]]:
    """The wrong values of one option."""
    wrong = [value for value in WRONG[option.kind] if value not in RIGHT.get(option.name, ())]
    if option.positional:
        place = 0 if option.name != "OUT" else 1
        yield from ([name, *words[:place], value, *words[place + 1 :]] for value in wrong)
        return
    words = words[:1] if option.name in words else words
    yield from ([name, *words, f"{option.name}={value}"] for value in wrong)
    yield [name, *words, option.name, "-x"]
    if option.kind is bool:
        yield [name, *words, option.name, option.name]
        yield [name, *words, option.name, "yes"]
        return
    yield [name, *words, option.name]
    yield [name, *words, option.name, "1", option.name.replace("-", "_").replace("__", "--", 1), "1"]
    yield [name, *words, f"{option.name[:-1]}_", "1"]
    if option.name in TOO_MUCH:
        yield [name, *words, option.name, TOO_MUCH[option.name]]


def fault_of(words: list[str]) -> str | None:
    """What is wrong with the end of a command line, in one line; None where it is right."""
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            code = cli.main(words)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})"
    else:
        text = stderr.getvalue()
        if code == 2 and text.count("\n") == 1 and text.startswith("jaxldm: ") and len(text) < LONGEST:
            return None
        outcome = f"exit code {code}, {text.count(chr(10))} lines of {len(text)} characters: {text!r}"
    shown = " ".join(ascii(word) if len(word) < 60 else ascii(word[:20] + "...") for word in words)
    return f"jaxldm {shown}: {' '.join(outcome.split())[:300]}"


def main() -> None:
    """Prints every fault, and how many command lines there were."""
    result = run()
    for fault in result.faults:
        print(fault)
    print(f"{result.count} {result.name}: {len(result.faults)} faults, {result.seconds:.0f} s")


if __name__ == "__main__":
    main()
