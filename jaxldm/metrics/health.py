"""Health checks: what was seen, what the likely cause is, and what to do about it.

Each check is a pure function of arrays that returns a list of `Finding`, one per thing looked at. Training
and the demo call them and print `report(findings)`; nothing here stops a run. The limits are arguments.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxldm.arguments import array, check_shapes, checked, instance, number, optional, refuse, several
from jaxldm.errors import DataError
from jaxldm.metrics.scores import class_diversities, reconstruction_error
from jaxldm.pixels import in_unit_range


class Finding(NamedTuple):
    """One result of a check. `likely_cause` and `fix` are empty where all is well."""

    check: str
    seen: str
    likely_cause: str = ""
    fix: str = ""
    ok: bool = True


MOST_SKIPPED_SHARE = 0.1  # of the updates
IMAGES = array("real", "[N, H, W, C]", axes=4, filled=True)
DRAWN = in_unit_range(array("real", "[N, ...]", axes=(2, 64), filled=True), drawn=True)
OUTPUTS = array("real", "[N, ...]", axes=(2, 64), filled=True)
FINDINGS = several(instance(Finding, "findings of these checks"))


def _has_a_shape(name: str, value: Any) -> Any:
    """An array, or a `jax.ShapeDtypeStruct`."""
    if not isinstance(getattr(value, "shape", None), tuple):
        raise refuse(name, "an array or a jax.ShapeDtypeStruct", value)
    return value


@checked(findings=FINDINGS)
def failed(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings that are not ok."""
    return [finding for finding in findings if not finding.ok]


@checked(findings=FINDINGS)
def report(findings: Sequence[Finding]) -> str:
    """Return the findings as text: a line each, and two more with likely cause and fix for a bad one."""
    lines = []
    for finding in findings:
        lines.append(f"{'ok ' if finding.ok else 'BAD'}  {finding.check}: {finding.seen}")
        if not finding.ok:
            lines += [f"       likely cause: {finding.likely_cause}", f"       fix: {finding.fix}"]
    return "\n".join(lines)


@checked(images=in_unit_range(IMAGES, drawn=True), reconstructions=IMAGES, max_unexplained=number(0))
def check_reconstruction(
    images: Float[np.ndarray, "N H W C"],
    reconstructions: Float[np.ndarray, "N H W C"],
    *,
    max_unexplained: float = 0.1,
) -> list[Finding]:
    """Check whether MSE / Var(images) is at most `max_unexplained`; the mean image alone has 1.

    Var is the mean squared distance of the images to their mean image.
    """
    error = reconstruction_error(images, reconstructions)
    images = np.asarray(images, np.float64)
    variance = float(np.mean((images - images.mean(axis=0)) ** 2))
    if variance == 0:
        raise DataError("the reconstruction check needs images that differ from each other")
    share = error.mse / variance
    seen = f"MSE {error.mse:.4g} (PSNR {error.psnr:.1f} dB), {share:.1%} of the variance of the images"
    return _finding(
        "reconstruction",
        seen,
        share <= max_unexplained,
        "the autoencoder is trained too short, its latent is too small, or the KL weight beta is too "
        "large: whatever diffusion does later, samples cannot be sharper than this",
        "train the autoencoder longer, lower beta, or give it more latent channels",
    )


