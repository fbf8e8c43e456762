"""The benchmark of training steps' compile times measures each optimizer and writes what it measured."""

import json

from experiments.benchmarks import train_step_compile


def test_it_runs_small_and_writes_what_it_measured(tmp_path, capsys, monkeypatch):
    few = {name: train_step_compile.VARIANTS[name] for name in ("adamw", "optax.flatten")}
    monkeypatch.setattr(train_step_compile, "VARIANTS", few)
    train_step_compile.main(train_step_compile.TrainStepCompile(quick=True, output_dir=tmp_path))
    figures = json.loads((tmp_path / "quick" / "train_step_compile.json").read_text())
    assert [(row["recipe"], row["optimizer"]) for row in figures["rows"]] == [
        ("smoke-dit", "adamw"),
        ("smoke-dit", "optax.flatten"),
    ]
    for row in figures["rows"]:
        assert row["arrays"] > 10 and all(len(times) == 1 for times in row["seconds"].values())
        assert min(row["seconds"]["compile"]) > 0
    table = (tmp_path / "quick" / "train_step_compile.md").read_text()
    assert "| smoke-dit |" in table and table.split("```")[-1].strip() in capsys.readouterr().out


def test_the_variants_hold_trees_and_vectors():
    sizes = {}
    for variant in train_step_compile.VARIANTS:
        _, state, _ = train_step_compile.step_and_arguments("smoke-dit", variant)
        sizes[variant] = len(train_step_compile.jax.tree.leaves(state.opt_state))
    params = len(train_step_compile.jax.tree.leaves(state.params))
    assert sizes["adamw"] == 2 * params + 1 and sizes["optax.chain"] == 2 * params + 2
    assert sizes["optax.flatten"] == 2 + 2
