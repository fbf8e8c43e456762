"""`jaxldm info`: descriptions of folders, presets and recipes, and lists of all names."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from jaxldm.commands import hints
from jaxldm.commands.class_names import describe_classes, with_class_names
from jaxldm.commands.finetunings import finetune_rows
from jaxldm.commands.options import mesh_sizes, shown
from jaxldm.commands.recipe_file import is_recipe_file, read_recipe_file
from jaxldm.commands.terminal import table
from jaxldm.entries import read_value
from jaxldm.errors import CheckpointError, InvalidArgumentError, UnknownNameError


@dataclass(frozen=True)
class Info:
    """Describe the folder of a model, a preset or a recipe; without argument, list all names.

    For example:
      jaxldm info
      jaxldm info runs/mini-ldm
      jaxldm info exported/mini-ldm --compare runs/mini-ldm
      jaxldm info flux-dev --mesh tensor=8
    """

    target: Annotated[Positional[str | None], shown("FOLDER|PRESET", "lists everything")] = None
    """A run folder, an exported or a text-to-image folder, the name of a preset or a recipe, or a recipe's
    file.
    """

    family: Annotated[str | None, shown("MODULE:FAMILY", "the one that the folder names")] = None
    """A family of models of your own: package.module:FAMILY."""

    mesh: Annotated[str | None, shown("AXIS=INT,...", "none")] = None
    """How the weights would be split over such a mesh of devices, as in data=2,fsdp=2,tensor=2."""

    compare: Annotated[str | None, shown("FOLDER", "no comparison")] = None
    """Another run or exported folder: compare all tensors bit by bit."""

    def run(self) -> None:
        """Prints the description or the comparison."""
        self._check_family()
        if self.mesh is not None:
            if self.target is None or self.compare is not None:
                raise InvalidArgumentError(
                    "--mesh needs one folder, preset or recipe: jaxldm info flux-dev --mesh tensor=8"
                )
            print(describe_mesh(self.target, self.mesh, self.family))
        elif self.target is None:
            if self.compare is not None:
                raise InvalidArgumentError("--compare needs two folders: jaxldm info EXPORTED --compare RUN")
            print(describe_everything())
        elif self.compare is not None:
            compare(self.target, self.compare)
        else:
            print(describe(self.target, self.family))

    def _check_family(self) -> None:
        """Refuse a family that does not exist, whether or not the folder needs one, or without a folder."""
        if self.family is None:
            return
        if self.target is None or self.compare is not None or not Path(self.target).exists():
            raise InvalidArgumentError(
                "--family needs one folder: jaxldm info FOLDER --family package.module:FAMILY"
            )
        from jaxldm.pipelines import families

        families.find(self.family)


def describe_everything() -> str:
    """All names that the commands take, and the devices."""
    import jax

    from jaxldm import data, host, models, training
    from jaxldm import diffusion as D
    from jaxldm.data.load import WELL_KNOWN

    recipes = [(name, describe_recipe(recipe)) for name, recipe in training.RECIPES.items()]
    presets = [(name, models.class_name(config)) for name, config in models.PRESETS.items()]
    solvers = with_installed(D.solvers.SOLVERS, D.solvers.names())
    spacings = with_installed(D.SPACINGS, D.spacing_names())
    devices = [(device.id, device.platform, device.device_kind) for device in jax.devices()]
    sections = {
        "recipes (jaxldm train RECIPE)": table(recipes),
        "presets (jaxldm info PRESET)": table(presets),
        "solvers (jaxldm sample RUN --solver NAME)": table(solvers),
        "spacings (jaxldm sample RUN --spacing NAME)": table(spacings),
        f"datasets, in {data.data_folder()}": f"  {', '.join(WELL_KNOWN)}, and any other TFDS name",
        "devices": table(devices),
        "compiled functions": f"  {host.compilation_cache_folder() or 'not kept'}",
    }
    return "\n\n".join(f"{title}\n{text}" for title, text in sections.items())


def with_installed(table: Mapping[str, Any], names: Sequence[str]) -> list[tuple[str, str]]:
    """(name, description) of each name; those that another package adds are not imported for it."""
    return [(name, first_line(table[name]) if name in table else "of an installed package") for name in names]


def first_line(function: Any) -> str:
    """The first sentence of a docstring, with the options of a `functools.partial`."""
    if isinstance(function, functools.partial):
        options = ", ".join(f"{name}={value!r}" for name, value in function.keywords.items())
        return f"{first_line(function.func)}; {options}"
    return (function.__doc__ or "").strip().split("\n")[0].split(": ")[0].rstrip(".")


def describe_recipe(recipe: Any) -> str:
    """One line: the stages of a recipe and its data."""
    from jaxldm import training

    stages = [
        f"{stage} {network_of(part)} ({part.epochs} epochs)"
        for stage in training.STAGES
        if (part := getattr(recipe, stage)) is not None
    ]
    text = "" if recipe.text is None else f" with captions, by {recipe.text.encoder}"
    return f"{', '.join(stages)}; data {recipe.data}{text}"


def describe(target: str, family: str | None = None) -> str:
    """The description of a folder, if it exists, or of a preset or a recipe of that name.

    Args:
        family: of the model in the folder, as in `pipelines.load`.
    """
    from jaxldm import models, training

    if is_recipe_file(target):
        return describe_recipe_file(target)
    if Path(target).exists():
        from jaxldm import pipelines

        kind = pipelines.kind_of(target, family)
        of_texts = kind == "text-to-image" and training.RunFolder(Path(target)).config.exists()
        if kind == "run" or of_texts:
            return describe_run(Path(target))
        describers = {"export": describe_export, "text-to-image": describe_text_to_image}
        return describers[kind](Path(target), family)
    known = [describe_preset(target)] if target in models.PRESETS else []
    known += [describe_named_recipe(target)] if target in training.RECIPES else []
    if known:  # some recipes have the name of their network
        return "\n\n".join(known)
    if "/" in target:
        raise CheckpointError(f"there is no folder {target}")
    raise UnknownNameError("folder, preset or recipe", target, [*training.RECIPES, *models.PRESETS])


def describe_named_recipe(name: str) -> str:
    """The stages of a recipe, what it asks, how long it takes and what to expect, and the command."""
    from jaxldm import training
    from jaxldm.training.recipe_heads import HEADS

    lines = [f"{name} is a recipe: {describe_recipe(training.RECIPES[name])}"]
    if name in HEADS:  # a package may add recipes of its own
        question, minutes, figures = HEADS[name]
        lines.append(table([("question", question), ("minutes", minutes), ("figures", figures)]))
    return "\n".join([*lines, f"train it:  {hints.command('train', name)}"])


def describe_recipe_file(name: str) -> str:
    """The stages of a recipe in a file, the file's docstring, and the command, or why `train` refuses it."""
    from jaxldm.training.comes_back import check_comes_back

    recipe, about = read_recipe_file(name)
    lines = [f"{name} is the recipe {recipe.name}: {describe_recipe(recipe)}", *([about] if about else [])]
    try:
        check_comes_back(recipe)
    except InvalidArgumentError as error:
        end = f"train refuses it:  {' '.join(str(error).split())}"
    else:
        end = f"train it:  {hints.command('train', name)}"
    # Texts of a file may have halves of surrogate pairs, which cannot be printed
    return "\n".join([*lines, end]).encode(errors="backslashreplace").decode()