@checked(
    z_T=array("real", "[N, ..., C]", axes=(2, 64), filled=True), sigma=number(above=0), tolerance=number(0)
)
def check_terminal_latents(
    z_T: Float[np.ndarray, "N ..."], *, sigma: float = 1.0, tolerance: float = 0.1
) -> list[Finding]:
    """Check whether latents at the path's last t have mean 0 and standard deviation `sigma` per channel.

    `z_T` = alpha(T) z_0 + sigma(T) eps for real latents z_0, channels last. Both differences, in units of
    `sigma`, may be `tolerance` plus three standard errors.
    """
    values = np.asarray(z_T, np.float64)
    values = values.reshape(-1, values.shape[-1]) / sigma
    if not np.isfinite(values).all():
        return _finding(
            "z_T statistics",
            "NaN or infinity in the noised latents",
            False,
            "the encoder returned NaN, or the schedule was computed in half precision",
            "check the latents of the data; keep the schedule in float64 on the host",
        )
    means, stds = values.mean(axis=0), values.std(axis=0)
    slack = tolerance + 3 / np.sqrt(len(values))
    worst_mean, worst_std = means[np.argmax(abs(means))], stds[np.argmax(abs(stds - 1))]
    seen = (
        f"farthest channel mean {worst_mean:+.3f} and standard deviation {worst_std:.3f} in units of noise "
        "(0 and 1 wanted)"
    )
    return _finding(
        "z_T statistics",
        seen,
        abs(worst_mean) <= slack and abs(worst_std - 1) <= slack,
        "the schedule does not end in noise (alpha at the last t is not near 0), or the latents are not "
        "scaled: sampling starts from N(0, 1), which training has then never seen",
        "set scaling_factor to 1 / std of the latents, use more noise at the end, or rescale the betas to "
        "zero terminal SNR",
    )


@checked(output=_has_a_shape, x_t=_has_a_shape)
def check_prediction_shape(
    output: Float[np.ndarray, "..."] | jax.ShapeDtypeStruct,
    x_t: Float[np.ndarray, "..."] | jax.ShapeDtypeStruct,
) -> list[Finding]:
    """Check whether the network's output has the shape of its input; both may be `jax.ShapeDtypeStruct`."""
    return _finding(
        "prediction shape",
        f"input {tuple(x_t.shape)}, output {tuple(output.shape)}",
        tuple(output.shape) == tuple(x_t.shape),
        "the network's out_channels, or its down- and upsampling, do not fit the latents",
        "set in_channels = out_channels = latent channels; odd sizes need upsampling to the stored size",
    )


@checked(guided=OUTPUTS, guidance_scale=number(), unguided=optional(OUTPUTS))
def check_guided(
    guided: Float[np.ndarray, "B ..."],
    guidance_scale: float,
    *,
    unguided: Float[np.ndarray, "B ..."] | None = None,
) -> list[Finding]:
    """Look for NaN or infinity after classifier-free guidance; `unguided` outputs tell the source."""
    broken = int((~_finite_rows(guided)).sum())
    seen = f"{broken} of {len(guided)} outputs have NaN or infinity at guidance scale {guidance_scale:g}"
    cause = "the scale is so large that the guided output overflows, or the rescale divides by a std of 0"
    fix = "lower guidance_scale, compute in float32, or use guidance_rescale with its guard"
    if unguided is not None and not _finite_rows(unguided).all():
        cause, fix = (
            "the network returns NaN without guidance, too",
            "look at the training loss and the weights; load an earlier checkpoint",
        )
    return _finding("NaN after guidance", seen, broken == 0, cause, fix)


@checked(skipped=array("real", "[N]", axes=1), max_share=number(0))
def check_skipped(
    skipped: Sequence[float] | Float[np.ndarray, " N"], *, max_share: float = MOST_SKIPPED_SHARE
) -> list[Finding]:
    """Check how many updates were skipped, as their losses or gradients were not finite: 1 in the log."""
    many = int(np.count_nonzero(np.nan_to_num(np.asarray(skipped, np.float64))))
    return _finding(
        "skipped updates",
        f"{many} of {len(skipped)} updates were skipped, as their losses or gradients were not finite",
        many <= max_share * len(skipped),
        "the learning rate is too high, or half precision overflows",
        "start a new run with a lower learning rate, a longer warm-up or float32",
    )


