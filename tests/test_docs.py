"""Code on the pages runs as it is printed, links lead somewhere, and every page is in the site's index."""

import ast
import json
import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]
RUN = (
    *(f"tutorials/write-a-{thing}.md" for thing in ("solver", "path", "family")),
    "training.md",
    "looking-inside.md",
)
LINK = re.compile(r"\]\(([^()\s]+)\)")
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name_of(page):
    return str(page.relative_to(ROOT))


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def headings(page):
    """The anchors of a page, as GitHub and MkDocs make them."""
    lines = CODE.sub("", page.read_text(encoding="utf-8")).splitlines()
    titles = [line.lstrip("#").strip() for line in lines if line.startswith("#")]
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def assigned(block):
    """The names that the top level of a block gives to values."""
    found = set()
    for statement in ast.parse(block).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            found.add(statement.name)
        else:
            nodes = (node for node in ast.walk(statement) if isinstance(node, ast.Name))
            found |= {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    return found


@pytest.fixture
def loose_promotion():
    """Users have JAX's own defaults; the pages must run with those."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("page", RUN)
def test_code_runs(page, tmp_path, monkeypatch, loose_promotion):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for block in python_blocks(DOCS / page):
        exec(compile(block, page, "exec"), names)


def test_no_block_takes_a_name_of_another():
    """On a page that is read from any place on, `step` must not be another one behind a later block."""
    blocks = [assigned(block) for block in python_blocks(DOCS / "training.md")]
    for n, names in enumerate(blocks):
        assert not names & set().union(*blocks[:n])


def test_the_notebook_runs(capsys, loose_promotion):
    notebook = json.loads((DOCS / "notebooks" / "first-steps.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    names = {"__name__": "notebook"}
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    printed = capsys.readouterr().out
    shares = re.findall(r"(\d+)%", printed)
    assert int(shares[0]) >= 95 and 45 <= int(shares[1]) <= 55
    spreads = [float(number) for number in re.findall(r"cluster (\d\.\d+)", printed)]
    assert abs(spreads[-1] - 0.1) < 0.01 and abs(spreads[0] - 0.1) > 0.03


def test_pictures_of_ones_own_become_a_data_set(tmp_path, monkeypatch):
    import numpy as np
    from PIL import Image

    for name in ("cats", "dogs"):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for k in range(10):
            pixels = np.full((40 + k, 50, 3), 100 if name == "cats" else 200, np.uint8)
            Image.fromarray(pixels).save(folder / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    block, names = python_blocks(DOCS / "tutorials" / "train-on-your-own-pictures.md")[0], {}
    exec(compile(block, "recipe.py", "exec"), names)
    dataset = names["mine"].load_data()
    assert dataset.image_shape == (32, 32, 3) and dataset.class_names == ("cats", "dogs")
    images, labels = dataset.arrays("train")
    assert len(images) == 16
    stages = [getattr(names["mine"], stage) for stage in ("autoencoder", "diffusion", "classifier")]
    assert all(stage.batch_size <= len(images) for stage in stages)  # so few can be trained on
    np.testing.assert_allclose(images[:, 0, 0, 0], np.where(labels == 0, 100, 200) / 127.5 - 1, atol=0.01)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_is_python(page):
    for block in python_blocks(page):
        compile(block, name_of(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        address, _, anchor = target.partition("#")
        file = (page.parent / address).resolve() if address else page
        if address.startswith(("experiments/", "notebooks/", "../experiments/")) and not file.exists():
            file = ROOT / "experiments" / address.partition("experiments/")[2]  # pages that the site takes in
            file = DOCS / address.replace(".md", ".ipynb") if "notebooks/" in address else file
        assert file.exists(), f"{name_of(page)} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in headings(file), f"{name_of(page)} links to {target}"


def test_every_page_is_in_the_index():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"- (\S+\.md)", nav))
    for page in sorted(DOCS.rglob("*.md")):
        assert page.relative_to(DOCS).as_posix() in listed
    for page in sorted(ROOT.glob("experiments/*/README.md")):
        assert page.relative_to(ROOT).as_posix() in listed
    for page in listed:
        inside = (DOCS / page).exists() or (DOCS / page).with_suffix(".ipynb").exists()
        assert inside or (ROOT / page).exists(), page
