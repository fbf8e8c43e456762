import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AmusedScheduler
from diffusers.schedulers import scheduling_amused
from hypothesis import given
from hypothesis import strategies as st

from jaxldm import diffusion as D
from jaxldm.errors import InvalidArgumentError, UnknownNameError

KEY = jax.random.key(9)
BATCH, LENGTH, VOCABULARY = 4, 16, 8
MASK = VOCABULARY
TABLE = np.random.default_rng(0).standard_normal((VOCABULARY + 1, 3, VOCABULARY)).astype(np.float32)
MAX_STEPS = 16


def network(tokens, condition=None):
    """Logits [B, N, V] that depend on a token, its two neighbours, its place and the condition."""
    table = jnp.asarray(TABLE)
    logits = table[tokens, 0] + table[jnp.roll(tokens, 1, 1), 1] + table[jnp.roll(tokens, -1, 1), 2]
    logits = logits + 0.3 * jnp.sin(jnp.arange(LENGTH, dtype=jnp.float32))[None, :, None]
    return 2 * logits if condition is None else logits * (1 + condition.reshape(-1, 1, 1))


@jax.jit
def run(keys, tokens, unmasking):
    return D.sample_tokens(keys, network, tokens, unmasking, mask_token=MASK, return_trajectory=True)


def start(known=0):
    """All masked, but for `known` tokens of each image."""
    tokens = np.full((BATCH, LENGTH), MASK, np.int32)
    for k in range(BATCH):
        generator = np.random.default_rng(k)
        places = generator.permutation(LENGTH)[:known]
        tokens[k, places] = generator.integers(0, VOCABULARY, known)
    return tokens


def counts_left(steps, schedule, unknown):
    """How many are masked after each step, in exact arithmetic where it matters."""
    gamma = {"cosine": lambda r: math.cos(math.pi / 2 * r), "linear": lambda r: 1 - r}[schedule]
    left, still = [], unknown
    for i in range(steps):
        masked = math.floor(unknown * gamma((i + 1) / steps) + 1e-9)
        still = 0 if i == steps - 1 else max(1, min(masked, still - 1))
        left.append(still)
    return left


@given(
    steps=st.integers(1, MAX_STEPS),
    schedule=st.sampled_from(["cosine", "linear"]),
    known=st.integers(0, LENGTH - 1),
)
def test_as_many_are_unmasked_as_the_schedule_says(steps, schedule, known):
    tokens = start(known)
    unmasking = D.make_unmasking(steps, schedule, max_steps=MAX_STEPS)
    last, trajectory = run(D.image_keys(KEY, BATCH), tokens, unmasking)
    left = (np.asarray(trajectory) == MASK).sum(-1)
    expected = [LENGTH - known, *counts_left(steps, schedule, LENGTH - known)]
    np.testing.assert_array_equal(left[: steps + 1], np.array(expected)[:, None].repeat(BATCH, 1))
    assert (left[steps:] == 0).all()  # the last step commits all, and padding changes nothing
    # What is known stays as it is, from the moment when it is known.
    for before, after in itertools.pairwise(np.asarray(trajectory)):
        np.testing.assert_array_equal(after[before != MASK], before[before != MASK])
    np.testing.assert_array_equal(last, trajectory[-1])


