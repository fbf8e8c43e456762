"""The options of `jaxldm sample` about IP-Adapters."""

from __future__ import annotations

from typing import Any

from jaxldm.errors import InvalidArgumentError

OF_IMAGE_PROMPTS = ("ip_adapter", "image_encoder", "ip_adapter_image", "ip_adapter_scale")


def with_ip_adapters(options: Any, pipe: Any) -> Any:
    """The model, with the files of --ip-adapter where there are any.

    Raises:
        InvalidArgumentError: an adapter without an image encoder.
    """
    from jaxldm import pipelines

    for file in options.ip_adapter or ():
        pipe = pipelines.with_ip_adapter(pipe, file, options.image_encoder)
        if pipe.image_adapters[-1].encoder is None:
            raise InvalidArgumentError(
                f"--ip-adapter {file} needs the image encoder that it was trained with: give its folder, "
                "--image-encoder FOLDER"
            )
    return pipe


def image_prompts(options: Any) -> dict[str, Any]:
    """The options of a call with --ip-adapter-image, read."""
    from jaxldm.data.pictures import open_picture

    if options.ip_adapter_image is None:
        return {}
    adapters, scales = len(options.ip_adapter or ()), options.ip_adapter_scale
    pictures: list[Any] = [open_picture(file) for file in options.ip_adapter_image]
    if adapters == 1:
        pictures = [pictures]
    scale = scales[0] if scales is not None and len(scales) == 1 else scales
    return {"ip_adapter_image": pictures, "ip_adapter_scale": scale}
