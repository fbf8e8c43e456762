"""What the recipes that have a name ask, how long they take, and what to expect: `jaxldm info RECIPE`.

A recipe in a file of its own says so in its docstring. These are apart from `known_recipes`, where several
recipes share most of their fields. Their command is `jaxldm train NAME`, their hardware a CPU.
"""

from __future__ import annotations

from typing import NamedTuple


class Head(NamedTuple):
    """What a recipe is about.

    Attributes:
        question: that it answers.
        minutes: of training on so many cores of an AMD EPYC, with nothing else running unless it says so.
        figures: what came out; w is the guidance scale, and the distance Fréchet's, by the features of the
            recipe's classifier, as a multiple of that between two sets of real digits.
    """

    question: str
    minutes: str
    figures: str


_TWO = "on two cores"
_UNKNOWN = "not measured"
_DYNAMIC = "not measured from nothing; from a trained Tiny DiT: experiments/less_compute/README.md"


def _few_steps(question: str, seconds: int, figures: str) -> Head:
    """Of a network that draws in few steps; its autoencoder and classifier are those of mini-ldm."""
    return Head(question, f"{seconds / 60:.1f} {_TWO}, besides autoencoder and classifier", figures)


HEADS: dict[str, Head] = {
    "mini-ldm": Head(
        "How small can a whole latent diffusion model be, and what does guidance do to what it draws?",
        f"3.0 {_TWO}",
        "classified as requested 93 % at w = 1 and 100 % at w = 3, distance 1.35 and 4.92 (50 DDIM steps)",
    ),
    "mini-ldm-32": Head(
        "What does it cost to build the mini latent diffusion of networks that diffusers has too?",
        f"4.6 {_TWO}",
        "classified as requested 91 % at w = 1 and 100 % at w = 3, distance 1.30 and 6.74 (50 DDIM steps)",
    ),
    "mini-ldm-dit": Head(
        "What changes with a transformer in the place of the U-Net, on the same latents?", _UNKNOWN, _UNKNOWN
    ),
    "tiny-dit": Head(
        "Does a transformer over 49 patches of a digit learn to draw, with the training loop of the U-Net?",
        "15 on one core, the other busy",
        "classified as requested 81 % at w = 1 and 99 % at w = 3, distance 8.1 and 8.0 (50 DDIM steps)",
    ),
    "tiny-dydit": Head(
        "What is lost, and what gained, with heads and channels by the time and tokens past the MLP, in half "
        "the compute of the blocks?",
        _UNKNOWN,
        _DYNAMIC,
    ),
    "tiny-adaptive-depth": Head(
        "What is lost, and what gained, where whole blocks are left out by the time?", _UNKNOWN, _DYNAMIC
    ),
    "tiny-token-pruning": Head(
        "What is lost, and what gained, where tokens skip the middle blocks?", _UNKNOWN, _DYNAMIC
    ),
    "tiny-d2it": Head(
        "What is lost, and what gained, with a quarter of the regions in finer patches?", _UNKNOWN, _DYNAMIC
    ),
    "captioned-shapes": Head(
        "Does it draw what a caption says, and pairs of shape and colour that it has never seen together?",
        f"19 {_TWO}",
        "shape and colour as in the caption 98.3 %, of pairs that it has not seen as well (w = 2, 20 steps)",
    ),
    "openmoji": Head(
        "Does it draw what a name means, and names that it has never seen?",
        f"about 54 {_TWO}",
        "the real picture is among the 10 nearest of 500 for 82 % of seen names, 48 % of held-out (w = 3)",
    ),
    "kl-gan-digits": Head(
        "How sharp are the strokes of an autoencoder with a perceptual distance and a discriminator?",
        _UNKNOWN,
        _UNKNOWN,
    ),
    "vq-gan-digits": Head(
        "How sharp are the strokes with a codebook, and how many of its 64 entries are in use?",
        _UNKNOWN,
        _UNKNOWN,
    ),
    "mini-mean-flow": _few_steps(
        "What does one step of a mean flow draw that begins from nothing?",
        184,
        "one step: classified as requested 89 % at w = 1 and 100 % at w = 3, distance 1.99 and 3.31",
    ),
    "mini-improved-mean-flow": _few_steps(
        "What does one step of an improved mean flow draw that begins from nothing?",
        197,
        "one step: classified as requested 92 % at w = 1 and 100 % at w = 3, distance 1.62 and 3.83",
    ),
    "mini-shortcut": _few_steps(
        "What does one step of a shortcut model draw, which has the length of a step as an input?",
        165,
        "one step: classified as requested 95 % at w = 1 and 99 % at w = 3, distance 2.14 and 5.16",
    ),
    "mini-ict": _few_steps(
        "What does one step draw after consistency training without a teacher?",
        179,
        "one step: classified as requested 92 % at w = 1 and 96 % at w = 3, distance 1.92 and 2.72",
    ),
    "mini-drifting": Head(
        "What does one step draw that was pushed towards the data, and away from other drawn images?",
        f"2.6 {_TWO} for eight of its eighteen epochs, besides autoencoder and classifier",
        "one step, after eight epochs: classified as requested 89 %, distance 2.82",
    ),
    "masked-digits": Head(
        "What does unmasking 16 grey levels in 12 steps gain and cost, next to a diffusion transformer?",
        f"7 to 8 {_TWO}, next to other programs",
        "classified as requested 87 % at w = 1 and 98 % at w = 2, distance 5.3 and 4.6 (12 steps)",
    ),
    **{
        name: Head("Does everything run?", "less than one", "none: what it draws is noise")
        for name in ("smoke", "smoke-32", "smoke-dit", "smoke-masked")
    },
}
