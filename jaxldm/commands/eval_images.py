"""`jaxldm eval IMAGES --metrics ...`: published metrics of folders of images, .npz files and runs.

`options` is the command's dataclass, `Eval`, which imports this module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxldm.errors import InvalidArgumentError, one_of

if TYPE_CHECKING:
    from jaxldm.checkpoints import LoadedNetwork
    from jaxldm.metrics.extraction import FeatureNetwork
    from jaxldm.metrics.image_metrics import Metric
    from jaxldm.metrics.image_sets import ImageSet

DEFAULT_METRICS = ("fid", "kid", "prdc")
# What a run draws with; images that are there are as they are.
OF_SAMPLING = {
    "guidance_scale",
    "num_images",
    "num_inference_steps",
    "solver",
    "spacing",
    "sigmas",
}
WEIGHTS = "JAXLDM_WEIGHTS"  # an environment variable: a folder with files of weights
FEATURE_CACHE = "JAXLDM_FEATURE_CACHE"  # an environment variable: a folder, or "off"
TEXTS = "clip/texts"  # the key of the texts' embeddings
INCEPTION_FILES = (
    "pt_inception-2015-12-05-6726825d.pth",
    "weights-inception-2015-12-05-6726825d.pth",
    "inception-2015-12-05.pt",
    "classify_image_graph_def.pb",
    "inception_v3_fid.pickle",
    "inception_v3_weights_fid.pickle",
    "inception_v3_fid.safetensors",
)


def is_asked(options: Any) -> bool:
    """Whether the options are those of this kind of evaluation, and not of a run by its own classifier."""
    names = ("real", "metrics", "inception", "dinov2", "clip", "prompts", "lpips", "json")
    return any(getattr(options, name) for name in names) or holds_images(Path(options.folder))


def holds_images(path: Path) -> bool:
    """Whether a path is an .npz file, or a folder with pictures that is no run and no exported model."""
    from jaxldm.metrics.image_sets import SUFFIXES

    if not path.is_dir():
        return path.suffix == ".npz"
    names = [child.name.lower() for child in path.iterdir()]
    return any(name.endswith(SUFFIXES) for name in names) and not any(n.endswith(".json") for n in names)


def evaluate_images(options: Any) -> None:
    """Checks the options, then computes the features, and prints and saves the figures."""
    from jaxldm.commands.terminal import print_findings
    from jaxldm.files import write_atomically
    from jaxldm.metrics import image_metrics as M
    from jaxldm.metrics.resizing import VARIANTS

    check_json(options)
    one_of("resize variant", options.resize, VARIANTS)
    if options.batch_size < 1:
        raise InvalidArgumentError(f"batch_size must be 1 or more, got {options.batch_size}")
    metrics = chosen_metrics(options)
    check_effects(options, metrics)
    check_out(options.json)
    statistics = M.read_statistics(options.real) if options.real else None
    if statistics is not None:
        M.check_statistics(metrics, statistics, str(options.real))
    captions = captions_to_draw(options)
    of_texts = any(metric.of_texts for metric in metrics.values())
    texts = (read_prompts(options) if captions is None else captions) if of_texts else []
    networks, pairing, files = load_networks(options, metrics)
    compares = options.real is not None and statistics is None
    real = real_images(str(options.real)) if compares else None
    images = generated_images(options, captions)
    M.check_counts(metrics, images, real)
    if texts and len(texts) != images.count:
        raise InvalidArgumentError(
            f"{options.prompts} has {len(texts)} lines, and {images.name} {images.count} images: clip-score "
            "needs a text for each image, in the order of their names"
        )
    findings = M.warnings_of(metrics, images, real)

    with feature_cache() as folder:
        features = distances(images, real, pairing, options) if pairing and real else {}
        features |= all_features(images, networks, metrics, folder, options)
        known: dict[str, Any] = dict(statistics or {})
        if real is not None and any(metric.compares for metric in metrics.values()):
            known = all_features(real, networks, metrics, folder, options)
        if texts:
            known[TEXTS] = text_embeddings(options, texts)
        figures = {
            name: metric.compute(features[layer_key(metric)], known.get(real_key(metric, statistics)))
            for name, metric in metrics.items()
        }
    report = {
        "images": images.name,
        "num_images": images.count,
        "real": real.name if real is not None else options.real,
        "num_real": real.count if real is not None else None,
        "resize": options.resize,
        "weights": files,
        "metrics": figures,
        "warnings": [finding._asdict() for finding in findings],
    }
    if options.json:
        write_atomically(options.json, (json.dumps(report, indent=2) + "\n").encode())
    if not options.quiet:
        print(text_of(report, metrics))
        if options.json:
            print(f"saved in {options.json}")
    print_findings(findings)


def check_out(path: str | None) -> None:
    """Raises `InvalidArgumentError` for a place of OUT.json that is a folder, or a file of something else."""
    if path and Path(path).is_dir():
        raise InvalidArgumentError(f"--json {path} is a folder: give the name of a file, OUT.json")
    if path and Path(path).is_file():
        with Path(path).open("rb") as file:
            if file.read(1) not in (b"", b"{"):
                raise InvalidArgumentError(f"--json {path} is there and no JSON file: give another name")


def check_json(options: Any) -> None:
    """Raises `InvalidArgumentError` for --json on a run without anything of published metrics."""
    others = ("real", "metrics", "inception", "dinov2", "clip", "prompts", "lpips")
    if options.json and not any(getattr(options, name) for name in others) and is_run(options.folder):
        raise InvalidArgumentError(
            "--json goes with --metrics: name some, or leave it out; the figures of the run's classifier are "
            f"written to {Path(options.output_dir or Path(options.folder, 'eval'), 'metrics.json')}"
        )


def chosen_metrics(options: Any) -> dict[str, Metric]:
    """The metrics by name. Raises for an unknown name, and for one that lacks real images."""
    from jaxldm.metrics.image_metrics import METRICS

    words = [name for words in options.metrics for name in words.replace(",", " ").split()]
    if options.metrics and not words:
        raise InvalidArgumentError(f"--metrics names none: choose some of {', '.join(METRICS)}")
    metrics = {
        name: METRICS[one_of("metric", name.lower(), METRICS)]
        for name in map(str.lower, words or DEFAULT_METRICS)
    }
    lacking = [name for name, metric in metrics.items() if metric.compares and options.real is None]
    if lacking:
        raise InvalidArgumentError(
            f"{', '.join(lacking)} compares with real images: add --real, a folder of images, an .npz file "
            "or a run folder (only `is` and `clip-score` need none)"
        )
    return metrics


def check_effects(options: Any, metrics: Mapping[str, Metric]) -> None:
    """Raises `InvalidArgumentError` for an option that has no effect on these metrics of these images."""
    changed = {
        field.name for field in dataclasses.fields(options) if getattr(options, field.name) != field.default
    }
    used = {metric.network for metric in metrics.values()}
    others = {"inception", "dinov2", "clip", "lpips"} - used
    for name in sorted(changed & (others | ({"resize"} if "inception" in others else set()))):
        raise InvalidArgumentError(f"--{name} has no effect on {', '.join(metrics)}: leave it out")
    of_texts = any(metric.of_texts for metric in metrics.values()) or is_run_of_captions(options.folder)
    if "prompts" in changed and not of_texts:
        raise InvalidArgumentError(f"--prompts has no effect on {', '.join(metrics)}: leave it out")
    if "output_dir" in changed:
        raise InvalidArgumentError("--output-dir has no effect with --metrics: give --json OUT.json")
    for name in sorted(changed & OF_SAMPLING) if not is_run(options.folder) else ():
        option = name.replace("_", "-")
        raise InvalidArgumentError(f"--{option} has no effect on images that are there: leave it out")


def load_networks(
    options: Any, metrics: Mapping[str, Metric]
) -> tuple[dict[str, FeatureNetwork], LoadedNetwork | None, dict[str, dict[str, str]]]:
    """The networks that the metrics need, LPIPS', and for each the file it is from with its SHA-256.

    Raises:
        InvalidArgumentError: no file is given: which one to get.
        CheckpointError: the file is damaged or of another network.
    """
    from jaxldm import checkpoints
    from jaxldm.metrics.extraction import inception_network

    networks, pairing, files = {}, None, {}
    for name in dict.fromkeys(metric.network for metric in metrics.values()):
        if name == "inception":
            file = inception_file(options)
            loaded = checkpoints.load_inception(file)
            networks[name] = inception_network(loaded.module, loaded.params, loaded.sha256, options.resize)
            files[name] = {"file": str(file), "sha256": loaded.sha256}
        elif name == "lpips":
            if not options.lpips:
                raise InvalidArgumentError(
                    "lpips needs --lpips FILE: torchvision's vgg16-397923af.pth or alexnet-owt-7be5be79.pth"
                )
            pairing = checkpoints.load_lpips(options.lpips)
            files[name] = {"file": options.lpips, "sha256": pairing.sha256, "net": pairing.module.net}
        else:
            networks[name], files[name] = image_encoder(name, getattr(options, name))
    return networks, pairing, files


def inception_file(options: Any) -> Path:
    """The file of --inception, or one of the known names in the folder JAXLDM_WEIGHTS."""
    from jaxldm.checkpoints.inception_weights import WHERE

    if options.inception:
        return Path(options.inception)
    folder = os.environ.get(WEIGHTS)
    known = [Path(folder) / name for name in INCEPTION_FILES] if folder else []
    found = [file for file in known if file.is_file()]
    if not found:
        raise InvalidArgumentError(
            f"FID's network needs its weights, which this package lacks: {WHERE} "
            f"(docs/metrics.md#the-weights), and give it by --inception FILE, or set {WEIGHTS} to its folder"
        )
    return found[0]


def image_encoder(name: str, folder: str | None) -> tuple[FeatureNetwork, dict[str, str]]:
    """DINOv2 or CLIP from a folder in the layout of transformers."""
    from jaxldm import checkpoints, models
    from jaxldm.metrics.extraction import image_encoder_network

    published = {"dinov2": "facebook/dinov2-large", "clip": "openai/clip-vit-large-patch14-336"}[name]
    if not folder:
        metric = {"dinov2": "fd-dinov2", "clip": "cmmd or clip-score"}[name]
        raise InvalidArgumentError(
            f"{metric} needs --{name} FOLDER, with config.json and model.safetensors: published figures have "
            f"{published}, in the layout of transformers"
        )
    module, params = checkpoints.load(folder)
    apply: Any = module.apply
    files = [*sorted(Path(folder).glob("*.safetensors")), Path(folder) / "config.json"]
    sha256 = checkpoints.hash_of_files(files)
    if name == "dinov2" and isinstance(module, models.Dinov2Model):

        def encode(params: Any, x: Any) -> Any:
            return apply({"params": params}, x).pooled

        prepare = models.dinov2_pixel_values
    elif name == "clip" and isinstance(module, models.CLIPModel | models.CLIPVisionModelWithProjection):
        whole = isinstance(module, models.CLIPModel)
        size = module.config.vision_config.image_size if whole else module.config.image_size

        def encode(params: Any, x: Any) -> Any:
            method = {"method": "encode_image"} if whole else {}
            return apply({"params": params}, x, **method).image_embeds

        def prepare(images: Any) -> Any:
            return models.clip_pixel_values(images, size)
    else:
        raise InvalidArgumentError(f"--{name} {folder} holds a {type(module).__name__}: give {published}")
    network = image_encoder_network(name, encode, params, sha256, prepare)
    return network, {"file": str(folder), "sha256": sha256}


def read_prompts(options: Any) -> list[str]:
    """The lines of the file of --prompts."""
    from jaxldm.errors import DataError
    from jaxldm.reading import read_bytes

    if not options.prompts:
        raise InvalidArgumentError("clip-score needs --prompts FILE: one text a line, for each image its own")
    content = read_bytes(options.prompts, 2**28, "file of prompts", DataError)
    try:
        lines = content.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{options.prompts} is not a text file in UTF-8: {error.reason}") from error
    if not lines:
        raise DataError(f"{options.prompts} is empty: give one text a line, for each image its own")
    return lines


def text_embeddings(options: Any, texts: list[str]) -> Any:
    """The embeddings of texts in CLIP's common space, [N, P]."""
    import jax
    import numpy as np

    from jaxldm import checkpoints, models
    from jaxldm.data import map_batches
    from jaxldm.models.text_encoder import check_token_ids

    module: Any
    module, params = checkpoints.load(options.clip)
    if not isinstance(module, models.CLIPModel):
        raise InvalidArgumentError(
            f"clip-score needs both towers of CLIP, and --clip {options.clip} holds a {type(module).__name__}"
        )
    length = module.config.text_config.max_position_embeddings
    tokens = checkpoints.load_tokenizer(options.clip)(texts, max_length=length).input_ids
    check_token_ids(module.config.text_config, tokens)
    apply: Any = module.apply

    @jax.jit
    def encode(params: Any, tokens: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return apply({"params": params}, tokens, method="encode_text").text_embeds

    return map_batches(lambda part: encode(params, part), np.asarray(tokens), options.batch_size)


def is_run_of_captions(folder: str | Path) -> bool:
    """Whether a folder is a run that was trained on captions, and not a model of texts without its data."""
    from jaxldm import training

    recipe = training.recipe_to_resume(folder) if (Path(folder) / "config.json").exists() else None
    return recipe is not None and recipe.text is not None


def is_run(path: str) -> bool:
    """Whether a path is a run folder, of classes or of captions."""
    from jaxldm.errors import CheckpointError
    from jaxldm.pipelines import kind_of

    try:
        return kind_of(path) == "run" or is_run_of_captions(path)
    except CheckpointError:
        return False


def real_images(path: str) -> ImageSet:
    """A folder, an .npz file, or the test images of a run's dataset."""
    from jaxldm import training
    from jaxldm.metrics.image_sets import open_image_set, rows_set

    if not is_run(path):
        return open_image_set(path)
    dataset = training.read_data(path)
    return rows_set(dataset.rows("test"), dataset.image_shape, f"{dataset.name} (test)")


def captions_to_draw(options: Any) -> list[str] | None:
    """What a run of captions draws: the lines of --prompts, or test captions; None of anything else."""
    from jaxldm import training

    if not is_run_of_captions(options.folder):
        return None
    if options.prompts:
        return read_prompts(options)
    if options.num_images < 1:
        raise InvalidArgumentError(f"num_images must be 1 or more, got {options.num_images}")
    found = training.read_data(options.folder).captions("test") or [""]
    return [found[number % len(found)] for number in range(options.num_images)]


def generated_images(options: Any, captions: list[str] | None) -> ImageSet:
    """A folder, an .npz file, or images that a run draws."""
    from jaxldm import pipelines
    from jaxldm.data import to_uint8
    from jaxldm.metrics.image_sets import array_set, open_image_set

    if not is_run(options.folder):
        if options.reference_quirks:
            raise InvalidArgumentError("--reference-quirks is of a run, which draws images: leave it out")
        return open_image_set(options.folder)
    if len(options.guidance_scale) > 1:
        raise InvalidArgumentError(f"--metrics takes one guidance scale, got {len(options.guidance_scale)}")
    pipe = pipelines.load(options.folder, reference_quirks=options.reference_quirks)
    [scale] = options.guidance_scale or (1.0,)
    scale = pipe.check_guidance_scale(scale) if captions is None else scale
    number = options.num_images if captions is None else len(captions)
    options.announce(pipe, [scale], number, by_class=captions is None)
    images, _ = options.draw(pipe, scale, captions)
    return array_set(to_uint8(images), f"{options.folder} (w = {scale:g})")


@contextlib.contextmanager
def feature_cache() -> Iterator[Path]:
    """The folder of features: that of JAXLDM_FEATURE_CACHE, by default one of the user's.

    "off", or no home folder: one that is removed again.
    """
    from jaxldm.files import expanded
    from jaxldm.host import user_cache_folder

    setting = os.environ.get(FEATURE_CACHE, "")
    of_user = user_cache_folder()
    if setting.lower() in ("off", "0", "no", "false") or not (setting or of_user):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        yield expanded(setting) if setting or of_user is None else of_user / "jaxldm" / "features"


def layer_key(metric: Metric) -> str:
    """The key of a metric's features among those of all networks."""
    return f"{metric.network}/{metric.layer}"


def real_key(metric: Metric, statistics: Any) -> str:
    """The same among those of the real images, or of their statistics."""
    if metric.of_texts:
        return TEXTS
    return layer_key(metric) if statistics is None else metric.layer


def all_features(
    images: ImageSet,
    networks: Mapping[str, FeatureNetwork],
    metrics: Mapping[str, Metric],
    folder: Path,
    options: Any,
) -> dict[str, Any]:
    """The features of all layers that the metrics take, in one pass for each network."""
    from tqdm import tqdm

    from jaxldm.commands.options import first_devices
    from jaxldm.metrics.extraction import extract

    features = {}
    for name, network in networks.items():
        layers = list(dict.fromkeys(metric.layer for metric in metrics.values() if metric.network == name))
        # disable=None: no bar where stderr is a file and not a terminal
        disable = True if options.quiet else None
        bar = tqdm(total=images.count, desc=f"{name}, {images.name}", unit="image", leave=False,
                   dynamic_ncols=True, disable=disable)  # fmt: skip
        with bar:
            found = extract(
                images,
                network,
                layers,
                folder,
                batch_size=options.batch_size,
                devices=first_devices(options.devices),
                progress=bar.update,
            )
        features |= {f"{name}/{layer}": array for layer, array in found.items()}
    return features


def distances(images: ImageSet, real: ImageSet, pairing: LoadedNetwork, options: Any) -> dict[str, Any]:
    """LPIPS of each image and the real one at its place."""
    from tqdm import tqdm

    from jaxldm.metrics import pair_distances

    def distance(params: Any, x: Any, y: Any) -> Any:
        return pairing.module.apply({"params": params}, x, y)

    disable = True if options.quiet else None
    with tqdm(total=images.count, desc="lpips", unit="pair", leave=False, disable=disable) as bar:
        found = pair_distances(
            images, real, distance, pairing.params, batch_size=options.batch_size, progress=bar.update
        )
    return {"lpips/pairs": found}


def text_of(report: Mapping[str, Any], metrics: Mapping[str, Metric]) -> str:
    """The figures as a table, with the weights and the variant next to each, and the whole hashes below."""
    from jaxldm.commands.terminal import table

    rows: list[tuple[str, ...]] = []
    for name, figures in report["metrics"].items():
        network = metrics[name].network
        variants = {"inception": report["resize"], "lpips": report["weights"][network].get("net", "")}
        variant = variants.get(network, "bicubic")
        source = f"{network} {variant} {report['weights'][network]['sha256'][:12]}"
        for figure, value in figures.items():
            if not figure.endswith("_std"):
                spread = f" ± {figures[f'{figure}_std']:.4g}" if f"{figure}_std" in figures else ""
                rows.append((figure, f"{value:.6g}{spread}", f"({metrics[name].best} is better)", source))
    against = f" against {report['real']}" if report["real"] else ""
    of_real = f" ({report['num_real']} images)" if report["num_real"] is not None else ""
    hashes = [
        f"{name}: {entry['file']}, SHA-256 {entry['sha256']}" for name, entry in report["weights"].items()
    ]
    head = f"{report['images']} ({report['num_images']} images){against}{of_real}"
    return "\n".join([head, table(rows), *hashes])
