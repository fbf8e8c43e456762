"""The PatchGAN of taming-transformers as layers of PyTorch, with the names of its checkpoints."""

import torch


def patch_gan(in_channels: int, widths: tuple[int, ...]) -> torch.nn.Module:
    """`NLayerDiscriminator(in_channels, ndf=widths[0], n_layers=len(widths) - 1)`, in training mode."""
    layers, before = [], in_channels
    for number, width in enumerate(widths):
        stride = 1 if number == len(widths) - 1 else 2
        layers.append(torch.nn.Conv2d(before, width, 4, stride, 1, bias=number == 0))
        layers += [torch.nn.BatchNorm2d(width)] if number else []
        layers.append(torch.nn.LeakyReLU(0.2))
        before = width
    module = torch.nn.Module()
    module.main = torch.nn.Sequential(*layers, torch.nn.Conv2d(before, 1, 4, 1, 1))
    return module.train()


def trained_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state without the running moments, which training never reads."""
    moments = ("running_mean", "running_var", "num_batches_tracked")
    return {
        name: tensor for name, tensor in module.state_dict().items() if name.split(".")[-1] not in moments
    }