@checked(losses=array("real", "[N]", axes=1))
def check_loss(losses: Sequence[float] | Float[np.ndarray, " N"]) -> list[Finding]:
    """Check whether every logged loss is finite."""
    values = np.asarray(losses, np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    seen = (
        f"{len(losses)} finite losses, the last is {losses[-1]:.4g}"
        if len(losses) and not len(bad)
        else f"{len(bad)} of {len(losses)} losses are NaN or infinite, the first at entry {bad[0]}"
        if len(bad)
        else "no losses yet"
    )
    return _finding(
        "loss",
        seen,
        not len(bad),
        "the learning rate is too high, gradients are not clipped, or half precision overflows",
        "lower the learning rate, warm up longer, clip to global norm 1, keep the loss in float32, and go "
        "on from the last checkpoint before it",
    )


@checked(mean=OUTPUTS, log_variance=OUTPUTS, min_kl=number())
def check_posterior_collapse(
    mean: Float[np.ndarray, "N h w c"], log_variance: Float[np.ndarray, "N h w c"], *, min_kl: float = 0.01
) -> list[Finding]:
    """Check whether each latent channel has information: a mean KL to N(0, 1) of `min_kl` nats or more.

    KL = (mean^2 + exp(log_variance) - 1 - log_variance) / 2 per number (Kingma and Welling 2014, appendix B).
    """
    check_shapes(mean=mean, log_variance=log_variance)
    mean, log_variance = np.asarray(mean, np.float64), np.asarray(log_variance, np.float64)
    kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)
    return check_channels(kl.mean(axis=tuple(range(kl.ndim - 1))), min_kl)


@checked(kl=array("real", "[c]", axes=1, filled=True), min_kl=number())
def check_channels(kl: Float[np.ndarray, " c"], min_kl: float = 0.01) -> list[Finding]:
    """`check_posterior_collapse`, given the mean KL of each channel."""
    kl = np.asarray(kl)
    dead = np.flatnonzero(~(kl >= min_kl))  # NaN counts as dead
    seen = f"KL per channel in nats: {', '.join(f'{value:.3g}' for value in kl)}"
    if len(dead):
        seen += f"; channel {', '.join(str(channel) for channel in dead)} has no information about the image"
    return _finding(
        "posterior collapse",
        seen,
        not len(dead),
        "the KL weight beta is too large too early, and the decoder ignores z",
        "lower beta, raise it slowly from 0 (annealing), or allow each channel some free bits",
    )


@checked(images=DRAWN, min_contrast=number(0), max_share=number(0))
def check_blank(
    images: Float[np.ndarray, "N H W C"], *, min_contrast: float = 0.05, max_share: float = 0.02
) -> list[Finding]:
    """Look for images of one grey level: standard deviation of the pixels below `min_contrast`, or NaN."""
    images = np.asarray(images, np.float64).reshape(len(images), -1)
    blank = ~(images.std(axis=1) >= min_contrast)
    levels = images[blank].mean(axis=1)
    kinds = {"NaN": np.isnan(levels).sum(), "black": (levels < -0.8).sum(), "white": (levels > 0.8).sum()}
    kinds["grey"] = len(levels) - sum(kinds.values())
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    seen = f"{blank.sum()} of {len(images)} images are blank" + (f" ({shown})" if shown else "")
    return _finding(
        "blank images",
        seen,
        blank.mean() <= max_share,
        "the latents are not divided by the scaling factor before decoding, sampling diverged, the "
        "decoder is untrained, or the value range is wrong",
        "compare scaling_factor with the trained autoencoder's, look for NaN, decode a real latent, and "
        "check that images are in [-1, 1]",
    )


