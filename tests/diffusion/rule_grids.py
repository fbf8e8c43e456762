"""The rows of a `GridRule` in one call, for comparisons with the schedulers of diffusers."""

from jaxldm import schedulers


def rule_grid(path, steps, *, shift=None, **options):
    return schedulers.GridRule(**options).make(path, steps, shift)
