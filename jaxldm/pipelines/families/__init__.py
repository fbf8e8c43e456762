"""The families of models: one file each, read from top to bottom like the authors' own sampling script.

To add one here: a file, and a line in `FAMILIES`. From outside: `find("package.module:FAMILY")`, or an entry
point of your package in the group "jaxldm.families", named as the class in model_index.json.
"""

from __future__ import annotations

import copyreg
import sys
from typing import Any, cast

from jaxldm.diffusion import registry
from jaxldm.errors import InvalidArgumentError, Table, shown
from jaxldm.pipelines.families.amused import AMUSED
from jaxldm.pipelines.families.class_to_image import CLASS_TO_IMAGE, DIT
from jaxldm.pipelines.families.deepfloyd_if import DEEPFLOYD_IF, DEEPFLOYD_IF_SUPER_RESOLUTION
from jaxldm.pipelines.families.flux import FLUX
from jaxldm.pipelines.families.flux2 import FLUX2, FLUX2_KLEIN
from jaxldm.pipelines.families.flux_pictures import FLUX_CONTROL, FLUX_FILL, FLUX_KONTEXT
from jaxldm.pipelines.families.flux_redux import FLUX_REDUX
from jaxldm.pipelines.families.instruct_pix2pix import INSTRUCT_PIX2PIX, INSTRUCT_PIX2PIX_XL
from jaxldm.pipelines.families.latent_diffusion import LDM_SUPER_RESOLUTION, LDM_TEXT_TO_IMAGE
from jaxldm.pipelines.families.latent_upscale import LATENT_UPSCALE
from jaxldm.pipelines.families.maskgit import MASKGIT
from jaxldm.pipelines.families.pixart import PIXART_ALPHA, PIXART_SIGMA
from jaxldm.pipelines.families.qwen_image import QWEN_IMAGE
from jaxldm.pipelines.families.stable_diffusion import STABLE_DIFFUSION
from jaxldm.pipelines.families.stable_diffusion_3 import STABLE_DIFFUSION_3
from jaxldm.pipelines.families.stable_diffusion_upscale import STABLE_DIFFUSION_UPSCALE
from jaxldm.pipelines.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from jaxldm.pipelines.families.wuerstchen import WUERSTCHEN, WUERSTCHEN_DECODER, WUERSTCHEN_PRIOR
from jaxldm.pipelines.families.z_image import Z_IMAGE
from jaxldm.pipelines.family import Family

# Class-to-image families, which `jaxldm sample` draws from labels.
OF_CLASSES: tuple[Family, ...] = (CLASS_TO_IMAGE, DIT, MASKGIT)
# A new family adds one line.
FAMILIES: tuple[Family, ...] = (
    *OF_CLASSES,
    AMUSED,
    STABLE_DIFFUSION,
    LDM_TEXT_TO_IMAGE,
    LDM_SUPER_RESOLUTION,
    STABLE_DIFFUSION_XL,
    INSTRUCT_PIX2PIX,
    INSTRUCT_PIX2PIX_XL,
    STABLE_DIFFUSION_UPSCALE,
    LATENT_UPSCALE,
    STABLE_DIFFUSION_3,
    FLUX,
    FLUX_FILL,
    FLUX_CONTROL,
    FLUX_KONTEXT,
    FLUX_REDUX,
    FLUX2,
    FLUX2_KLEIN,
    PIXART_SIGMA,
    PIXART_ALPHA,
    DEEPFLOYD_IF,
    DEEPFLOYD_IF_SUPER_RESOLUTION,
    WUERSTCHEN,
    WUERSTCHEN_PRIOR,
    WUERSTCHEN_DECODER,
    Z_IMAGE,
    QWEN_IMAGE,
)
# `_class_name` of model_index.json -> the family.
PIPELINES: dict[str, Family] = Table("pipeline class")
PIPELINES |= {name: family for family in FAMILIES for name in family.folder.class_names}
ENTRY_POINTS = "jaxldm.families"


def find(family: Family | str) -> Family:
    """The family of that name.

    Args:
        family: one; or the name of a class in model_index.json, of this library or of an installed package
            (entry-point group "jaxldm.families", class name -> `Family`); or "package.module:FAMILY".

    Raises:
        UnknownNameError: no family of that name.
        InvalidArgumentError: a place that cannot be imported, or that holds no `Family`.
    """
    if isinstance(family, Family):
        return family
    return registry.find("family", family, PIPELINES, ENTRY_POINTS, Family)


def place_of(family: Family) -> tuple[Any, tuple[str]]:
    """`find`, and the name with which it gives this family again, as `pickle` wants to know it.

    Raises:
        InvalidArgumentError: a family of one's own that no module has.
    """
    for name, known in PIPELINES.items():
        if known is family:
            return find, (name,)
    for module in {getattr(part, "__module__", None) for part in family if callable(part)}:
        for name, value in vars(sys.modules.get(module or "", find)).items():
            if value is family:
                return find, (f"{module}:{name}",)
    raise InvalidArgumentError(
        f"the family {shown(family.name)} cannot be found again, as no module has it: give it a name in its "
        "file, or write pipelines.save(pipe, folder) and pipelines.load(folder, family=...)"
    )


copyreg.pickle(cast(Any, Family), place_of)


def class_names() -> list[str]:
    """The class names that `find` takes: of this library, then of installed packages."""
    return registry.names(PIPELINES, ENTRY_POINTS)