def reference_run(monkeypatch, tokens, steps, schedule, temperature, ratio=1.0):
    """AmusedScheduler, fed the random numbers that `sample_tokens` draws."""
    scheduler = AmusedScheduler(mask_token_id=MASK, masking_schedule=schedule)
    scheduler.set_timesteps(steps, temperature)
    keys, ask = D.image_keys(KEY, BATCH), jax.jit(network)
    sample = torch.from_numpy(tokens.copy()).long()
    for i, timestep in enumerate(scheduler.timesteps):
        logits = np.array(ask(sample.numpy().astype(np.int32)))
        fold = jax.vmap(lambda key, n, i=i: jax.random.fold_in(jax.random.fold_in(key, i), n), (0, None))
        drawn = jax.vmap(jax.random.categorical)(fold(keys, 0), jnp.asarray(logits))
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, (LENGTH,)))(fold(keys, 1))
        drawn = torch.from_numpy(np.array(drawn)).long().reshape(-1, 1)
        monkeypatch.setattr(torch, "multinomial", lambda *a, drawn=drawn, **k: drawn)
        noise = torch.from_numpy(np.array(gumbel))
        monkeypatch.setattr(scheduling_amused, "gumbel_noise", lambda *a, noise=noise, **k: noise)
        sample = scheduler.step(torch.from_numpy(logits), timestep, sample, ratio, return_dict=False)[0]
    monkeypatch.undo()
    return sample.numpy()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("known", [0, 6])
def test_equal_tokens_to_diffusers(schedule, known, monkeypatch):
    tokens = start(known)
    for steps, temperature in ((1, (2, 0)), (4, (2, 0)), (11, (4.5, 0)), (7, (0.5, 0.1))):
        unmasking = D.make_unmasking(steps, schedule, temperature, max_steps=MAX_STEPS)
        ours = run(D.image_keys(KEY, BATCH), tokens, unmasking)[0]
        # Its share of unknown tokens is an argument, in our rule it is counted (as in MaskGIT).
        ratio = 1 - known / LENGTH
        theirs = reference_run(monkeypatch, tokens, steps, schedule, temperature, ratio)
        np.testing.assert_array_equal(ours, theirs)
        assert (theirs < VOCABULARY).all()


def test_diffusers_masks_known_tokens_and_stumbles_over_ties(monkeypatch):
    """Where nothing is unknown it masks one all the same; where all are equally sure it masks none."""
    scheduler = AmusedScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(4, (0, 0))
    full = torch.zeros(1, LENGTH, dtype=torch.long)
    sure = torch.full((1, LENGTH, VOCABULARY), -1e9)
    sure[..., 0] = 0
    theirs = scheduler.step(sure, scheduler.timesteps[0], full, return_dict=False)[0]
    assert (theirs == MASK).sum() == 0  # ties hide the bug: it would mask one
    scheduler.set_timesteps(4, (2, 0))
    torch.manual_seed(0)
    theirs = scheduler.step(sure, scheduler.timesteps[0], full, return_dict=False)[0]
    assert (theirs == MASK).sum() == 1
    known = np.zeros((BATCH, LENGTH), np.int32)
    np.testing.assert_array_equal(run(KEY, known, D.make_unmasking(4, max_steps=MAX_STEPS))[0], known)

    scheduler.set_timesteps(4, (0, 0))
    empty = torch.full((1, LENGTH), MASK)
    theirs = scheduler.step(sure, scheduler.timesteps[0], empty, return_dict=False)[0]
    assert (theirs == MASK).sum() == 0  # floor(16 cos(pi / 8)) = 14 were asked for

    def certain(tokens):
        first = jnp.arange(VOCABULARY) == 0
        return jnp.broadcast_to(jnp.where(first, 0.0, -1e9), (*tokens.shape, VOCABULARY))

    unmasking = D.make_unmasking(4, temperature=0.0)
    _, ours = D.sample_tokens(KEY, certain, start(), unmasking, mask_token=MASK, return_trajectory=True)
    assert ((ours[1] == MASK).sum(-1) == 14).all()


def test_diffusers_leaves_one_too_few_where_its_cosine_is_rounded():
    """16 cos(pi/3) is 8, and 7.9999995 in float32: so it is in step 8 of 12, aMUSEd's own number of steps."""
    scheduler = AmusedScheduler(mask_token_id=MASK)
    scheduler.set_timesteps(12, (2, 0))
    logits = torch.from_numpy(np.random.default_rng(0).standard_normal((1, LENGTH, VOCABULARY)))
    theirs = scheduler.step(
        logits.float(), scheduler.timesteps[7], torch.full((1, LENGTH), MASK), return_dict=False
    )
    assert (theirs[0] == MASK).sum() == 7
    _, trajectory = run(D.image_keys(KEY, BATCH), start(), D.make_unmasking(12, max_steps=MAX_STEPS))
    assert ((np.asarray(trajectory[8]) == MASK).sum(-1) == 8).all()


