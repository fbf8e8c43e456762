"""Bodies of requests: what is allowed, and that everything else is refused in words."""

import base64
import dataclasses
import io
import json
import re

import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxldm import pipelines
from jaxldm.pipelines.families.stable_diffusion import STABLE_DIFFUSION
from jaxldm.serving import pictures
from jaxldm.serving.hints import param_in
from jaxldm.serving.requests import (
    BadRequest,
    Generation,
    call_of,
    offer_of,
    read_generation,
    read_json,
    read_openai,
)


@pytest.fixture(scope="module")
def classes():
    return offer_of(tiny_models.latent_pipeline(), "digits", ("ddim", "heun"), max_steps=20)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    parts = tiny_models.text_parts(tmp_path_factory.mktemp("tokenizer") / "tokenizer")
    return offer_of(pipelines.Pipeline(STABLE_DIFFUSION, parts), "cats", (), ((16, 16), (16, 32), (32, 16)))


def refused(offer, body):
    with pytest.raises(BadRequest) as caught:
        read_generation(offer, body)
    error = caught.value.body()["error"]
    assert "\n" not in error["message"] and len(error["message"]) < 400
    return error


BAD = {
    "prompt": ({"class_labels": 1, "prompt": "a"}, "there is no field 'prompt'"),
    "class_labels": ({}, r'{"class_labels": \[3, 7\]}'),
    "class_labels of no class": ({"class_labels": [0, 3]}, "from 0 to 2, got 3"),
    "class_labels true": ({"class_labels": True}, "from 0 to 2, got True"),
    "class_labels many": ({"class_labels": [1] * 11}, "must be 1 to 10 labels, got 11"),
    "num_images": ({"class_labels": 0, "num_images": 11}, "from 1 to 10, got 11"),
    "num_images half": ({"class_labels": 0, "num_images": 1.5}, "got 1.5"),
    "num_inference_steps": ({"class_labels": 0, "num_inference_steps": 21}, "from 1 to 20, got 21"),
    "guidance_scale": ({"class_labels": 0, "guidance_scale": -1}, "got -1"),
    "guidance_scale large": (
        {"class_labels": 0, "guidance_scale": 1e300},
        "must be a number in",
    ),
    "negative_labels": ({"class_labels": 0, "negative_labels": 1, "guidance_scale": 1}, "has no effect"),
    "seed": ({"class_labels": 0, "seed": 2**32}, "seed must be"),
    "solver": ({"class_labels": 0, "solver": "unipc"}, "choose one of ddim, heun"),
    "height": ({"class_labels": 0, "height": 512, "width": 8}, "height must be 8, got 512 \\(sizes are"),
    "height alone": ({"class_labels": 0, "height": 8}, "give height and width, or neither"),
    "format": ({"class_labels": 0, "format": "gif"}, "choose one of png, jpeg, webp"),
    "stream": ({"class_labels": 0, "stream": "yes"}, "stream must be true or false"),
    "previews": ({"class_labels": 0, "previews": 2}, '"stream": true'),
    "timeout": ({"class_labels": 0, "timeout": 0}, "timeout must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_said_with_the_field(classes, case):
    body, message = BAD[case]
    error = refused(classes, body)
    assert error["param"] == case.split()[0] and error["type"] == "invalid_request_error"
    assert re.search(message, error["message"]), error["message"]


def test_what_is_allowed_comes_with_the_refusal(classes):
    assert refused(classes, {"class_labels": 0, "solver": "x"})["allowed"] == ["ddim", "heun"]
    allowed = refused(classes, {"class_labels": 0, "num_images": 0})["allowed"]
    assert allowed == {"type": "integer", "minimum": 1, "maximum": 10}
    assert "class_labels" in refused(classes, {"labels": 1})["allowed"]


NO_FIELD = {
    "prompt": ("classes", "this model draws classes; send class_labels"),
    "class_labels": ("texts", "this model draws what a text says; send prompt"),
    "class_label": ("classes", "did you mean 'class_labels'?"),
    "steps": ("texts", "did you mean 'num_inference_steps'?"),
}


@pytest.mark.parametrize("name", NO_FIELD)
def test_what_is_meant_by_a_field_that_does_not_exist_is_said(name, request):
    offer, hint = NO_FIELD[name]
    error = refused(request.getfixturevalue(offer), {name: 1})
    assert error["param"] == name and f"there is no field '{name}': " in error["message"]
    assert hint in error["message"]


def test_a_server_of_one_solver_says_so(classes):
    own = dataclasses.replace(classes, solvers=())
    message = refused(own, {"class_labels": 1, "solver": "ddim"})["message"]
    assert "with the model's own solver; leave it out" in message and "--solvers" in message


def test_the_nearest_size_is_named(texts):
    error = refused(texts, {"prompt": "a", "height": 32, "width": 32})
    assert "the nearest is 16x32" in error["message"] or "the nearest is 32x16" in error["message"]
    assert error["allowed"] == [[16, 16], [16, 32], [32, 16]]
    assert refused(texts, {"class_labels": 1, "prompt": "a"})["param"] == "class_labels"
    assert refused(texts, {"prompt": "a" * 10_001})["param"] == "prompt"
    assert refused(texts, {})["param"] == "prompt"


def in_base64(size, kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", size).save(stream, kind)
    return base64.b64encode(stream.getvalue()).decode()


def test_pictures_to_start_from_are_bounded(classes, texts, monkeypatch):
    image = in_base64((40, 20))
    body = {"prompt": "a", "image": image, "strength": 0.5}
    options = call_of(texts, read_generation(texts, body))[1]
    assert options["image"] == base64.b64decode(image) and options["strength"] == 0.5
    assert (options["height"], options["width"], options["resize"]) == (16, 16, "crop")
    as_url = body | {"image": f"data:image/png;base64,{image}"}
    assert call_of(texts, read_generation(texts, as_url))[1]["image"] == options["image"]
    for wrong in (3, "a/b", "/etc/passwd", "https://a.b/c.png", image[:40], in_base64((8, 8), "GIF")):
        error = refused(texts, {"prompt": "a", "image": wrong})
        assert (
            error["param"] == "image" and "must be a picture (PNG, JPEG, WEBP) in base64" in error["message"]
        )
    monkeypatch.setattr(pictures, "MAX_PIXELS", 799)
    assert "at most 799 may be sent" in refused(texts, body)["message"]
    assert "send image, too" in refused(texts, {"prompt": "a", "strength": 0.5})["message"]
    assert refused(texts, {"prompt": "a", "strength": 0})["param"] == "strength"
    assert "starts from noise alone" in refused(classes, {"class_labels": 1, "image": image})["message"]


def test_a_request_becomes_the_pipeline_s_call(classes, texts):
    request = read_generation(classes, {"class_labels": [2, 0], "seed": 5, "guidance_scale": 2})
    assert request == Generation(5, class_labels=(2, 0), num_images=2, guidance_scale=2.0)
    assert call_of(classes, request) == (
        ([2, 0],),
        {"guidance_scale": 2.0, "solver": "ddim", "num_images": 2},
    )
    request = read_generation(texts, {"prompt": "a", "num_images": 3, "height": 16, "width": 32})
    options = {"height": 16, "width": 32, "num_images_per_prompt": 3}
    assert call_of(texts, request) == (("a", None), options)
    assert call_of(texts, read_generation(texts, {"prompt": "a"}))[1]["height"] == 16


def test_of_an_image_to_start_from_the_steps_that_its_strength_leaves_are_waited_for(texts):
    image = {"image": b""}
    asked = texts.steps(50, None)
    assert texts.steps_left(asked, {}) == 50 and texts.steps_left(asked, image | {"strength": 0.58}) == 29
    assert texts.steps_left(asked, image) == 40 and texts.steps_left(3, image | {"strength": 0.01}) == 1


def test_a_seed_is_drawn_where_none_is_given(classes):
    seeds = {read_generation(classes, {"class_labels": 0, "seed": None}).seed for _ in range(5)}
    assert len(seeds) == 5


def test_openai_s_names_are_understood(classes, texts):
    body = {"model": "cats", "prompt": "a", "n": 2, "size": "32x16", "user": "u", "quality": "hd", "seed": 3}
    expected = {"prompt": "a", "num_images": 2, "height": 16, "width": 32, "seed": 3}
    assert read_openai(texts, body) == expected
    assert read_openai(classes, {"prompt": "2, 1"})["class_labels"] == [2, 1]
    assert read_openai(texts, {"stream": True, "partial_images": 2}) == {"stream": True, "previews": 2}
    for wrong, param in (
        ({"model": "dall-e-3"}, "model"),
        ({"response_format": "url"}, "response_format"),
        ({"size": "1024x1024"}, "size"),
        ({"size": 5}, "size"),
        ({"response_format": "png"}, "response_format"),
    ):
        with pytest.raises(BadRequest) as caught:
            read_openai(texts, {"prompt": "a", **wrong})
        assert caught.value.param == param


def test_what_openai_s_names_and_ours_both_say_is_refused(classes, texts):
    for offer, body, param in (
        (texts, {"n": 1, "num_images": 2}, "num_images"),
        (texts, {"size": "16x16", "height": 16}, "height"),
        (classes, {"class_labels": [1]}, "class_labels"),
    ):
        with pytest.raises(BadRequest, match="say the same: leave one of them out") as caught:
            read_openai(offer, {"prompt": "1", **body})
        assert caught.value.param == param
    with pytest.raises(BadRequest, match=r'separated by commas, as "3, 7", got \[3\]'):
        read_openai(classes, {"prompt": [3]})


NO_OBJECTS = (b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b'{"seed": NaN}', b'{"seed": -Infinity}')
NO_TEXTS = (b'{"\\ud800": 1}', b'{"prompt": "\\udfff"}')
TOO_MUCH = (b"[" * 100_000, b'{"seed": ' + b"9" * 10_000 + b"}")


@pytest.mark.parametrize("body", [*NO_OBJECTS, *NO_TEXTS, *TOO_MUCH], ids=lambda body: body[:20])
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(BadRequest) as caught:
        read_json(body)
    assert caught.value.status == 400


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
def test_any_json_is_read_or_refused(classes, texts, data):
    for offer in (classes, texts):
        names = st.sampled_from([*offer.fields, "n", "size", "model", "x"])
        body = data.draw(st.dictionaries(names, JSON, max_size=5))
        body = json.loads(
            json.dumps(body | {"prompt": "a"} if offer is texts else body | {"class_labels": 1})
        )
        for read in (lambda body: body, lambda body, offer=offer: read_openai(offer, body)):
            try:
                request = read_generation(offer, read(body))
            except BadRequest as error:
                assert 400 <= error.status < 500 and len(error.message) < 400
            else:
                prompts, options = call_of(offer, request)
                assert prompts and 1 <= request.num_images <= 10 and options


def test_the_field_of_a_message_is_found():
    names = ["guidance_scale", "class_labels"]
    assert param_in("unknown class 'x': choose one of class labels", names) == "class_labels"
    assert param_in("guidance_scale must be finite", names) == "guidance_scale"
    assert param_in("something else", names) is None
