"""The benchmark of metrics gives both sides the same images and features, and compares what they find."""

import json

import numpy as np
import torch

from experiments.benchmarks import metrics, torch_fidelity_side


class Toy:
    """The means of the channels and of their squares, in place of InceptionV3's features."""

    def __init__(self, weights, *rest):
        self.batch_size = rest[-1]
        self.network = self.forward

    @staticmethod
    def forward(x):
        means = x.double().mean((2, 3)) / 255
        return (torch.cat([means, means**2], axis=1),)


class ToyTorch(Toy, torch_fidelity_side.TorchFidelity):
    pass


class ToyOurs(Toy, metrics.Ours):
    def features(self, images):
        means = images.astype(np.float64).mean((1, 2)) / 255
        return np.concatenate([means, means**2], axis=1)


def test_it_runs_small_and_both_sides_agree(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "TorchFidelity", ToyTorch)
    monkeypatch.setattr(metrics, "Ours", ToyOurs)
    monkeypatch.setattr(metrics, "save_weights", lambda path, state: None)
    metrics.main(
        metrics.Metrics(num_images=12, chunk=6, batch_size=4, size=16, rounds=2, output_dir=tmp_path)
    )
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert max(figures["relative_differences"].values()) < 1e-6
    rows = {row["row"]: row["milliseconds"] for row in figures["rows"]}
    features, fid, kid, everything = rows.values()
    for side in metrics.SIDES:
        # 2 x 12 images are four chunks of 6.
        assert everything[side] == 4 * features[side] + fid[side] + kid[side]
    assert "| all, for both sets |" in capsys.readouterr().out


def test_the_random_weights_are_those_of_the_network():
    state = metrics.random_inception_state()
    assert len(state) == 472 and state["Mixed_7c.branch1x1.conv.weight"].shape == (320, 2048, 1, 1)
    assert state["Conv2d_1a_3x3.bn.running_var"].min() > 0
