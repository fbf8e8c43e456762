"""Reflection in miniature: a picture drawn again with what was wrong with it, against best of N.

Question: a denoiser sees its own draft and a text such as "colour wrong: asked red, got blue". Does its next
          picture come out right more often than one drawn again from nothing?
Command:  python -m experiments.less_compute.reflection --run-dir runs/captioned-shapes
Needs:    a finished run of the recipe captioned-shapes, no accelerator. Minutes and what came out: README.md
          in this folder. A second call goes on where the first one stopped, within the training, too; --quick
          trains and draws little, to see that everything runs.

After Reflect-DiT (Li et al. 2025); what is smaller here is in `reflecting.py`. The feedback says nothing that
is not in caption and draft together: what it can change is what the network looks at. So there are rows with
the draft alone, with the feedback alone, and with the feedback on another picture. All rows have as many
evaluations for a picture, stop at the first picture in which all five attributes are right, and have the same
noise in the same round. What says so is the exact reader of `jaxldm.metrics.shapes`, which also measures.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.captioned_shapes.score import prompts_of
from experiments.figures import quick_options, save_figure
from experiments.less_compute import feedback, reflecting
from experiments.less_compute.reflecting import Seen
from experiments.results import Results, markdown, save_table
from experiments.trained import load_run, weights_hash
from jaxldm import data, host, models, training
from jaxldm import diffusion as D
from jaxldm.commands.terminal import run_script
from jaxldm.data import shapes
from jaxldm.errors import InvalidArgumentError
from jaxldm.metrics.shapes import read_shapes

SEED = 7  # of the pictures that are trained with; those of the run itself have another
SENTENCE_TOKENS = 12
ALL = len(shapes.KINDS)


@dataclasses.dataclass(frozen=True)
class Reflection:
    """Train a denoiser that sees a draft and feedback on it, draw in rounds, and compare with best of N."""

    run_dir: Path = Path("runs/captioned-shapes")
    """A finished run of the recipe captioned-shapes."""
    output_dir: Path = Path("runs/reflection")
    """Where training, rows, table and picture go."""
    num_updates: int = 2000
    """Of the training."""
    learning_rate: float = 1e-3
    """That of the run."""
    batch_size: int = 32
    """Examples of an update."""
    num_examples: int = 8192
    """Wrong drafts, each with a right picture; half are the run's own, where some of these are wrong."""
    num_drafts: int = 4096
    """Pictures that the run draws, of which those that are wrong are its own drafts."""
    steps: int = 10
    """Of DDIM, for each picture."""
    guidance_scale: float = 1.0
    """1 is the model as trained, which makes more mistakes."""
    rounds: int = 4
    """Pictures of a prompt at most: N of best of N."""
    per_pair: int = 10
    """Prompts of each of 24 seen and 12 held-out pairs of shape and colour."""
    seed: int = 0
    """Of training and of the noise."""
    quick: bool = False
    """Three updates, 36 prompts, two rounds of 2 steps: only to see that everything runs."""


SMALL = {"num_updates": 3, "num_examples": 64, "num_drafts": 32, "steps": 2, "rounds": 2, "per_pair": 1}


class Tools(NamedTuple):
    """The run, and what texts have become.

    Attributes:
        pipe: the run.
        network: (params, x, t, states) -> output.
        captions: text -> its number in the table.
        tables: states of the captions and of the sentences about findings.
        context: the module.
    """

    pipe: Any
    network: Callable[..., Any]
    captions: dict[str, int]
    tables: dict[str, Any]
    context: Any


def text_states(pipe: Any, texts: Sequence[str]) -> np.ndarray:
    """What the network takes of texts, [N, tokens, width]."""
    parts = [
        np.asarray(pipe.encode_prompts(list(texts[start : start + 256]))[0]["encoder_hidden_states"])
        for start in range(0, len(texts), 256)
    ]
    return np.concatenate(parts).astype(np.float32)


def load_tools(run_dir: Path) -> Tools:
    """The run with its tables: every caption in the usual words, and every finding."""
    pipe = load_run(run_dir, "captioned-shapes")
    if pipe.family.name != "StableDiffusion":
        raise InvalidArgumentError(f"--run-dir {run_dir} must be a run of the recipe captioned-shapes")
    network = models.network(pipe.denoiser.module)
    ranges = [range(len(words)) for words in shapes.KINDS.values()]
    every = np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, ALL).tolist()
    texts = ["", *(shapes.caption(row) for row in every)]
    short = pipe.replace(tokenizer=dataclasses.replace(pipe.tokenizer, max_length=SENTENCE_TOKENS))
    tables = {
        "captions": text_states(pipe, texts),
        "findings": text_states(short, feedback.sentences()),
    }
    return Tools(
        pipe,
        lambda params, x, t, states: network(params, x, t, {"encoder_hidden_states": states}),
        {text: number for number, text in enumerate(texts)},
        jax.tree.map(jnp.asarray, tables),
        reflecting.Context(outer=tables["captions"].shape[-1]),
    )


