"""All predictions that a path has, for tests of the algebra at noise levels inside the path."""

from jaxldm import diffusion as D


def predictions_on(path: D.Path) -> list[D.Prediction]:
    """With epsilon on paths that end in pure noise too: it is undefined at that end alone."""
    names = ["sample", "v_prediction", "flow"]
    names += [] if path.num_train_timesteps is not None else ["velocity"]
    names += ["edm"] if isinstance(path, D.EDM) else []
    epsilon = D.linear_prediction("epsilon", path, lambda t: (0, 1))
    return [
        epsilon if path.zero_terminal_snr else D.epsilon(path),
        *(D.prediction(name, path) for name in names),
    ]
