"""Reflection in miniature: what the feedback says, what the network sees of it, and what the rounds keep."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.less_compute import feedback, reflecting, reflection
from jaxldm import diffusion as D
from jaxldm import training
from jaxldm.data import shapes
from jaxldm.errors import CheckpointError
from jaxldm.metrics.shapes import UNCLEAR, read_shapes


def attributes(*rows):
    return shapes.Attributes(*np.array(rows, np.int32).T)


def test_feedback_names_what_was_asked_and_what_was_seen():
    asked = attributes((3, 0, 1, 0, 0), (5, 2, 0, 4, 1), (3, 1, 0, 2, 1))
    seen = attributes((3, 2, 0, 0, 0), (5, 2, 0, 4, 1), (UNCLEAR, UNCLEAR, UNCLEAR, UNCLEAR, 0))
    numbers, texts = feedback.findings_of(seen, asked), feedback.sentences()
    assert [[texts[n] for n in row if n != feedback.NONE] for row in numbers] == [
        ["colour wrong: asked red, got blue", "size wrong: asked large, got small"],
        [],
        [
            "shape unclear: asked star",
            "colour unclear: asked green",
            "background wrong: asked light, got dark",
        ],
    ]
    assert feedback.right_attributes(seen, asked).tolist() == [3, 5, 0]
    assert texts[feedback.NONE] == "" and len(set(texts)) == len(texts)


def test_made_wrong_pictures_are_read_as_wrong_in_one_or_two_attributes():
    asked = shapes.draw_attributes(3, np.arange(200))
    wrong = feedback.made_wrong(np.random.default_rng(0), asked)
    read = read_shapes(shapes.render(4, np.arange(200), wrong, 32))
    right = feedback.right_attributes(read, asked)
    assert set(right.tolist()) == {3, 4} and 0.3 < np.mean(right == 3) < 0.7
    told = (feedback.findings_of(read, asked) != feedback.NONE).sum(axis=1)
    np.testing.assert_array_equal(told, 5 - right)
    for before, after in zip(asked, wrong, strict=True):
        assert 0.1 < np.mean(before != after) < 0.5  # every attribute has its turn


@pytest.fixture(scope="module")
def tokens():
    """(the context's module, its parameters, tables, what is seen of two examples)."""
    random = np.random.default_rng(0)
    tables = {"captions": random.normal(size=(4, 3, 8)), "findings": random.normal(size=(5, 2, 8))}
    tables = {name: jnp.asarray(table, jnp.float32) for name, table in tables.items()}
    module, always = reflecting.Context(outer=8, width=8, depth=1), jnp.ones(2, bool)
    draft = jnp.asarray(random.normal(size=(2, 4, 4, 2)), jnp.float32)
    findings = jnp.array([[1, 2, 0], [3, 0, 0]])
    seen = reflecting.Seen(jnp.array([1, 2]), draft, findings, always, always)
    params = jax.jit(module.init)(jax.random.key(0), draft, tables["findings"][findings], always, always)[
        "params"
    ]
    return module, params, tables, seen


def test_the_network_sees_caption_draft_and_feedback_or_only_what_is_there(tokens):
    module, params, tables, seen = tokens
    states = lambda seen: np.asarray(reflecting.conditions(module, params, tables, seen))  # noqa: E731
    whole, never = states(seen), jnp.zeros(2, bool)
    assert whole.shape == (2, 3 + 4 + 3 * 2, 8)
    np.testing.assert_array_equal(whole[:, :3], tables["captions"][seen.caption])
    for part, flag in (("draft", "has_draft"), ("findings", "has_feedback")):
        other = seen._replace(**{part: jnp.roll(getattr(seen, part), 1, axis=0)})
        assert np.abs(states(other) - whole)[:, 3:].max() > 1e-3
        absent = {flag: never}
        np.testing.assert_array_equal(states(other._replace(**absent)), states(seen._replace(**absent)))
    nothing = states(reflecting.without_anything(seen))
    np.testing.assert_array_equal(nothing[0], nothing[1])


def test_the_loss_trains_network_and_context(tokens):
    module, params, tables, seen = tokens

    def network(params, x, t, states):
        return x * params["scale"] + (states.mean(axis=1) @ params["mix"])[:, None, None]

    both = {"network": {"scale": jnp.ones(()), "mix": jnp.ones((8, 2))}, "context": params}
    batch = {"caption": seen.caption, "draft": seen.draft, "findings": seen.findings, "target": seen.draft}
    loss = reflecting.make_loss(network, module, D.v(D.VP.named("cosine")))
    adam = training.optimizer(1e-2, total_steps=10)
    state = training.create_train_state(jax.random.key(1), both, adam, frozen=tables)
    after, metrics = jax.jit(training.make_train_step(loss, adam, ema_decay=0.9))(state, batch)
    assert np.isfinite(metrics["loss"])
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, after.params)
    assert changed["network"]["mix"] and changed["context"]["out"]["kernel"]


