"""Buckets: constant tokens, few sizes, every example once an epoch, no batch of another shape."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxldm.data import BucketedBatches, Buckets, assign_buckets
from jaxldm.data.buckets import cover
from jaxldm.errors import InvalidArgumentError


@given(st.integers(1, 16), st.integers(1, 8), st.floats(1, 4), st.sampled_from([0.0, 0.1, 0.3]))
def test_sizes_have_the_tokens_of_the_square_and_allowed_ratios(side, multiple, max_aspect, slack):
    buckets = Buckets(side * multiple, multiple, max_aspect, slack)
    assert (side * multiple, side * multiple) in buckets.sizes and buckets.tokens == side**2
    for height, width in buckets.sizes:
        assert height % multiple == width % multiple == 0
        assert max(height, width) <= (max_aspect + 1e-6) * min(height, width)
        tokens = (height // multiple) * (width // multiple)
        assert (1 - slack) * side**2 - 1e-6 <= tokens <= side**2
    exact = {
        (rows * multiple, side**2 // rows * multiple)
        for rows in range(1, side**2 + 1)
        if side**2 % rows == 0
        and max(rows, side**2 // rows) <= (max_aspect + 1e-9) * min(rows, side**2 // rows)
    }
    assert exact <= set(buckets.sizes) and (slack > 0 or exact == set(buckets.sizes))


@given(st.lists(st.tuples(st.integers(8, 999), st.integers(8, 999)), min_size=1))
def test_pictures_go_where_least_is_cut_off(sizes):
    buckets = Buckets(96, 8, 4.0, 0.1)
    for (height, width), bucket in zip(sizes, assign_buckets(sizes, buckets), strict=True):

        def kept(size, height=height, width=width):
            ratio = (width / height) / (size[1] / size[0])
            return min(ratio, 1 / ratio)

        assert kept(buckets.sizes[bucket]) >= max(map(kept, buckets.sizes)) - 1e-9


def test_a_covered_picture_keeps_its_middle_and_its_ratio():
    ramp = np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3))
    wide = cover(ramp, (48, 96))  # the same ratio: nothing is cut off
    np.testing.assert_allclose(wide[0, :, 0], np.arange(96) * 200 / 96 + 0.54, atol=1.1)
    square = cover(ramp, (50, 50))
    assert square.shape == (50, 50, 3) and abs(int(square[0, 0, 0]) - 50) <= 1
    assert abs(int(square[0, -1, 0]) - 149) <= 1
    assert cover(ramp[..., :1], (100, 100)).shape == (100, 100, 1)
    np.testing.assert_array_equal(cover(ramp, (100, 200)), ramp)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Blank pictures of the sizes of their buckets, each with its own number."""

    bucket_of: np.ndarray
    sizes: tuple

    def __len__(self):
        return len(self.bucket_of)

    def take(self, rows):
        (bucket,) = set(self.bucket_of[rows].tolist())  # one shape, or there is no array of them
        return {"image": np.zeros((len(rows), *self.sizes[bucket], 1), np.float32), "row": rows}


def batches_of(counts, batch_size, seed=0):
    bucket_of = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    sizes = Buckets(96, 8, 4.0, 0.1).sizes
    return BucketedBatches(Pictures(bucket_of, sizes), bucket_of, batch_size, jax.random.key(seed))


@settings(max_examples=25)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(sum), st.integers(1, 6))
def test_every_example_is_seen_once_an_epoch_with_what_is_carried_over(counts, batch_size):
    batch_size = min(batch_size, sum(counts))
    batches = batches_of(counts, batch_size)
    members = [np.flatnonzero(batches.rows.bucket_of == bucket).tolist() for bucket in range(len(counts))]
    seen = [[] for _ in counts]
    by_epoch = collections.defaultdict(lambda: [0] * len(counts))
    for step in range(4 * len(batches) + 3):
        rows = batches[step]["row"]
        assert len(rows) == batch_size
        bucket = int(batches.rows.bucket_of[rows[0]])
        by_epoch[batches.place(step).epoch][bucket] += 1
        seen[bucket].append((batches.place(step).batch, rows.tolist()))
    for bucket, parts in enumerate(seen):
        parts = sorted(parts)
        places = [place for place, _ in parts]
        assert len(set(places)) == len(places)
        stream = {place * batch_size + n: row for place, rows in parts for n, row in enumerate(rows)}
        epochs = collections.defaultdict(list)
        for place, row in stream.items():
            epochs[place // len(members[bucket])].append(row)
        for rows in epochs.values():
            assert len(set(rows)) == len(rows)
        complete = [rows for rows in epochs.values() if len(rows) == len(members[bucket])]
        assert all(sorted(rows) == members[bucket] for rows in complete)
    last = max(by_epoch)
    for epoch, found in by_epoch.items():
        if epoch < last:  # n_b / B batches each, up to what is carried over
            for bucket, n in enumerate(counts):
                assert found[bucket] == (epoch + 1) * n // batch_size - epoch * n // batch_size


def test_any_step_alone_is_that_of_the_whole_run_and_orders_differ():
    whole = batches_of((13, 7, 22), 4)
    rows = [whole.row_numbers(step).tolist() for step in range(40)]
    for step in (39, 0, 17, 17):
        assert batches_of((13, 7, 22), 4).row_numbers(step).tolist() == rows[step]
    other = BucketedBatches(whole.rows, whole.rows.bucket_of, 4, jax.random.key(1))
    assert [other.row_numbers(step).tolist() for step in range(40)] != rows
    assert (
        len({whole.place(step).bucket for step in range(len(whole))}) == 3
    )  # mixed, not one after the other


def test_as_many_programs_are_compiled_as_there_are_buckets():
    batches, traced = batches_of((5, 0, 9, 2), 4), []

    @jax.jit
    def step(images):
        traced.append(images.shape)
        return images.mean()

    for number in range(30):
        step(batches[number]["image"])
    assert batches.num_buckets == 3 == len(traced) == len(set(traced))


def test_what_cannot_be_is_refused():
    with pytest.raises(InvalidArgumentError, match="multiple of 16"):
        Buckets(72, 16)
    with pytest.raises(InvalidArgumentError, match="more than 64"):
        Buckets(1024, 4, 64, 0.5)
    with pytest.raises(InvalidArgumentError, match="between 1 and the number of examples, 5, got 6"):
        batches_of((5,), 6)