def chain():
    """p(tokens) of a Markov chain of 4 tokens of 3 values, [3, 3, 3, 3]."""
    generator = np.random.default_rng(2)
    first = generator.dirichlet(np.ones(3))
    moves = generator.dirichlet(0.6 * np.ones(3), size=3)
    joint = np.einsum("a,ab,bc,cd->abcd", first, moves, moves, moves)
    assert np.isclose(joint.sum(), 1)
    return joint


def exact_conditionals(joint):
    """tokens [B, 4] -> log p(token | all known tokens) [B, 4, 3], exactly."""
    length, values = joint.ndim, joint.shape[0]
    states = jnp.asarray(list(itertools.product(range(values), repeat=length)))  # [81, 4]
    table = jnp.asarray(joint.reshape(-1), jnp.float32)

    def conditionals(tokens):
        agrees = ((tokens[:, None] == states[None]) | (tokens[:, None] == values)).all(-1)
        weight = jnp.where(agrees, table[None], 0)
        is_value = (states[:, :, None] == jnp.arange(values)[None, None]).astype(jnp.float32)
        return jnp.log(jnp.einsum("bs,slv->blv", weight, is_value) + 1e-30)

    return conditionals


def test_one_token_a_step_in_random_order_draws_from_the_joint_distribution():
    joint, length, values, batch = chain(), 4, 3, 40_000
    conditionals = exact_conditionals(joint)
    # A temperature far above the confidences makes the order random.
    one_each = D.make_unmasking(length, "linear", temperature=1e4, max_steps=length)
    all_at_once = D.make_unmasking(1, max_steps=length)
    begin = jnp.full((batch, length), values)

    @jax.jit
    def histogram(key, unmasking):
        tokens = D.sample_tokens(key, conditionals, begin, unmasking, mask_token=values)
        return jnp.bincount(tokens @ (values ** jnp.arange(length - 1, -1, -1)), length=values**length)

    def chi_square(unmasking):
        counts = np.asarray(histogram(KEY, unmasking))
        expected = batch * joint.reshape(-1)
        often = expected > 5  # the rest is one cell
        counts, expected = (np.append(of[often], of[~often].sum()) for of in (counts, expected))
        return ((counts - expected) ** 2 / expected).sum(), often.sum()

    value, freedom = chi_square(one_each)
    assert value < freedom + 5 * math.sqrt(2 * freedom)
    # All at once draws each token from its own marginal: another distribution, which this test must see.
    value, freedom = chi_square(all_at_once)
    assert value > 20 * freedom


def test_the_loss_at_the_true_conditionals_is_their_entropy():
    """H(token | seen) by enumeration; its sum over the numbers of seen tokens is the joint's entropy."""
    joint, length, values = chain(), 4, 3
    conditionals = jax.jit(exact_conditionals(joint))
    states = np.array(list(itertools.product(range(values), repeat=length)))
    entropies = []  # of one masked token, the mean over all ways to mask k of them
    for count in range(1, length + 1):
        of_ways = []
        for places in itertools.combinations(range(length), count):
            seen = states.copy()
            seen[:, places] = values
            log_p = np.asarray(conditionals(seen) - jax.nn.logsumexp(conditionals(seen), -1, keepdims=True))
            own = np.take_along_axis(log_p, states[..., None], -1)[..., 0]
            of_ways.append(-(joint.reshape(-1)[:, None] * own)[:, list(places)].sum() / count)
        entropies.append(np.mean(of_ways))
    of_joint = -(joint * np.log(joint)).sum()
    assert np.sum(entropies) == pytest.approx(of_joint, rel=1e-5)  # the chain rule, mean over all orders

    # ceil(N cos(pi r / 2)) = k for r between 2 / pi arccos(k / N) and 2 / pi arccos((k - 1) / N).
    edges = 2 / np.pi * np.arccos(np.arange(length + 1) / length)
    share = -np.diff(edges) * np.arange(1, length + 1)
    tokens = jax.random.categorical(
        KEY, jnp.log(jnp.asarray(joint.reshape(-1), jnp.float32)), shape=(20_000,)
    )
    loss, metrics = D.masked_token_loss(
        KEY,
        lambda tokens, _: conditionals(tokens),
        jnp.asarray(states)[tokens],
        mask_token=values,
        label_smoothing=0.0,
    )
    assert float(loss) == pytest.approx((share * entropies).sum() / share.sum(), rel=0.02)
    assert float(metrics["cross_entropy"]) == pytest.approx(float(loss), rel=1e-6)


