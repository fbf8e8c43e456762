"""The description of the API, of the fields that requests are read by."""

from __future__ import annotations

from typing import Any

from jaxldm import __version__
from jaxldm.serving.requests import IGNORED_OF_OPENAI, OPENAI_NAMES, Offer

ERRORS = {
    400: "A field that does not exist, or a value that is not allowed.",
    401: "Without the token of the server.",
    404: "Another model.",
    408: "The body came too slowly.",
    409: "The request was cancelled.",
    413: "The body is larger than 1 MiB.",
    415: "The body is no JSON.",
    421: "A name other than localhost, of a server without a token.",
    429: "Too many requests, or too long a queue: see Retry-After.",
    500: "Something broke.",
    503: "The model is being compiled, or the server is being stopped.",
    504: "Not done within the request's timeout.",
}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message", "param", "allowed"],
            "properties": {
                "type": {"type": "string"},
                "message": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "allowed": {},
            },
        }
    },
}
BASE64 = {"type": "string", "contentEncoding": "base64"}
GENERATED = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "created": {"type": "integer"},
        "model": {"type": "string"},
        "seed": {"type": "integer"},
        "format": {"type": "string"},
        "slots": {"type": "integer", "description": "K: the batch that each image was computed in."},
        "latency_ms": {"type": "number"},
        "images": {"type": "array", "items": BASE64},
    },
}
OPENAI = {
    "type": "object",
    "properties": {
        "created": {"type": "integer"},
        "data": {"type": "array", "items": {"type": "object", "properties": {"b64_json": BASE64}}},
        "output_format": {"type": "string"},
        "seed": {"type": "integer"},
    },
}


def document(offer: Offer) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a server of that model."""
    ours = {name: dict(field.schema) for name, field in offer.fields.items()}
    required = ["prompt" if "prompt" in ours else "class_labels"] if len(ours.keys() & _SUBJECTS) else []
    sizes = [f"{width}x{height}" for height, width in offer.all_sizes]
    theirs = {
        "model": {"type": "string", "enum": [offer.name]},
        "prompt": {"type": "string", "description": "What to draw; classes, separated by commas."},
        "n": ours["num_images"],
        "size": {"type": "string", "enum": ["auto", *sizes]},
        "response_format": {"type": "string", "enum": ["b64_json"]},
        "output_format": ours["format"],
        "stream": ours["stream"],
        "partial_images": ours["previews"],
    }
    theirs |= {name: {"description": "Ignored."} for name in IGNORED_OF_OPENAI}
    extensions = {name: schema for name, schema in ours.items() if name not in (*theirs, *OPENAI_NAMES)}
    paths = {
        "/generate": {"post": _post("Draw images.", ours, required, GENERATED, stream=True)},
        "/v1/images/generations": {
            "post": _post(
                "Draw images, as OpenAI's clients ask for them.", theirs | extensions, [], OPENAI, stream=True
            )
        },
        "/requests/{id}": {"delete": _cancel()},
        "/models": {"get": _get("What is served.", {"type": "object"})},
        "/health": {"get": _get("Whether the server lives.", {"type": "object"})},
        "/ready": {"get": _get("Whether it accepts requests; 503 where it does not.", {"type": "object"})},
        "/metrics": {
            "get": {"summary": "Figures for Prometheus.", "responses": {"200": {"description": "Text."}}}
        },
    }
    info = {"title": f"jaxldm: {offer.name}", "version": __version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths}


_SUBJECTS = {"prompt", "class_labels"}


def _content(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _errors(*codes: int) -> dict[str, Any]:
    return {str(code): {"description": ERRORS[code], "content": _content(ERROR)} for code in codes}


def _post(
    summary: str,
    fields: dict[str, Any],
    required: list[str],
    answer: dict[str, Any],
    stream: bool = False,
) -> dict[str, Any]:
    body: dict[str, Any] = {"type": "object", "properties": fields, "additionalProperties": False}
    if required:
        body["required"] = required
    content = _content(answer)
    if stream:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    responses = {"200": {"description": "The images.", "content": content}} | _errors(*ERRORS)
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": _content(body)},
        "responses": responses,
    }


def _get(summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": summary, "content": _content(schema)}}}


def _cancel() -> dict[str, Any]:
    found = {"200": {"description": "It ends before its next step.", "content": _content({"type": "object"})}}
    missing = {"404": {"description": "There is no such request.", "content": _content(ERROR)}}
    name = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    return {"summary": "Cancel a request.", "parameters": [name], "responses": found | missing}