def test_rounds_draw_again_what_is_wrong_and_keep_the_best():
    """Each picture is a number, which is its score; 5 is enough."""
    numbers = np.array([[5, 1, 3, 2], [9, 4, 2, 2], [9, 0, 3, 5]], np.float32)
    calls = []

    def draw(number, rows, drafts, findings):
        calls.append((rows.tolist(), None if drafts is None else [drafts.tolist(), findings.tolist()]))
        return numbers[number][rows]

    judge = lambda latents, rows: (latents.astype(np.int32), 10 * latents.astype(np.int32))  # noqa: E731
    found = reflecting.reflect(draw, judge, 4, 3, 5)
    assert calls == [
        ([0, 1, 2, 3], None),
        ([1, 2, 3], [[1, 3, 2], [10, 30, 20]]),
        ([1, 2, 3], [[4, 3, 2], [40, 30, 20]]),
    ]
    assert found.best.tolist() == [5, 4, 3, 5]
    assert found.scores.tolist() == [[5, 1, 3, 2], [5, 4, 3, 2], [5, 4, 3, 5]]
    assert found.drawn.tolist() == [[5, 1, 3, 2], [-1, 4, 2, 2], [-1, 0, 3, 5]]
    options = types.SimpleNamespace(steps=10, guidance_scale=3.0)
    figures = reflection.figures_of(options, found)
    assert figures["right"] == [0.25, 0.25, 0.5] and figures["evaluations"] == [20, 35, 50]
    assert figures["repaired"] == pytest.approx(1 / 6) and figures["again"] == 6


def test_tables_and_plot_have_a_row_for_each_way(tmp_path):
    figures = {"right": [0.5, 0.75], "evaluations": [10.0, 15.0], "repaired": 0.5, "again": 4}
    both = {f"{kind}, {name}": value for kind in ("seen", "held out") for name, value in figures.items()}
    rows = dict.fromkeys(reflection.WAYS, both)
    lines = reflection.table(rows).splitlines()
    assert len(lines) == 2 + 2 * len(rows) and "| 50.0% | 75.0% | 15.0 | 50.0% | 4 |" in lines[2]
    reflection.plot(tmp_path / "it.png", rows)
    assert (tmp_path / "it.png").stat().st_size > 1000


def test_without_a_run_it_says_how_to_make_one(tmp_path):
    with pytest.raises(CheckpointError, match="jaxldm train captioned-shapes"):
        reflection.main(reflection.Reflection(run_dir=tmp_path / "absent", output_dir=tmp_path))


@dataclasses.dataclass(frozen=True)
class Words:
    max_length: int


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Stands in for the run: its pictures are the latents themselves, its texts their letters."""

    tokenizer: Words = Words(20)
    family = types.SimpleNamespace(name="StableDiffusion")
    denoiser = types.SimpleNamespace(module=None, params={"mix": np.ones((8, 3), np.float32)})
    autoencoder = types.SimpleNamespace(module=None, params={})
    prediction = D.v(D.VP.named("cosine"))
    default_size = (32, 32)

    def replace(self, **parts):
        return dataclasses.replace(self, **parts)

    def latent_shape(self):
        return (4, 4, 3)

    def encode_prompts(self, texts):
        letters = [
            np.resize(np.frombuffer(f"{text}.".encode(), np.uint8), (self.tokenizer.max_length, 8))
            for text in texts
        ]
        return {"encoder_hidden_states": np.stack(letters) / 100}, {}

    def decode(self, latents, batch_size):
        return np.clip(latents.repeat(8, 1).repeat(8, 2), -1, 1)


def test_the_script_trains_draws_and_goes_on_where_it_stopped(tmp_path, monkeypatch):

    def network(params, x, t, condition):
        return x + (condition["encoder_hidden_states"].mean(axis=1) @ params["mix"])[:, None, None]

    parts = {
        "network": lambda module: network,
        "encode_latents": lambda module, params, images: images[:, ::8, ::8],
    }
    small = functools.partial(reflecting.Context, width=8, depth=1)
    monkeypatch.setattr(reflecting, "Context", small)
    monkeypatch.setattr(reflection, "models", types.SimpleNamespace(**parts))
    monkeypatch.setattr(reflection, "load_run", lambda run_dir, recipe: Drawn())
    ways = {name: reflection.WAYS[name] for name in ("best of N, the run", "draft, and feedback on another")}
    monkeypatch.setattr(reflection, "WAYS", ways)
    options = reflection.Reflection(run_dir=tmp_path / "run", output_dir=tmp_path / "out", quick=True)
    reflection.main(options)
    folder = tmp_path / "out" / "quick"
    text = (folder / "reflection.md").read_text()
    assert text.count("| seen |") == text.count("| held out |") == len(ways)
    assert (folder / "training" / "checkpoints").is_dir() and (folder / "reflection.png").exists()
    # All rows are kept, and the training is at its end.
    monkeypatch.setattr(reflection, "measured", lambda *_: pytest.fail("drawn twice"))
    reflection.main(options)
    assert (folder / "reflection.md").read_text() == text