def test_an_image_depends_on_its_own_key_and_nothing_compiles_again():
    traces = []

    @jax.jit
    def draw(keys, tokens, unmasking, scale):
        traces.append(1)
        logits = D.guided_logits(network, jnp.linspace(0.2, 2, BATCH), 0.0, scale)
        return D.sample_tokens(keys, logits, tokens, unmasking, mask_token=MASK)

    keys, order = D.image_keys(KEY, BATCH), jnp.array([3, 1, 0, 2])
    tokens = start(3)
    first = run(keys, tokens, D.make_unmasking(6, max_steps=MAX_STEPS))[0]
    shuffled = run(keys[order], tokens[order], D.make_unmasking(6, max_steps=MAX_STEPS))[0]
    np.testing.assert_array_equal(shuffled, first[order])
    assert (first[0] != first[1]).any()
    one = draw(keys, tokens, D.make_unmasking(6, max_steps=MAX_STEPS), jnp.array([3.0, 3.0, 3.0, 3.0]))
    other = draw(
        keys[order], tokens, D.make_unmasking(9, "square", 0.5, MAX_STEPS), jnp.array([0.0, 1.0, 2.0, 3.0])
    )
    assert len(traces) == 1 and (one != other).any()


def test_guidance_on_logits():
    condition, tokens = jnp.linspace(0.2, 2, BATCH), jnp.asarray(start(9))
    conditional, unconditional = network(tokens, condition), network(tokens, jnp.zeros(BATCH))
    for scale in (0.0, 1.0, 10.0, jnp.array([0.0, 1.0, 2.0, 10.0])):
        w = jnp.asarray(scale).reshape(-1, 1, 1)
        expected = unconditional + w * (conditional - unconditional)
        for asked in (scale, jnp.asarray(scale)):
            logits = D.guided_logits(network, condition, 0.0, asked)(tokens)
            np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    sizes = []
    both = D.guided_logits(network, condition, 0.0, jnp.ones(()), cond_only_at_1=False)(tokens)
    np.testing.assert_allclose(both, conditional, rtol=1e-4, atol=1e-4)

    def spy(tokens, condition):
        jax.debug.callback(lambda size: sizes.append(int(size)), len(tokens))
        return network(tokens, condition)

    for scale, size in (
        (1.0, BATCH),
        (jnp.ones(BATCH), BATCH),
        (2.0, 2 * BATCH),
        (jnp.arange(4.0), 2 * BATCH),
    ):
        D.guided_logits(spy, condition, 0.0, scale)(tokens)
        jax.effects_barrier()
        assert sizes == [size] and not sizes.clear()


def test_images_of_tokens_and_a_logit_for_the_mask():
    def with_mask_logit(tokens):
        return jnp.zeros((*tokens.shape, VOCABULARY + 1)).at[..., MASK].set(50.0)

    seen, told = [], []
    tokens = D.sample_tokens(
        KEY, with_mask_logit, jnp.full((2, 4, 4), MASK), D.make_unmasking(5), mask_token=MASK,
        callback=lambda done, tokens: seen.append(int(done)),
        progress=lambda done, total: told.append((int(done), int(total))),
    )  # fmt: skip
    jax.effects_barrier()
    assert tokens.shape == (2, 4, 4) and (tokens < MASK).all() and sorted(seen) == [1, 2, 3, 4, 5]
    assert sorted(told) == [(done, 5) for done in range(1, 6)]