class Prompts(NamedTuple):
    """What is asked for: attributes, and the numbers of the captions."""

    asked: shapes.Attributes
    captions: np.ndarray

    def some(self, rows: np.ndarray) -> Prompts:
        """Those of some rows."""
        return Prompts(shapes.Attributes(*(values[rows] for values in self.asked)), self.captions[rows])


def prompts(tools: Tools, asked: shapes.Attributes) -> Prompts:
    """Prompts in the usual words for these attributes."""
    texts = [shapes.caption(row) for row in np.stack(asked, axis=1).tolist()]
    return Prompts(asked, np.array([tools.captions[text] for text in texts], np.int32))


def encoded(tools: Tools, images: np.ndarray) -> np.ndarray:
    """Latents of pictures in uint8."""
    vae = tools.pipe.autoencoder
    encode = jax.jit(lambda params, x: models.encode_latents(vae.module, params, x))
    parts, size = [], min(64, len(images))
    for start in range(0, len(images), size):
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        parts.append(np.asarray(encode(vae.params, data.from_uint8(images[rows])))[: len(images) - start])
    return np.concatenate(parts)


def read(tools: Tools, latents: np.ndarray, asked: shapes.Attributes) -> tuple[np.ndarray, np.ndarray]:
    """(right attributes, findings) of drawn pictures."""
    images = data.to_uint8(np.asarray(tools.pipe.decode(latents, batch_size=64)))
    found = read_shapes(images)
    return feedback.right_attributes(found, asked), feedback.findings_of(found, asked)


def sampler(options: Reflection, tools: Tools, params: Any) -> Callable[[Any, Seen], np.ndarray]:
    """(keys, what is seen) -> latents, in batches of one size.

    Args:
        options: steps, guidance and batches.
        tools: of the run.
        params: "network", and "context" for a denoiser that takes one.
    """
    prediction = tools.pipe.prediction
    grid = D.make_grid(prediction.path, options.steps)

    @jax.jit
    def draw(params, tables, keys, seen):
        def states(seen):
            if "context" not in params:
                return tables["captions"][seen.caption]
            return reflecting.conditions(tools.context, params["context"], tables, seen)

        network = functools.partial(tools.network, params["network"])
        null = states(reflecting.without_anything(seen))
        predict = D.classifier_free_guidance(network, states(seen), null, options.guidance_scale)
        x_T = D.initial_noise(keys, seen.draft.shape, grid)
        return D.sample(keys, D.denoiser(predict, prediction), D.solvers.ddim(), grid, x_T)

    def batched(keys, seen):
        number, size = len(seen.caption), 2 * options.batch_size
        parts = []
        for start in range(0, number, size):
            rows = np.minimum(np.arange(start, start + size), number - 1)
            some = Seen(*(np.asarray(part)[rows] for part in seen))
            parts.append(np.asarray(draw(params, tools.tables, keys[rows], some))[: number - start])
        return np.concatenate(parts)

    return batched


def first_look(tools: Tools, captions: np.ndarray) -> Seen:
    """Captions, and nothing of an earlier picture."""
    number, shape = len(captions), tools.pipe.latent_shape()
    never = np.zeros(number, bool)
    findings = np.full((number, feedback.MOST), feedback.NONE, np.int32)
    return Seen(captions, np.zeros((number, *shape), np.float32), findings, never, never)


