"""What a layer of a LoRA file adds to a weight.

| kind | change of the weight W | paper |
|---|---|---|
| LoRA | alpha/r up @ down, with `mid` for convolutions | Hu et al. 2021, arXiv:2106.09685 |
| LoHa | alpha/r (w1_a @ w1_b) * (w2_a @ w2_b), element by element | Hyeon-Woo et al. 2022, arXiv:2108.06098 |
| LoKr | alpha/r kron(w1, w2), each of them whole or a product | Yeh et al. 2024, arXiv:2309.14859 |
| whole | the tensor itself: `diff`, `w_norm`; or what the weight becomes: `scale` of a norm (FLUX) | |
| DoRA | of one of these, V = W + change: m V / |V| - W | Liu et al. 2024, arXiv:2402.09353 |

|V| is the length of each row of the weight, one for each output; in files of LyCORIS whose `dora_scale` is
[1, in] that of each column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxldm.checkpoints.safetensors_file import StoredTensor, Tensor
from jaxldm.errors import CheckpointError

_MATRICES = {"down", "up"}
_HADAMARD = ("w1_a", "w1_b", "w2_a", "w2_b")
# What a layer may have besides the kind of its change.
ADDED = {"alpha", "dora_scale", "magnitude", "bias", "diff_b", "b_norm"}


def _float(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor).astype(np.float32)


class Product(NamedTuple):
    """up @ down: down [r, in] or [r, in, h, w]; up [out, r] or [out, r, 1, 1]; mid [r, r, h, w] or None."""

    down: Tensor
    up: Tensor
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0] if self.down.shape else 0

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in] or [out, in, h, w]. Raises `ValueError` where the parts do not go together."""
        down, up, mid = self.down.shape, self.up.shape, None if self.mid is None else self.mid.shape
        fits = len(down) in (2, 4) and len(up) in (2, 4) and up[2:] in ((), (1, 1))
        if mid is not None and (len(mid) != 4 or down[2:] not in ((), (1, 1))):
            raise ValueError
        between = (self.rank, self.rank) if mid is None else mid[:2]
        if not fits or between[1] != self.rank or up[1] != between[0] or self.rank == 0:
            raise ValueError
        return (up[0], down[1], *(down[2:] if mid is None else mid[2:]))

    def value(self) -> np.ndarray:
        """Of that shape, float32."""
        up, down = _float(self.up), _float(self.down)
        up, down = up.reshape(up.shape[:2]), down if self.mid is None else down.reshape(down.shape[:2])
        if self.mid is None:
            return (up @ down.reshape(len(down), -1)).reshape(self.shape)
        return np.einsum("oa,abhw,bi->oihw", up, _float(self.mid), down, optimize=True)