def describe_preset(name: str) -> str:
    """Parameters, multiply-accumulates, memory and config of a preset, without memory for its weights."""
    from jaxldm import models

    config, count = models.PRESETS[name], models.count_params(name)
    head = f"{name} is a preset of {models.class_name(config)} with {count:,} parameters"
    memory = f"{4 * count / 1e6:,.1f} MB in float32, {2 * count / 1e6:,.1f} MB in bfloat16 or float16"
    return f"{head}: {memory}\n{describe_cost(name)}\n" + table(sorted(config.to_dict().items()))


def describe_cost(name: str) -> str:
    """The cost of a forward pass; its memory only for models that compile within seconds (scans)."""
    from jaxldm import models

    module = models.build(name)
    x = "x".join(str(side) for side in module.example_inputs()[0].shape)
    line = f"a forward pass ({x}) is {models.count_macs(module) / 1e9:,.3f} G multiply-accumulates"
    if not getattr(module.config, "scan", False):
        return line
    temporary = models.forward_memory(module).temporary
    memory = f"XLA plans {temporary / 1e6:,.1f} MB for it in addition to the weights"
    return f"{line}; {memory} (in {module.config.dtype})"


def describe_export(folder: Path, family: str | None = None) -> str:
    """The networks of an exported folder, and the command to sample from it."""
    from jaxldm import pipelines

    pipe = pipelines.load(folder, family=family)
    hint = hints.sample(folder, pipe, family)
    return f"{folder} is an exported model\n{describe_pipeline(pipe)}\nsample:  {hint}"


