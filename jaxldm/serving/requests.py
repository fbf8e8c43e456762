"""What requests may ask for: one table of fields, from which bodies are read and the API is described."""

from __future__ import annotations

import dataclasses
import functools
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from jaxldm.arguments import check_fields, count, number, several, text
from jaxldm.errors import InvalidArgumentError, JaxldmError, UnknownNameError, shown
from jaxldm.exact import LARGEST_UINT32, ceil_product
from jaxldm.pipelines.pipeline import Pipeline
from jaxldm.serving.engine import Engine
from jaxldm.serving.hints import no_such_field
from jaxldm.serving.jobs import MAX_STEPS
from jaxldm.serving.pictures import FORMATS, read_picture

MAX_IMAGES, MAX_PREVIEWS, MAX_TIMEOUT = 10, 20, 86400.0
MAX_TEXT = 10_000  # characters of a prompt
MAX_SCALE = 1000.0  # of guidance: beyond it numbers overflow
# What OpenAI's clients may send besides, and what has no meaning here; nothing else is ignored.
OPENAI_NAMES = {"num_images": "n", "format": "output_format", "previews": "partial_images"}  # ours -> theirs
IGNORED_OF_OPENAI = ("background", "moderation", "quality", "style", "user", "output_compression")


class BadRequest(Exception):
    """A request that is refused.

    Attributes:
        status: of HTTP.
        type: a short name for programs.
        message: one line for people: what was given, what is allowed.
        param: the field that it is about.
        allowed: what may be sent instead, as JSON.
        retry_after: seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        allowed: Any = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.type, self.message = status, type, message
        self.param, self.allowed, self.retry_after = param, allowed, retry_after

    def with_names(self, names: Mapping[str, str]) -> BadRequest:
        """The same about a field that the caller calls by another name."""
        name = names.get(self.param or "")
        if name is not None:
            self.message, self.param = self.message.replace(str(self.param), name), name
        return self

    def body(self) -> dict[str, Any]:
        """As JSON."""
        error = {"type": self.type, "message": self.message, "param": self.param, "allowed": self.allowed}
        return {"error": error}


@dataclasses.dataclass(frozen=True, eq=False)
class Offer:
    """What a server draws: facts of a model, and what is compiled of it. See `offer_of`.

    Attributes:
        name: in answers, and what clients send as "model".
        family: of the model.
        draws_texts: whether it draws from texts, and not from classes.
        num_classes: of a model of classes.
        class_names: of those that have names.
        own_size: (height, width) of the images where no size is asked for.
        default_guidance_scale: where none is asked for.
        guides: whether a guided step takes two rows of the network's batch.
        always_guided: every step does, at a scale of the model's own (Qwen-Image).
        default_steps: by solver; None is the model's own.
        solvers: names; the first is the default.
        sizes: (height, width) of the images; the first is the default.
        max_steps: the most of one image.
        max_images: the most of one request.
        takes_images, default_strength: whether it also starts from an image, and how much of one it draws.
    """

    name: str
    family: str
    draws_texts: bool
    num_classes: int | None
    class_names: tuple[str, ...]
    own_size: tuple[int, int]
    default_guidance_scale: float
    guides: bool
    default_steps: Mapping[str | None, int]
    solvers: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    max_steps: int = MAX_STEPS
    max_images: int = MAX_IMAGES
    takes_images: bool = False
    default_strength: float = 0.8
    always_guided: bool = False

    def __post_init__(self):
        check_fields(self, name=text, solvers=several(text), max_images=count(1, 1000))

    @property
    def all_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the images."""
        return self.sizes or (self.own_size,)

    def guided(self, guidance_scale: float | None) -> bool:
        """Whether a step of such a request takes two rows of the network's batch."""
        scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        return self.always_guided or (scale != 1 and self.guides)

    def steps(self, num_inference_steps: int | None, solver: str | None) -> int:
        """The steps that a request asks for."""
        return num_inference_steps or self.default_steps[solver]

    def steps_left(self, steps: int, options: Mapping[str, Any]) -> int:
        """How many of them are taken, at most: those that the strength of an image leaves."""
        strength = options.get("strength", self.default_strength) if "image" in options else 1
        return ceil_product(steps, strength)

    def calls(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """(prompts, options) of one call of each kind that is to be compiled."""
        prompts = ("",) if self.draws_texts else (None if self.num_classes is None else [0],)
        scales = dict.fromkeys((self.default_guidance_scale, 1.0))
        for size in self.sizes or (None,):
            place = {} if size is None else {"height": size[0], "width": size[1]}
            for solver in self.solvers or (None,):
                for scale in scales:
                    options = {"solver": solver, "guidance_scale": scale, **place}
                    yield prompts, options
                    if self.takes_images:
                        black = np.zeros((*(size or self.own_size), 3), np.uint8)
                        yield prompts, options | {"image": black, "strength": 0.5}

    @functools.cached_property
    def fields(self) -> dict[str, Field]:
        """The fields of POST /generate."""
        return fields_of(self)

    def allow(self, engine: Engine) -> None:
        """Has an engine compile all of it in `warm_up`."""
        for prompts, options in self.calls():
            engine.allow(*prompts, **options)


def offer_of(
    pipe: Pipeline,
    name: str,
    solvers: tuple[str, ...] = (),
    sizes: tuple[tuple[int, int], ...] = (),
    max_steps: int = MAX_STEPS,
    max_images: int = MAX_IMAGES,
) -> Offer:
    """The offer of a model.

    Raises:
        InvalidArgumentError: sizes, of a model that draws one.
        UnknownNameError: a solver that does not exist.
    """
    known = pipe.call_options()
    if sizes and "height" not in known:
        raise InvalidArgumentError(f"a {pipe.family.name} draws images of one size: leave the sizes out")
    has_shape = "image_shape" in pipe.family.methods
    return Offer(
        name=name,
        family=pipe.family.name,
        draws_texts="negative_labels" not in known,
        num_classes=pipe.num_classes,
        class_names=tuple(getattr(pipe, "class_names", ())),
        own_size=cast(tuple[int, int], tuple(pipe.image_shape()[:2] if has_shape else pipe.default_size)),
        default_guidance_scale=pipe.default_guidance_scale,
        guides=not pipe.is_guidance_distilled and not pipe.family.true_cfg,
        default_steps={solver: pipe.default_steps(solver) for solver in (None, *solvers)},
        solvers=solvers,
        sizes=sizes,
        max_steps=max_steps,
        max_images=max_images,
        takes_images="image" in known and pipe.autoencoder is not None and not pipe.latent_spec.takes_mask,
        default_strength=pipe.defaults.strength,
        always_guided=pipe.family.true_cfg and pipe.defaults.true_cfg_scale != 1,
    )


class Field(NamedTuple):
    """A field of a request's body.

    Attributes:
        schema: of JSON, with a description; what errors say is allowed.
        check: (name, value) -> value.
    """

    schema: dict[str, Any]
    check: Callable[[str, Any], Any]


@dataclasses.dataclass(frozen=True)
class Generation:
    """A request that was read: fields as in the API; None is what was left out, but for the seed."""

    seed: int
    image: bytes | None = None
    strength: float | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    class_labels: tuple[int | str, ...] | None = None
    negative_labels: tuple[int | str, ...] | None = None
    num_images: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    solver: str | None = None
    height: int | None = None
    width: int | None = None
    format: str = "png"
    stream: bool = False
    previews: int = 0
    timeout: float | None = None


def fields_of(offer: Offer) -> dict[str, Field]:
    """The fields of POST /generate, for a model."""
    heights, widths = ([*dict.fromkeys(side)] for side in zip(*offer.all_sizes, strict=True))
    fields = {
        "num_images": _whole("How many images.", 1, offer.max_images, 1),
        "num_inference_steps": _whole("Steps of each image.", 1, offer.max_steps, None),
        "guidance_scale": Field(
            {
                "type": "number",
                "minimum": 0,
                "maximum": MAX_SCALE,
                "default": offer.default_guidance_scale,
                "description": "Scale of classifier-free guidance; 1 is the model as trained.",
            },
            number(0, MAX_SCALE),
        ),
        "seed": _whole("Of all random numbers; without one, another each time.", 0, LARGEST_UINT32, None),
        "solver": _choice("Solver.", offer.solvers) if offer.solvers else None,
        "height": _choice("Pixels.", heights),
        "width": _choice("Pixels.", widths),
        "format": _choice("Of the images.", list(FORMATS)),
        "stream": Field(
            {"type": "boolean", "default": False, "description": "Answer with server-sent events."},
            _true_or_false,
        ),
        "previews": _whole("With stream: small pictures on the way.", 0, MAX_PREVIEWS, 0),
        "timeout": Field(
            {
                "type": "number",
                "exclusiveMinimum": 0,
                "maximum": MAX_TIMEOUT,
                "description": "Seconds after which the images are of no use.",
            },
            number(above=0, high=MAX_TIMEOUT),
        ),
    }
    if offer.draws_texts:
        own = {"prompt": _text("What to draw."), "negative_prompt": _text("What to avoid.")}
        own |= _fields_of_images(offer.default_strength) if offer.takes_images else {}
    elif offer.num_classes is not None:
        own = {
            "class_labels": _labels("Classes to draw: numbers or names, repeated.", offer),
            "negative_labels": _labels("Classes to avoid.", offer),
        }
    else:
        own = {}
    return own | {name: field for name, field in fields.items() if field is not None}


def read_generation(offer: Offer, body: Mapping[str, Any]) -> Generation:
    """A request's body, checked.

    Raises:
        BadRequest: a field that does not exist, is missing, or has a value that is not allowed.
    """
    fields = offer.fields
    given = {name: value for name, value in body.items() if value is not None}
    for name in given:
        if name not in fields:
            raise BadRequest(no_such_field(name, fields), param=name, allowed=[*fields])
    values = {name: _checked(name, fields[name], value) for name, value in given.items()}
    if offer.draws_texts and "prompt" not in values:
        raise BadRequest('give a text, as in {"prompt": "a cat in the snow"}', param="prompt")
    labels = values.get("class_labels")
    if labels is not None and "num_images" not in given:
        values["num_images"] = _checked("num_images", fields["num_images"], len(labels))
    if labels is None and "class_labels" in fields:
        raise BadRequest('name the classes to draw, as in {"class_labels": [3, 7]}', param="class_labels")
    for name in ("negative_prompt", "negative_labels"):
        if name in values and not offer.guided(values.get("guidance_scale")):
            raise BadRequest(f"{name} has no effect without guidance: leave it out", param=name)
    _check_size(offer, values)
    if "strength" in values and "image" not in values:
        raise BadRequest("strength is of an image to start from: send image, too", param="strength")
    if values.get("previews") and not values.get("stream"):
        raise BadRequest('previews come in a stream: send "stream": true, too', param="previews")
    values.setdefault("seed", secrets.randbelow(LARGEST_UINT32 + 1))
    return Generation(**values)


def call_of(offer: Offer, request: Generation) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(prompts, options) of the pipeline's call that draws a request, after the key."""
    names = ("num_inference_steps", "guidance_scale", "solver", "height", "width", "image", "strength")
    options = {name: getattr(request, name) for name in names if getattr(request, name) is not None}
    if "solver" not in options and offer.solvers:
        options["solver"] = offer.solvers[0]
    if offer.draws_texts:
        if (offer.sizes or request.image is not None) and "height" not in options:
            options["height"], options["width"] = offer.all_sizes[0]
        if request.image is not None:
            options["resize"] = "crop"
        options["num_images_per_prompt"] = request.num_images
        return (request.prompt, request.negative_prompt), options
    for name in ("height", "width"):
        options.pop(name, None)
    if offer.num_classes is None:
        return (None,), options | {"num_images": request.num_images}
    if request.negative_labels is not None:
        options["negative_labels"] = list(request.negative_labels)
    return (list(request.class_labels or ()),), options | {"num_images": request.num_images}


def read_openai(offer: Offer, body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of POST /v1/images/generations as one of POST /generate: n, size, partial_images and so on.

    Raises:
        BadRequest: another model, response format or size.
    """
    own = {name: value for name, value in body.items() if value is not None and name not in IGNORED_OF_OPENAI}
    model = own.pop("model", offer.name)
    if model != offer.name:
        message = f"there is no model {shown(model)} here: send {shown(offer.name)}, or leave it out"
        raise BadRequest(message, status=404, type="model_not_found", param="model", allowed=[offer.name])
    if own.pop("response_format", "b64_json") != "b64_json":
        message = 'images are sent as base64: send "response_format": "b64_json", or leave it out'
        raise BadRequest(message, param="response_format", allowed=["b64_json"])
    if not offer.draws_texts and not isinstance(own.get("prompt", ""), str):
        message = f'prompt must name the classes, separated by commas, as "3, 7", got {shown(own["prompt"])}'
        raise BadRequest(message, param="prompt")
    said_twice = [*OPENAI_NAMES.items(), ("height", "size"), ("width", "size"), ("class_labels", "prompt")]
    for ours, theirs in said_twice:
        if ours in own and theirs in own:
            raise BadRequest(f"{theirs} and {ours} say the same: leave one of them out", param=ours)
    for ours, theirs in OPENAI_NAMES.items():
        if theirs in own:
            own[ours] = own.pop(theirs)
    size = own.pop("size", "auto")
    if size != "auto":
        sizes = [f"{width}x{height}" for height, width in offer.all_sizes]
        if size not in sizes:
            message = f"size must be one of {', '.join(sizes)} (width x height) or auto, got {shown(size)}"
            raise BadRequest(message, param="size", allowed=[*sizes, "auto"])
        width, height = map(int, size.split("x"))
        own |= {"width": width, "height": height}
    if not offer.draws_texts and "prompt" in own:
        own["class_labels"] = _labels_in(own.pop("prompt"))
    return own


def read_json(body: bytes) -> dict[str, Any]:
    """A JSON object, without NaN and infinity.

    Raises:
        BadRequest: anything else.
    """

    def refuse(constant: str):
        raise ValueError(f"{constant} is no number of JSON")

    try:
        value = json.loads(body, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()  # refuses halves of a character, as in "\\ud800"
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).partition("; use sys.")[0].split())[:120]
        raise BadRequest(f"the body is no JSON: {reason}") from None
    if not isinstance(value, dict):
        raise BadRequest('the body must be a JSON object, as {"seed": 1}')
    return value


def _checked(name: str, field: Field, value: Any) -> Any:
    try:
        return field.check(name, value)
    except JaxldmError as error:
        allowed = field.schema.get("enum") or {
            key: entry for key, entry in field.schema.items() if key not in ("description", "default")
        }
        raise BadRequest(str(error), param=name, allowed=allowed) from None


def _check_size(offer: Offer, values: Mapping[str, Any]) -> None:
    """Raises `BadRequest` for a height and a width that are allowed, but not together."""
    sizes = offer.all_sizes
    height, width = values.get("height"), values.get("width")
    if (height, width) == (None, None) or (height, width) in sizes:
        return
    if height is None or width is None:
        raise BadRequest("give height and width, or neither", param="height", allowed=[*map(list, sizes)])
    nearest = min(sizes, key=lambda size: abs(size[0] - height) + abs(size[1] - width))
    raise BadRequest(
        f"height and width must be one of the sizes that are compiled, got {height}x{width}: "
        f"the nearest is {nearest[0]}x{nearest[1]}",
        param="height",
        allowed=[*map(list, sizes)],
    )


def _true_or_false(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"{name} must be true or false, got {shown(value)}")
    return value


def _whole(description: str, low: int, high: int, default: int | None) -> Field:
    schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": high, "description": description}
    if default is not None:
        schema["default"] = default
    return Field(schema, count(low, high))


def _choice(description: str, choices: Sequence[Any]) -> Field:
    kind = "integer" if isinstance(choices[0], int) else "string"
    schema = {"type": kind, "enum": [*choices], "default": choices[0], "description": description}

    def check(name: str, value: Any) -> Any:
        if type(value) is type(choices[0]) and value in choices:
            return value
        if kind == "string":
            raise UnknownNameError(name, value, choices)
        near = ""
        if len(choices) > 1 and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e9:
            near = f"; the nearest is {min(choices, key=lambda choice: abs(choice - value))}"
        listed = " or ".join(map(str, choices))
        raise InvalidArgumentError(
            f"{name} must be {listed}, got {shown(value)}{near} (sizes are compiled at the start)"
        )

    return Field(schema, check)


def _text(description: str) -> Field:
    def check(name: str, value: Any) -> str:
        if len(text(name, value)) > MAX_TEXT:
            raise InvalidArgumentError(
                f"{name} must have at most {MAX_TEXT} characters, got {len(value)}: shorten it"
            )
        return value

    return Field({"type": "string", "maxLength": MAX_TEXT, "description": description}, check)


def _fields_of_images(default: float) -> dict[str, Field]:
    """Of models that also start from an image."""
    what = "PNG, JPEG or WebP in base64, to start from; its centre, scaled to the size that is drawn."
    how = "How much of the image is drawn again: 1 is all of it."
    strength = {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": default, "description": how}
    return {
        "image": Field({"type": "string", "contentEncoding": "base64", "description": what}, read_picture),
        "strength": Field(strength, number(above=0, high=1)),
    }


def _labels(description: str, offer: Offer) -> Field:
    """One label or a list of them, each a number or a name."""
    last = (offer.num_classes or 1) - 1
    one = {"oneOf": [{"type": "integer", "minimum": 0, "maximum": last}, {"type": "string"}]}
    most = offer.max_images
    schema = {
        "oneOf": [*one["oneOf"], {"type": "array", "items": one, "minItems": 1, "maxItems": most}],
        "description": description,
    }

    def check(name: str, value: Any) -> tuple[int | str, ...]:
        several = value if isinstance(value, list) else [value]
        if not 1 <= len(several) <= most:
            raise InvalidArgumentError(f"{name} must be 1 to {most} labels, got {len(several)}")
        whole = count(0, last)
        return tuple(
            label if isinstance(label, str) and len(label) <= MAX_TEXT else whole(name, label)
            for label in several
        )

    return Field(schema, check)


def _labels_in(prompt: str) -> list[int | str]:
    """The classes that a prompt names, as "3, 7" or "tench"."""
    words = [word.strip() for word in prompt.split(",") if word.strip()]
    return [int(word) if word.isascii() and word.isdigit() and len(word) < 10 else word for word in words]
