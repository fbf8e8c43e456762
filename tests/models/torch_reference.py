"""What the comparisons with PyTorch share."""

import jax.numpy as jnp
import numpy as np
import torch


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random, none at its special start: biases of 0 and scales of 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.5 / max(1.0, parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 2.0)
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def to_torch(x) -> torch.Tensor:
    """[B, H, W, C] -> [B, C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(x).transpose(0, 3, 1, 2)))


def assert_agrees(ours: jnp.ndarray, theirs: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Equal to `tolerance` of the largest value, after bringing theirs to channels last."""
    theirs = theirs.detach().numpy()
    theirs = theirs.transpose(0, 2, 3, 1) if theirs.ndim == 4 else theirs
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=tolerance * np.abs(theirs).max())