def describe_text_to_image(folder: Path, family: str | None = None, teacher: str | None = None) -> str:
    """The networks of a text-to-image folder, their size, and the command to sample; reads no weights."""
    from jaxldm import checkpoints, models, pipelines
    from jaxldm.checkpoints.pipeline_folder import INDEX_FILE
    from jaxldm.pipelines import families
    from jaxldm.pipelines.few_steps import ENTRY
    from jaxldm.pipelines.folders import family_of, outline
    from jaxldm.pipelines.scheduler_files import check_schedulers
    from jaxldm.reading import read_json

    index, rows, total = checkpoints.read_model_index(folder), [], 0
    found = family_of(folder, family)
    refused = check_schedulers(folder, found, index) if found in families.FAMILIES else {}
    for name, module in pipelines.modules_in(folder, family).items():
        count = models.count_params(module)
        rows.append((name, type(module).__name__, f"{count:,} parameters"))
        total += count
    memory = f"{4 * total / 1e6:,.1f} MB in float32, {2 * total / 1e6:,.1f} MB in bfloat16 or float16"
    is_student = ENTRY in read_json(folder / INDEX_FILE)
    student = student_rows(outline(folder, family), teacher) if is_student else []
    return (
        f"{folder} is a text-to-image model of {total:,} parameters: {memory}\n{table(rows)}\n"
        f"{table([('scheduler', index['scheduler'][1]), *student])}\n"
        + "".join(f"  {name} needs --solver: {why}\n" for name, why in refused.items())
        + f"sample:  {hints.sample_texts(folder, family)}"
    )


def describe_run(folder: Path) -> str:
    """The stages of a run, their progress, and the next command."""
    from jaxldm import pipelines, training

    config = training.read_config(folder)
    recipe = training.read_recipe(folder)
    run = training.RunFolder(folder)
    rows = [
        (stage, network_of(getattr(recipe, stage)), *progress_of(run, recipe, stage))
        for stage in training.stages_of(recipe)
    ]
    place = f"{folder}/config.json: data"
    name = read_value(read_value(config.get("data"), dict, place).get("name"), str, f"{place}: name")
    head = f"{folder} is a run of the recipe {recipe.name} on {name}\n{table(rows)}"
    if recipe.finetune is not None:
        head += f"\n{table(finetune_rows(recipe.finetune))}"
    if recipe.generator == "autoencoder" and run.stage("autoencoder").complete:
        return f"{head}\nthe autoencoder:  {run.stage('autoencoder').model}"
    if recipe.finetune is not None and run.stage("finetune").complete and not run.has_model:
        from jaxldm.commands.finetune import hint_of

        return f"{head}\nsample:  {hint_of(run, recipe)}"
    if not run.has_model:
        resume = hints.resume(recipe, folder)
        return f"{head}\nresume:  {resume}"
    few = None if recipe.diffusion is None else recipe.diffusion.few_steps
    teacher = None if few is None else few.teacher
    if pipelines.kind_of(folder) == "text-to-image":
        return f"{head}\n{describe_text_to_image(folder, teacher=teacher)}"
    pipe = with_class_names(pipelines.load(folder), folder)
    about = describe_pipeline(pipe, teacher)
    return f"{head}\n{about}\nsample:  {hints.sample(folder, pipe)}"