def own_drafts(options: Reflection, tools: Tools) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(how many pictures of the run are wrong, these with what was asked for), of pairs seen in training."""
    wanted = prompts(tools, shapes.draw_attributes(SEED, np.arange(options.num_drafts)))
    draw = sampler(options, tools, {"network": tools.pipe.denoiser.params})
    keys = D.image_keys(jax.random.key(options.seed + 1), options.num_drafts)
    latents = draw(keys, first_look(tools, wanted.captions))
    score, findings = read(tools, latents, wanted.asked)
    wrong = np.flatnonzero(score < ALL)
    arrays = {"latents": latents[wrong], "findings": findings[wrong]}
    return {"drawn": len(score), "wrong": len(wrong)}, arrays | {
        "asked": np.stack(wanted.some(wrong).asked, axis=1)
    }


def examples(options: Reflection, tools: Tools, own: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns of what is trained on: wrong drafts, the run's own and made ones, each with a right picture."""
    random, total = np.random.default_rng(options.seed), options.num_examples
    repeated = total // 2 if len(own["asked"]) else 0
    made = total - repeated
    asked = shapes.draw_attributes(SEED, np.arange(options.num_drafts, options.num_drafts + made))
    wrong = feedback.made_wrong(random, asked)
    drafts = encoded(tools, shapes.render(SEED + 1, np.arange(made), wrong, _side(tools)))
    findings = feedback.findings_of(wrong, asked)
    if repeated:
        rows = np.resize(random.permutation(len(own["asked"])), repeated)
        drafts = np.concatenate([drafts, own["latents"][rows]])
        findings = np.concatenate([findings, own["findings"][rows]])
        asked = shapes.Attributes(*np.concatenate([np.stack(asked, axis=1), own["asked"][rows]]).T)
    pictures = shapes.render(SEED + 2, np.arange(total), asked, _side(tools))
    return {
        "caption": prompts(tools, asked).captions,
        "draft": drafts.astype(np.float32),
        "findings": findings,
        "target": encoded(tools, pictures),
    }


def _side(tools: Tools) -> int:
    return int(tools.pipe.default_size[0])