class Factors(NamedTuple):
    """A matrix, whole or as a product, of which `core` [r, r, h, w] makes a convolution (Tucker).

    Attributes:
        first: [out, r], or [r, out] with a core; the matrix itself without `second`.
        second: [r, in].
        core: see above.
    """

    first: Tensor
    second: Tensor | None = None
    core: Tensor | None = None

    @property
    def rank(self) -> int | None:
        """None of a whole matrix."""
        return None if self.second is None else self.second.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in] or [out, in, h, w]. Raises `ValueError` where the parts do not go together."""
        first, second = self.first.shape, None if self.second is None else self.second.shape
        if second is None:
            if len(first) not in (2, 4):
                raise ValueError
            return tuple(first)
        if len(first) != 2 or len(second) != 2 or 0 in (*first, *second):
            raise ValueError
        if self.core is None:
            if first[1] != second[0]:
                raise ValueError
            return (first[0], second[1])
        core = self.core.shape
        if len(core) != 4 or core[:2] != (first[0], second[0]):
            raise ValueError
        return (first[1], second[1], *core[2:])

    def value(self) -> np.ndarray:
        """Of that shape, float32."""
        if self.second is None:
            return _float(self.first)
        first, second = _float(self.first), _float(self.second)
        if self.core is None:
            return first @ second
        return np.einsum("abhw,ao,bi->oihw", _float(self.core), first, second, optimize=True)


class Hadamard(NamedTuple):
    """The product of two matrices, element by element."""

    one: Factors
    two: Factors

    @property
    def rank(self) -> int | None:
        return self.one.rank

    @property
    def shape(self) -> tuple[int, ...]:
        if self.one.shape != self.two.shape:
            raise ValueError
        return self.one.shape

    def value(self) -> np.ndarray:
        return self.one.value() * self.two.value()


class Kronecker(NamedTuple):
    """The Kronecker product of two matrices, of which the second may be a convolution."""

    one: Factors
    two: Factors

    @property
    def rank(self) -> int | None:
        return self.one.rank if self.two.rank is None else self.two.rank

    @property
    def shape(self) -> tuple[int, ...]:
        (out, into), (rows, columns, *spatial) = self.one.shape[:2], self.two.shape
        if len(self.one.shape) != 2:
            raise ValueError
        return (out * rows, into * columns, *spatial)

    def value(self) -> np.ndarray:
        one, two = self.one.value(), self.two.value()
        return np.kron(one.reshape(*one.shape, *(1,) * (two.ndim - 2)), two)


class Whole(NamedTuple):
    """The change itself, of any shape; or the weight that there is with it, of which W is taken away."""

    tensor: Tensor
    rank: int | None = None
    replaces: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def value(self) -> np.ndarray:
        return _float(self.tensor)


class LoraLayer(NamedTuple):
    """The change of one module.

    Attributes:
        of_weight: the kind of the change of its weight; None where only the bias changes.
        multiplier: of that, alpha / r.
        magnitude: m of DoRA, in any shape; None of the others.
        by_columns: the lengths of DoRA are those of columns.
        bias: the change of its bias, or None.
        bias_multiplier: of that.
        tensors: all of its tensors, by their names in the file.
    """

    of_weight: Any
    multiplier: float
    magnitude: Tensor | None
    by_columns: bool
    bias: Tensor | None
    bias_multiplier: float
    tensors: Mapping[str, StoredTensor]

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the change of the weight: `[out, in]` or `[out, in, h, w]`."""
        return None if self.of_weight is None else self.of_weight.shape

    def weight_change(self, weight: Callable[[], np.ndarray]) -> np.ndarray:
        """What is added to the weight, float32.

        Args:
            weight: called for the weight, in the shape of the file, where the change depends on it.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # `_finite` refuses what comes of it
            change = np.float32(self.multiplier) * self.of_weight.value()
            if isinstance(self.of_weight, Whole) and self.of_weight.replaces:
                change = change - np.asarray(weight()).astype(np.float32)
            if self.magnitude is not None:
                before = np.asarray(weight()).astype(np.float32)
                change = _decomposed(before, change.reshape(before.shape), self.magnitude, self.by_columns)
        return self._finite(change)

    def bias_change(self) -> np.ndarray:
        """What is added to the bias, float32."""
        assert self.bias is not None
        return self._finite(np.float32(self.bias_multiplier) * _float(self.bias).reshape(-1))

    def _finite(self, change: np.ndarray) -> np.ndarray:
        if np.isfinite(change).all():
            return change
        path = next(iter(self.tensors.values())).path
        broken = [name for name, tensor in self.tensors.items() if not np.isfinite(_float(tensor)).all()]
        if broken:
            raise CheckpointError(f"{path} holds NaN or infinity, in {', '.join(broken)}: copy it again")
        raise CheckpointError(
            f"{path}: the change by {', '.join(self.tensors)} is not finite, although they are: their "
            "product is too large for float32, or the model's own weight is not finite"
        )


def _decomposed(weight: np.ndarray, change: np.ndarray, magnitude: Tensor, by_columns: bool) -> np.ndarray:
    """m V / |V| - W."""
    moved = weight + change
    axes = (0, *range(2, moved.ndim)) if by_columns else tuple(range(1, moved.ndim))
    lengths = np.sqrt(np.square(moved, dtype=np.float64).sum(axes, keepdims=True))
    wanted = _float(magnitude).reshape(lengths.shape)
    return moved * (wanted / (lengths + np.finfo(np.float32).eps)).astype(np.float32) - weight


def kind_of_change(parts: Mapping[str, Tensor]) -> Any:
    """The kind of a layer by the roles of its tensors; None where only a bias changes.

    Raises:
        ValueError: roles that make no kind.
    """
    roles = parts.keys() - ADDED
    if _MATRICES <= roles <= _MATRICES | {"mid"}:
        return Product(parts["down"], parts["up"], parts.get("mid"))
    names = {role.removeprefix("hada_") for role in roles if role.startswith("hada_")}
    cores = ({"t1", "t2"}, set())
    if len(names) == len(roles) > 0 and set(_HADAMARD) <= names and names - set(_HADAMARD) in cores:
        part = {name: parts[f"hada_{name}"] for name in names}
        halves = (Factors(part[f"w{n}_a"], part[f"w{n}_b"], part.get(f"t{n}")) for n in (1, 2))
        return Hadamard(*halves)
    names = {role.removeprefix("lokr_") for role in roles if role.startswith("lokr_")}
    if len(names) == len(roles) > 0:
        return Kronecker(*(_factors(parts, names, n) for n in (1, 2)))
    if roles in ({"diff"}, {"w_norm"}):
        return Whole(parts[roles.pop()])
    if roles == {"scale"}:
        return Whole(parts["scale"], replaces=True)
    if roles or not parts.keys() & {"diff_b", "b_norm"}:
        raise ValueError
    return None


def _factors(parts: Mapping[str, Tensor], names: set[str], n: int) -> Factors:
    """One half of a LoKr, whole or as a product."""
    own = {name for name in names if name[1:2] == str(n)}
    part = {name: parts[f"lokr_{name}"] for name in own}
    if own == {f"w{n}"}:
        return Factors(part[f"w{n}"])
    if own in ({f"w{n}_a", f"w{n}_b"}, {f"w{n}_a", f"w{n}_b", f"t{n}"}):
        return Factors(part[f"w{n}_a"], part[f"w{n}_b"], part.get(f"t{n}"))
    raise ValueError


def change_fits(change: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a change is of a weight's shape: a kernel of one pixel counts as a matrix, and a matrix may
    stand for a kernel whose last axes are one.

    >>> change_fits((4, 8), (4, 8, 1, 1)), change_fits((4, 18), (4, 2, 3, 3)), change_fits((8, 4), (4, 8))
    (True, True, False)
    """
    plain = [shape[:2] if set(shape[2:]) <= {1} else shape for shape in (change, weight)]
    if plain[0] == plain[1]:
        return True
    return len(change) == 2 and len(weight) == 4 and change == (weight[0], math.prod(weight[1:]))