def progress_of(run: Any, recipe: Any, stage: str) -> tuple[str, str]:
    """The steps done of a stage, or that it is the teacher's of a student; and whether it is finished."""
    from jaxldm.training.few_steps.teachers import is_copied

    done = run.stage(stage).complete
    if done and is_copied(run, recipe, stage):
        return "the teacher's", "complete"
    return f"{steps_done(run.stage(stage))} steps done", "complete" if done else "not finished"


def network_of(stage: Any) -> str:
    """What a stage of a recipe trains: a preset, or a model that is there."""
    return getattr(stage, "preset", None) or stage.source


def steps_done(stage: Any) -> int:
    """Number of training steps in the log of a stage."""
    from jaxldm import training

    if not stage.log.is_file():
        return 0
    steps = training.read_log(stage.log)["step"]
    return int(steps[-1]) if len(steps) else 0


def describe_pipeline(pipe: Any, teacher: str | None = None) -> str:
    """A table of networks, sizes, classes and the schedule of noise or masks.

    Args:
        teacher: of a student, where that is known by its path.
    """
    from jaxldm import models, pipelines

    rows = [
        (name, type(module).__name__, f"{models.param_count(params):,} parameters{_bits_of(params)}")
        for name, module, params in pipelines.components(pipe)
    ]
    size = lambda shape: "x".join(map(str, shape))  # noqa: E731
    latents = "" if pipe.autoencoder is None else f"{size(pipe.latent_shape())} latents -> "
    facts = [
        ("draws", f"{latents}{size(pipe.image_shape())} images"),
        ("classes", describe_classes(pipe)),
        describe_steps(pipe),
        *student_rows(pipe, teacher),
    ]
    return f"{table(rows)}\n{table(facts)}"


def student_rows(pipe: Any, teacher: str | None = None) -> list[tuple[str, str]]:
    """How a student was trained, in how many steps it draws, and where its guidance is; none of others.

    Args:
        teacher: its path; None: the name alone that the student's folder has.
    """
    few = pipe.few_steps
    if few is None:
        return []
    if teacher is not None:
        gone = "" if Path(teacher).exists() else ", which is not there any more"
        origin = f", from the teacher {teacher}{gone}"
    else:
        origin = "" if few.teacher is None else f", from a teacher named {few.teacher}"
    most = most_steps(pipe)
    if few.only_steps is not None:
        steps = " or ".join(map(str, few.only_steps))
    else:
        limits = "any number" if most is None else f"1 to {most}"
        steps = f"{limits}, {pipe.defaults.num_inference_steps} by default"
    (low, high), own = few.guidance_scale, f"{pipe.default_guidance_scale:g}"
    guidance = {
        "inside": "none" if low == 1 else f"of scale {low:g}, inside",
        "input": f"of scales from {low:g} to {high:g}, inside: the network takes the scale, {own} by default",
        "outside": f"outside, as of any other model: scale {own} by default",
    }
    return [
        ("student" if few.is_taught else "few steps", f"by {few.method}{origin}"),
        ("steps", f"{steps}, by the solver {few.solver}"),
        ("guidance", guidance[few.guidance]),
    ]


def most_steps(pipe: Any) -> int | None:
    """The most steps of a student where a call names neither solver nor spacing; None: there is no bound."""
    from jaxldm import schedulers

    rule = schedulers.from_config(pipe.scheduler, pipe.few_steps.solver).grid
    return rule.original_steps if rule.spacing == "lcm" else pipe.prediction.path.num_train_timesteps


def _bits_of(params: Any) -> str:
    """ ", in int8: 1.7 MB" of a quantised network."""
    from jaxldm import models

    how = models.how_quantized(params)
    return "" if how is None else f", in {how.weights}: {models.param_bytes(params) / 1e6:,.1f} MB"