def trained(options: Reflection, tools: Tools, results: Results, common: dict[str, Any]) -> Any:
    """The parameters of the denoiser that sees drafts and feedback, trained as far as they are not."""
    figures, own = results.row("own drafts", common, lambda: own_drafts(options, tools))
    print(
        f"{figures['wrong']} of {figures['drawn']} pictures of the run are wrong: its own drafts", flush=True
    )
    columns, prediction = examples(options, tools, own), tools.pipe.prediction
    init_key, order_key, train_key = jax.random.split(jax.random.key(options.seed), 3)
    some = Seen(*(columns[name][:1] for name in ("caption", "draft", "findings")), *[np.ones(1, bool)] * 2)
    sentences = tools.tables["findings"][some.findings]
    new = jax.jit(tools.context.init)(init_key, some.draft, sentences, some.has_draft, some.has_feedback)
    params = {"network": tools.pipe.denoiser.params, "context": new["params"]}
    adam = training.optimizer(options.learning_rate, min(100, options.num_updates), options.num_updates)
    loss = reflecting.make_loss(tools.network, tools.context, prediction)
    state = training.fit(
        training.create_train_state(train_key, params, adam, frozen=tools.tables),
        training.make_train_step(loss, adam, ema_decay=0.995),
        data.Batches(columns, options.batch_size, order_key),
        training.Plan(options.num_updates, save_every=max(1, options.num_updates // 8), save_frozen=False),
        options.output_dir / "training",
        resume=True,
        mesh=training.make_mesh(1),
        name="reflection",
    )
    return jax.tree.map(np.asarray, state.ema_params)


class Way(NamedTuple):
    """A row: what is seen of the best picture so far when a prompt is drawn again.

    Attributes:
        tuned: whether the trained denoiser draws, or that of the run.
        draft, feedback: whether the draft and the feedback are seen.
        others: whether the feedback is that on another picture.
        caption: whether the caption is seen as well; the first picture is always drawn from it.
    """

    tuned: bool
    draft: bool = False
    feedback: bool = False
    others: bool = False
    caption: bool = True


WAYS = {
    "best of N, the run": Way(False),
    "best of N, trained on": Way(True),
    "reflection: draft and feedback": Way(True, draft=True, feedback=True),
    "the feedback alone": Way(True, feedback=True),
    "the draft alone": Way(True, draft=True),
    "draft, and feedback on another": Way(True, draft=True, feedback=True, others=True),
    "draft and feedback, no caption": Way(True, draft=True, feedback=True, caption=False),
    "feedback on another, no caption": Way(True, draft=True, feedback=True, others=True, caption=False),
}


def measured(
    options: Reflection, tools: Tools, draw: Callable[[Any, Seen], np.ndarray], way: Way
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(figures of seen and held-out pairs, scores of every round)."""
    figures: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for kind, pairs in (("seen", shapes.SEEN), ("held out", sorted(shapes.HELD_OUT))):
        wanted = prompts(tools, prompts_of(pairs, options.per_pair)[0])
        keys = D.image_keys(jax.random.key(options.seed + len(pairs)), len(wanted.captions))

        def again(number, rows, drafts, findings, wanted=wanted, keys=keys):
            seen = first_look(tools, wanted.captions[rows])
            if drafts is not None:
                shown = np.roll(findings, 1, axis=0) if way.others else findings
                flags = (np.full(len(rows), flag) for flag in (way.draft, way.feedback))
                caption = seen.caption if way.caption else np.zeros_like(seen.caption)
                seen = Seen(caption, drafts, shown, *flags)
            noise = jax.vmap(jax.random.fold_in, (0, None))(keys[rows], number)
            return draw(noise, seen)

        judge = lambda latents, rows, wanted=wanted: read(tools, latents, wanted.some(rows).asked)  # noqa: E731
        found = reflecting.reflect(again, judge, len(wanted.captions), options.rounds, ALL)
        figures |= {f"{kind}, {name}": value for name, value in figures_of(options, found).items()}
        arrays |= {f"{kind}, scores": found.scores, f"{kind}, drawn": found.drawn}
    return figures, arrays


def figures_of(options: Reflection, found: reflecting.Rounds) -> dict[str, Any]:
    """Shares of right pictures after each round, evaluations until then, and what drawing again repaired.

    Guidance asks the network twice a step.
    """
    cost = options.steps * (1 if options.guidance_scale == 1 else 2)
    again = found.drawn[1:] >= 0
    repaired = (found.drawn[1:] == ALL) & again
    drawn = np.cumsum((found.drawn >= 0).mean(axis=1))
    return {
        "right": (found.scores == ALL).mean(axis=1).tolist(),
        "evaluations": (cost * drawn).tolist(),
        "repaired": float(repaired.sum() / max(1, again.sum())),
        "again": int(again.sum()),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A row for each way and kind of pair."""
    number = len(next(iter(rows.values()))["seen, right"])
    head = ["way", "pairs", *(f"right after {n + 1}" for n in range(number)), "evaluations a prompt"]
    body = []
    for name, figures in rows.items():
        for kind in ("seen", "held out"):
            shares = [f"{share:.1%}" for share in figures[f"{kind}, right"]]
            cells = [f"{figures[f'{kind}, evaluations'][-1]:.1f}", f"{figures[f'{kind}, repaired']:.1%}"]
            body.append([name, kind, *shares, *cells, str(figures[f"{kind}, again"])])
    return markdown([*head, "right when drawn again", "of"], body)


def plot(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Right pictures against evaluations of a prompt, a line for each way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("seen", "held out"), strict=True):
        for name, figures in rows.items():
            shares = [100 * share for share in figures[f"{kind}, right"]]
            axes.plot(figures[f"{kind}, evaluations"], shares, "o-", markersize=4, linewidth=1, label=name)
        axes.set(title=f"pairs {kind}", xlabel="evaluations a prompt", ylabel="all five attributes right, %")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(path, figure)


def main(options: Reflection) -> None:
    """Trains, draws in rounds, and writes the table and the picture."""
    host.prepare()
    options = quick_options(options, **SMALL)
    tools, results = load_tools(options.run_dir), Results(options.output_dir)
    common = {"run": weights_hash(options.run_dir)}
    common |= {name: getattr(options, name) for name in ("steps", "guidance_scale", "num_drafts", "seed")}
    params = trained(options, tools, results, common)
    names = ("num_updates", "learning_rate", "batch_size", "num_examples", "rounds", "per_pair")
    settings = common | {name: getattr(options, name) for name in names}
    draws = {
        False: sampler(options, tools, {"network": tools.pipe.denoiser.params}),
        True: sampler(options, tools, params),
    }
    rows = {}
    for name, way in WAYS.items():
        make = functools.partial(measured, options, tools, draws[way.tuned], way)
        rows[name], _ = results.row(name, settings, make)
        shares = ", ".join(f"{rows[name][f'{kind}, right'][-1]:.1%}" for kind in ("seen", "held out"))
        print(f"{name}: {shares} right after {options.rounds} rounds", flush=True)
    title = f"Reflection in miniature: DDIM in {options.steps} steps, w = {options.guidance_scale:g}"
    save_table(options.output_dir / "reflection.md", title, table(rows))
    plot(options.output_dir / "reflection.png", rows)
    print(f"Look at {options.output_dir}/reflection.png.")


if __name__ == "__main__":
    run_script(main, Reflection)