def test_a_part_of_the_steps_starts_where_the_steps_before_it_end():
    whole, last = D.make_unmasking(10, max_steps=12), D.make_unmasking(10, max_steps=12, strength=0.35)
    assert last.num_steps == 3 and whole.start == 1 and last.start == whole.fraction[6]
    np.testing.assert_array_equal(last.fraction[:4], whole.fraction[7:11])
    np.testing.assert_array_equal(last.temperature[:3], whole.temperature[7:10])
    assert D.make_unmasking(12).fraction.shape == (12,)


def test_a_start_that_lost_tokens_by_chance_is_unmasked_by_the_schedule_of_all():
    tokens = jax.random.randint(KEY, (BATCH, LENGTH), 0, VOCABULARY)
    for share, lost in ((0.0, 0), (1.0, LENGTH)):
        assert ((D.mask_by_chance(KEY, tokens, share, MASK) == MASK).sum(1) == lost).all()
    many = D.mask_by_chance(KEY, jnp.zeros((4000, LENGTH), jnp.int32), 0.3, MASK) == MASK
    assert abs(many.mean() - 0.3) < 0.01 and many.sum(1).min() < 3 and many.sum(1).max() > 8

    unmasking = D.make_unmasking(8, max_steps=MAX_STEPS, strength=0.75)  # starts from cos(pi / 8) of all
    begin = D.mask_by_chance(KEY, tokens, unmasking.start, MASK)
    draw = jax.jit(
        lambda unmasking: D.sample_tokens(
            KEY, network, begin, unmasking, mask_token=MASK, total=LENGTH, return_trajectory=True
        )[1]
    )
    left = (np.asarray(draw(unmasking)) == MASK).sum(-1)
    asked = [math.floor(LENGTH * math.cos(math.pi / 2 * r / 8)) for r in range(3, 8)]
    for image in range(BATCH):
        still = left[0, image]
        for count, number in zip([*asked, 0], left[1:, image], strict=False):
            still = max(1, min(count, still - 1)) if count else 0
            assert number == still
    assert (np.asarray(draw(unmasking))[-1] != MASK).all()


@given(schedule=st.sampled_from(sorted(D.MASK_SCHEDULES)), r=st.floats(0, 1))
def test_mask_schedules_fall_from_one_to_zero(schedule, r):
    fractions = D.mask_fraction(schedule, np.array([0.0, r, min(r + 0.05, 1), 1.0]))
    assert fractions[0] == 1 and fractions[-1] == pytest.approx(0, abs=1e-15)
    assert (np.diff(fractions) <= 0).all()
    np.testing.assert_allclose(D.mask_fraction(schedule, jnp.float32(r)), fractions[1], atol=1e-3)