@checked(min_ratio=number(0))
def check_diversity(
    vectors: Float[np.ndarray, "N ..."],
    labels: Int[np.ndarray, "N"],
    real_vectors: Float[np.ndarray, "M ..."],
    real_labels: Int[np.ndarray, "M"],
    *,
    min_ratio: float = 0.6,
) -> list[Finding]:
    """Check whether images of a class differ as much as real ones, by the mean distance within each class.

    `vectors` are pixels or features. The class with the lowest ratio decides.
    """
    drawn, real = class_diversities(vectors, labels), class_diversities(real_vectors, real_labels)
    ratios = {label: drawn[label] / real[label] for label in drawn if real.get(label, 0) > 0}
    if not ratios:
        raise DataError("the diversity check needs a class with at least two generated and two real images")
    worst = min(ratios, key=lambda label: ratios[label])
    seen = (
        f"within-class diversity is {np.mean(list(ratios.values())):.2f} of the real one on average, "
        f"{ratios[worst]:.2f} in class {worst}"
    )
    return _finding(
        "diversity",
        seen,
        ratios[worst] >= min_ratio,
        "guidance is too strong, the model is trained too short or has memorised few images, or the same "
        "noise was used for each image",
        "lower guidance_scale, train longer, and give each image its own key",
    )


@checked(images=DRAWN, real_images=DRAWN, max_contrast=number(0), max_excess=number(0))
def check_saturation(
    images: Float[np.ndarray, "N H W C"],
    real_images: Float[np.ndarray, "M H W C"],
    *,
    max_contrast: float = 1.15,
    max_excess: float = 0.15,
) -> list[Finding]:
    """Look for over-guidance: contrast, and pixels at the ends of the range, against real images.

    Contrast is the mean over images of the standard deviation of their pixels, as a ratio to the real one.
    A pixel is at an end when |x| >= 0.98; the share of such pixels may exceed the real share by
    `max_excess`.
    """
    images, real_images = _rows(images), _rows(real_images)
    of_real = real_images.std(axis=1).mean()
    if of_real == 0:
        raise DataError("the saturation check needs real_images that are not all of one grey level")
    contrast = images.std(axis=1).mean() / of_real
    clipped, real_clipped = (abs(images) >= 0.98).mean(), (abs(real_images) >= 0.98).mean()
    seen = (
        f"contrast {contrast:.2f} of the real one; {clipped:.0%} of the pixels at the ends of the range, "
        f"{real_clipped:.0%} in real images"
    )
    return _finding(
        "saturation",
        seen,
        contrast <= max_contrast and clipped - real_clipped <= max_excess,
        "guidance is too strong: the guided prediction leaves the range of the data",
        "lower guidance_scale, or use guidance_rescale (about 0.7)",
    )


@checked(images=IMAGES, real_images=IMAGES, min_ratio=number(0))
def check_sharpness(
    images: Float[np.ndarray, "N H W C"],
    real_images: Float[np.ndarray, "M H W C"],
    *,
    min_ratio: float = 0.7,
) -> list[Finding]:
    """Look for blur: the mean square frequency of the images, as a ratio to that of real ones.

    It is the mean squared difference of neighbouring pixels over the variance within an image, so neither
    brightness nor contrast changes it.
    """
    of_real = _mean_square_frequency(real_images)
    if of_real == 0:
        raise DataError("the sharpness check needs real_images that are not all of one grey level")
    ratio = _mean_square_frequency(images) / of_real
    return _finding(
        "sharpness",
        f"mean square frequency {ratio:.2f} of the real one",
        ratio >= min_ratio,
        "the autoencoder blurs (trained too short, beta too large), or sampling took too few steps",
        "look at the reconstructions first; then use more steps or a solver of second order",
    )


def _finding(check: str, seen: str, ok: bool | np.bool_, likely_cause: str, fix: str) -> list[Finding]:
    return [Finding(check, seen) if ok else Finding(check, seen, likely_cause, fix, False)]


def _rows(images) -> Float[np.ndarray, "N D"]:
    return np.asarray(images, np.float64).reshape(len(images), -1)


def _finite_rows(values) -> Bool[np.ndarray, "N"]:
    return np.asarray(np.isfinite(_rows(values)).all(axis=1))


def _mean_square_frequency(images) -> float:
    images = np.asarray(images, np.float64)
    differences = np.mean(np.diff(images, axis=1) ** 2) + np.mean(np.diff(images, axis=2) ** 2)
    variance = images.var(axis=(1, 2)).mean()
    return float(differences / variance) if variance else 0.0