def describe_steps(pipe: Any) -> tuple[str, str]:
    """From what to what its steps lead: from noise on a path, or from masked to known tokens."""
    if "mask_token" in pipe.family.methods:
        schedule = pipe.scheduler.get("masking_schedule", "cosine")
        return "tokens", f"of {pipe.mask_token()} values, masked by the {schedule} schedule"
    prediction = pipe.prediction
    kind, path = f"{prediction.path.name} path", prediction.path
    if path.num_train_timesteps is not None:
        named = getattr(path, "schedule", None)
        kind += f", {named.name} betas" if named else ""
        kind += f", {path.num_train_timesteps} timesteps"
    return "noise", f"{kind}, predicts {prediction.name}"


def describe_mesh(target: str, text: str, family: str | None = None) -> str:
    """What a device of a mesh has of each network of a folder, preset or recipe, and by which rule."""
    import jax

    from jaxldm import models, pipelines
    from jaxldm.models.sharding import AXES, check_splits, count_by_rule

    sizes = mesh_sizes(text)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)
    if Path(target).exists() and not is_recipe_file(target):
        pipelines.kind_of(target, family)
        modules = pipelines.modules_in(target, family)
    elif target in models.PRESETS:
        modules = {target: models.build(target)}
    else:
        modules = modules_of_recipe(target)
    shapes = {name: models.shapes(module) for name, module in modules.items()}
    check_splits(mesh, shapes)
    parts = []
    for name, params in shapes.items():
        counts = [count for count in count_by_rule(mesh, params) if count.arrays]
        total, each = (sum(getattr(count, key) for count in counts) for key in ("numbers", "per_device"))
        rows = [
            (
                count.pattern or "any other",
                str(tuple(count.spec)),
                f"{count.numbers:,}",
                f"{count.per_device:,}",
            )
            for count in counts
        ]
        parts.append(f"{name}: {each:,} of {total:,} parameters on each device\n{table(rows)}")
    head = ", ".join(f"{axis}={mesh.shape[axis]}" for axis in AXES)
    columns = (
        "pattern, how the last axes are split, parameters, on each device; fsdp splits the largest axis left"
    )
    return f"{head}: {mesh.size} devices\n{columns}\n" + "\n".join(parts)


def modules_of_recipe(name: str) -> dict[str, Any]:
    """The networks of the stages of a recipe, as its presets, changes and text encoders make them.

    What the pictures say is open: the first and last layers may have other channels in training.

    Raises:
        UnknownNameError, InvalidArgumentError: no such recipe.
    """
    from jaxldm import models, training
    from jaxldm.training.stages import build_model
    from jaxldm.training.text import text_fields

    if is_recipe_file(name):
        recipe = read_recipe_file(name).recipe
    elif name in training.RECIPES:
        recipe = training.RECIPES[name]
    else:
        raise UnknownNameError("folder, preset or recipe", name, [*training.RECIPES, *models.PRESETS])
    modules = {}
    for stage in training.STAGES:
        part = getattr(recipe, stage)
        if part is None or not hasattr(part, "preset"):
            continue
        text = recipe.text if stage == recipe.generator else None
        config = models.PRESETS[part.preset]
        given = {} if text is None else text_fields(text, config, part.overrides)
        modules[stage] = build_model(part, **given)
    return modules


def compare(first: str, second: str) -> None:
    """Prints that all tensors are the same, or a line for each that is not, and raises `CheckpointError`."""
    from jaxldm import pipelines

    rows = pipelines.compare(pipelines.load(first), pipelines.load(second))
    changed = [row.name for row in rows if row.difference]
    if changed:
        lines = [
            (row.name, "x".join(map(str, row.shape)) or "scalar", row.difference)
            for row in rows
            if row.difference
        ]
        print(table(lines, indent=""))
        raise CheckpointError(
            f"{len(changed)} of {len(rows)} tensors differ between {first} and {second}: {', '.join(changed)}"
        )
    print(f"all {len(rows)} tensors of {first} and {second} are the same, bit for bit")