def test_every_example_masks_its_own_share():
    tokens = jax.random.randint(KEY, (4000, 4, 4), 0, VOCABULARY)
    draw = jax.jit(D.mask_tokens, static_argnums=(2, 3))
    seen, masked = (np.asarray(value) for value in draw(KEY, tokens, MASK, "cosine"))
    np.testing.assert_array_equal(seen, np.where(masked, MASK, tokens))
    counts = masked.reshape(4000, -1).sum(1)
    assert counts.min() == 1 and counts.max() == LENGTH
    # r is uniform, so P(count <= k) = P(cos(pi r / 2) <= k / N) = 1 - 2 / pi arccos(k / N).
    for k in (1, 4, 8, 12, 15):
        assert (counts <= k).mean() == pytest.approx(1 - 2 / np.pi * np.arccos(k / LENGTH), abs=0.03)
    np.testing.assert_allclose(masked.mean(0), 2 / np.pi + 0.5 / LENGTH, atol=0.04)  # every place alike


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_torchs_cross_entropy_over_masked_tokens(smoothing):
    tokens = jax.random.randint(KEY, (BATCH, LENGTH), 0, VOCABULARY)
    seen = {}

    def spy(tokens, condition):
        seen["tokens"], seen["logits"] = tokens, network(tokens, condition)
        return seen["logits"].astype(jnp.bfloat16)

    loss, metrics = D.masked_token_loss(
        KEY, spy, tokens, jnp.ones(BATCH), mask_token=MASK, label_smoothing=smoothing
    )
    assert loss.dtype == jnp.float32
    masked = np.asarray(seen["tokens"]) == MASK
    np.testing.assert_array_equal(np.asarray(seen["tokens"])[~masked], np.asarray(tokens)[~masked])
    logits = torch.from_numpy(np.array(seen["logits"].astype(jnp.bfloat16).astype(jnp.float32))[masked])
    labels = torch.from_numpy(np.array(tokens)[masked]).long()
    for value, amount in ((loss, smoothing), (metrics["cross_entropy"], 0.0)):
        expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=amount)
        assert float(value) == pytest.approx(float(expected), rel=1e-5)
    accuracy = (logits.argmax(-1) == labels).float().mean()
    assert float(metrics["accuracy"]) == pytest.approx(float(accuracy), rel=1e-5)


def test_seen_tokens_cost_nothing_and_conditions_are_dropped():
    tokens = jax.random.randint(KEY, (BATCH, LENGTH), 0, VOCABULARY)
    seen = []

    def loss(shift, dropout):
        def shifted(tokens, condition):
            seen.append(condition)
            where_seen = jnp.where(tokens == MASK, 0, shift)[..., None]
            return network(tokens, condition) + where_seen * jnp.arange(8.0)[None, None]

        return D.masked_token_loss(
            KEY,
            shifted,
            tokens,
            jnp.ones(BATCH),
            mask_token=MASK,
            null_condition=0.0,
            condition_dropout=dropout,
        )[0]

    assert jax.grad(loss)(0.5, 0.0) == 0
    assert not np.allclose(loss(0.5, 0.0), loss(0.5, 1.0))
    np.testing.assert_array_equal(seen[-1], 0)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: D.make_unmasking(0), "at least 1"),
        (lambda: D.make_unmasking(9, max_steps=8), "max_steps"),
        (lambda: D.make_unmasking(4, strength=0), "strength must be a number in"),
        (lambda: D.make_unmasking(4, strength=0.2), "leaves none: take 5 or more"),
        (lambda: D.make_unmasking(4, temperature=-1.0), "temperature"),
        (lambda: D.make_unmasking(4, temperature=(1.0, np.nan)), "temperature"),
        (lambda: D.make_unmasking(4, temperature=(1.0, 2.0, 3.0)), "temperature"),
        (lambda: D.guided_logits(network, jnp.ones(2), 0.0, np.nan), "guidance_scale"),
        (lambda: D.guided_logits(network, jnp.ones(2), jnp.ones(3), 2.0), "broadcast"),
        (
            lambda: D.masked_token_loss(KEY, network, start(), mask_token=MASK, label_smoothing=1.0),
            "label_smoothing",
        ),
        (
            lambda: D.masked_token_loss(KEY, network, start(), mask_token=MASK, condition_dropout=0.1),
            "null_condition",
        ),
    ],
)
def test_impossible_requests_are_refused(call, words):
    with pytest.raises(InvalidArgumentError, match=words):
        call()


def test_unknown_schedules_and_odd_logits():
    with pytest.raises(UnknownNameError, match="cosine"):
        D.make_unmasking(4, "cosin")
    with pytest.raises(InvalidArgumentError, match="logits"):
        D.sample_tokens(KEY, lambda tokens: tokens, start(), D.make_unmasking(4), mask_token=MASK)
