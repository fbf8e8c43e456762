"""The losses of the methods on data of one point for each class, of which every student is known exactly."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from points import BATCH, FLOW, GUIDED, POINTS, V, batch_of, network, setting, teacher_of

from jaxldm import diffusion as D
from jaxldm import models
from jaxldm.errors import InvalidArgumentError, UnknownNameError
from jaxldm.training import (
    RECIPES,
    DiffusionRecipe,
    FewStepsRecipe,
    LoraRecipe,
    Player,
    create_train_state,
    make_mesh,
    make_train_step,
)
from jaxldm.training.few_steps import networks
from jaxldm.training.few_steps.matching import times_of
from jaxldm.training.few_steps.method import TABLE, TEACHER
from jaxldm.training.few_steps.methods import METHODS, taught
from jaxldm.training.few_steps.networks import critic_module, critic_network, first_params, of_adapter
from jaxldm.training.stages import Job, make_optimizer
from jaxldm.training.train import in_rounds


def losses_of(own):
    """(student, batch, step) -> of each player the loss, with the student everywhere, and its gradient."""
    made = METHODS[own[0]].make_loss(own[1])
    players = [Player("student", made, own[1].optimizer)] if callable(made) else made

    @jax.jit
    def of_all(student, state, batch):
        def of(player):
            return jax.value_and_grad(lambda p: player.loss(p, state, batch, jax.random.key(4))[0])(student)

        return [of(player) for player in players]

    def losses(student, batch, step=0):
        params = {player.name: student for player in players}
        state = create_train_state(jax.random.key(0), params, players, frozen={TEACHER: teacher_of()})
        if callable(made):
            state = state.replace(params=student, ema_params=student)
        return of_all(student, state.replace(step=jnp.int32(step)), batch)

    return losses


@pytest.mark.parametrize("name", [name for name in METHODS if name != "drifting"])
def test_a_student_that_knows_the_points_has_no_loss_and_another_has(name):
    scale = 3.0 if name in GUIDED and name != "guidance" else 1.0
    scales = (1.0, 4.0) if name == "guidance" else (scale, scale)
    losses = losses_of((name, setting(name, scales)))
    student = teacher_of(scale, gain=float(name == "guidance"))
    found = losses(student, batch_of(scale))
    for value, gradient in found[1:] if name == "dmd" else found:  # its unit is the distance of the points: 0
        assert value < 1e-5
        assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 2e-2
    wrong = {**student, "late": jnp.asarray(0.4)}  # a wrong point at all times would be consistent
    value, gradient = losses(wrong, batch_of(scale))[0]
    assert value > 1e-3 and float(jnp.abs(gradient["late"])) > 1e-3


ASKED = {"progressive": 2, "guidance": 2, "lcm": 1, "cd": 2, "ect": 0, "scm": 1, "reflow": 0, "dmd": 1}


@pytest.mark.parametrize(("name", "prediction"), [*((name, V) for name in ASKED), ("cd", FLOW)])
def test_a_teacher_is_asked_as_often_as_its_method_says(name, prediction):
    """On a path that ends in pure noise, too, a step of consistency distillation is Heun's."""
    own, asked, teacher = setting(name, (1.0, 2.0) if name == "guidance" else (1.0, 1.0)), [], teacher_of()

    def counted(params, x, t, condition):
        asked.append(params is teacher)
        return network(prediction, params, x, t, condition)

    made = METHODS[name].make_loss(own._replace(network=counted, prediction=prediction))
    players = [Player("student", made, own.optimizer)] if callable(made) else made
    params = {player.name: teacher_of(2.0) for player in players}
    state = create_train_state(jax.random.key(0), params, players, frozen={TEACHER: teacher_of()})
    if callable(made):
        state = state.replace(params=params["student"], ema_params=params["student"])
    state = state.replace(frozen={TEACHER: teacher})
    jax.eval_shape(lambda x: players[0].loss(params["student"], state, batch_of(), x), jax.random.key(4))
    assert sum(asked) == ASKED[name] and len(asked) > sum(asked)


def test_drifting_pushes_the_images_of_a_class_towards_its_data():
    loss = METHODS["drifting"].make_loss(setting("drifting", images=4))
    spread = 0.1 * jax.random.normal(jax.random.key(1), (2, 5, 2, 2, 1))
    table = POINTS[:2].reshape(2, 1, 1, 1, 1) + spread
    student = {**teacher_of(), "points": jnp.zeros(3)}
    state = create_train_state(
        jax.random.key(0), student, setting("drifting").optimizer, frozen={TABLE: table}
    )
    of = jax.jit(jax.grad(lambda params: loss(params, state, batch_of(), jax.random.key(4))[0]))
    downhill = -of(student)["points"]
    assert downhill[0] < -0.1 and downhill[1] > 0.1 and downhill[2] == 0  # to -1 and 0.5


@pytest.mark.parametrize("name", [name for name in GUIDED if name not in ("guidance", "reflow", "dmd")])
def test_a_student_that_takes_the_scale_has_that_of_its_input_inside(name):
    losses = losses_of((name, setting(name, (1.0, 4.0))))
    value, _ = losses(teacher_of(gain=1.0), batch_of())[0]
    deaf, _ = losses(teacher_of(), batch_of())[0]
    # What is wrong by the same everywhere is consistent, but for its end.
    assert value < 1e-5 and (deaf > 1e-2 or name in ("lcm", "cd"))


def test_the_teacher_of_a_second_round_has_the_guidance_inside():
    own = "progressive", setting("progressive", (3.0, 3.0))
    losses = losses_of(own)
    first, second = (losses(teacher_of(3.0), batch_of(3.0), step)[0][0] for step in (0, 4))
    assert first < 1e-5 and second > 1e-2  # the frozen points are not guided yet
    job = Job(lambda key: None, print, {}, print, rounds=2, next_round=METHODS["progressive"].next_round)
    step = in_rounds(make_train_step(METHODS["progressive"].make_loss(own[1]), own[1].optimizer, 0.9), job, 8)
    state = create_train_state(
        jax.random.key(0), teacher_of(3.0), own[1].optimizer, frozen={TEACHER: teacher_of()}
    )
    step = jax.jit(step)
    for number in range(1, 9):
        before = state
        state, metrics = step(state, batch_of(3.0))
        same = np.array_equal(state.frozen[TEACHER]["points"], before.frozen[TEACHER]["points"])
        assert same == (number != 4)
        assert metrics["loss"] < 1e-2
    np.testing.assert_allclose(state.frozen[TEACHER]["points"][:2], teacher_of(3.0)["points"][:2], atol=2e-2)


def test_the_generator_and_its_critic_take_turns():
    players = METHODS["dmd"].make_loss(setting("dmd", critic_updates=2))
    params = {player.name: teacher_of(2.0) for player in players}
    state = create_train_state(jax.random.key(0), params, players, frozen={TEACHER: teacher_of()})
    step, moved = jax.jit(make_train_step(players)), []
    for _ in range(4):
        before = state
        state, metrics = step(state, batch_of())
        moved.append(
            [
                not np.array_equal(state.params[name]["points"], before.params[name]["points"])
                for name in ("student", "critic")
            ]
        )
        assert np.array_equal(state.frozen[TEACHER]["points"], POINTS)
    assert moved == [[True, True], [False, True]] * 2
    assert {"gradient", "critic_mse"} <= set(metrics)


def test_a_generator_that_moves_now_and_then_has_the_rates_of_the_whole_training():
    recipe = DiffusionRecipe(preset="mini-unet", epochs=10, batch_size=4, warmup_epochs=2, learning_rate=1e-2)
    mesh = make_mesh(1)
    always, plan = make_optimizer(recipe, 40, mesh)
    seldom, same = make_optimizer(recipe, 40, mesh, every=5, share=0.5)
    assert plan == same and plan.num_steps == 100
    turns = np.arange(4, 20)
    own, whole = (jax.vmap(adam.learning_rate) for adam in (seldom, always))
    np.testing.assert_allclose(own(turns), whole(5 * turns) / 2, rtol=1e-5)
    made = METHODS["dmd"].make_loss(
        setting("dmd", critic_updates=5, generator_rate=0.5)._replace(
            optimizer_of=lambda every, share: make_optimizer(recipe, 40, mesh, every=every, share=share)[0]
        )
    )
    generator, critic = made
    assert generator.every == 5
    np.testing.assert_allclose(generator.optimizer.learning_rate(10), whole(np.array([50]))[0] / 2, rtol=1e-5)
    np.testing.assert_allclose(critic.optimizer.learning_rate(50), whole(np.array([50]))[0], rtol=1e-5)


def test_a_critic_of_several_steps_knows_which_of_them_drew_what_it_sees():
    seen = {"generator": set(), "critic": set()}

    def critic(params, x, t, condition, began):
        jax.debug.callback(lambda began, times=seen[kind]: times.update(np.unique(began).tolist()), began)
        assert began.shape == condition.shape == (BATCH,)
        return network(V, params, x, t, condition)

    own = setting("dmd")._replace(critic=critic)
    players = METHODS["dmd"].make_loss(own)
    params = {player.name: teacher_of(2.0) for player in players}
    state = create_train_state(jax.random.key(0), params, players, frozen={TEACHER: teacher_of()})
    for kind, player in zip(seen, players, strict=True):  # noqa: B007 (the critic reads it as it is traced)
        loss = jax.jit(lambda key, player=player: player.loss(params[player.name], state, batch_of(), key))
        for key in jax.random.split(jax.random.key(0), 5):
            loss(key)
    jax.effects_barrier()
    for times in seen.values():
        assert len(times) > 1 and times <= set(times_of(own.path, 4).tolist())


@pytest.mark.parametrize("kind", ["tiny-dit", "sd15-unet", "scale and step"])
def test_a_critic_begins_as_the_teacher_whatever_the_step(kind, monkeypatch):
    """Its further input says nothing at first, and something once it is trained."""
    unet = {"block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",), "norm_num_groups": 4}
    unet |= {
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
        "layers_per_block": 1,
        "sample_size": 4,
    }
    unet |= {"attention_head_dim": 2, "cross_attention_dim": 4}
    dit = {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 2, "sample_size": 4, "num_classes": 3}
    preset, sizes = ("tiny-dit", dit) if kind == "tiny-dit" else ("sd15-unet", unet)
    wide = {"time_cond_proj_dim": 256} if kind == "scale and step" else {}
    teacher, module = models.build(preset, **sizes), models.build(preset, **sizes, **wide)
    params = models.init(teacher, jax.random.key(0))
    monkeypatch.setattr(
        networks, "begin_as_teacher", lambda few, module, key, place: models.init_from(module, key, params)
    )
    few = FewStepsRecipe(method="dmd", teacher="x", num_steps=2)
    critic = critic_module(few, module)
    assert critic_module(dataclasses.replace(few, num_steps=1), module) is None
    own = first_params(few, module, params, ["student", "critic"], jax.random.key(1))
    assert own["student"] is params and own["critic"] is not params
    x, t = jax.random.normal(jax.random.key(2), (2, 4, 4, teacher.config.in_channels)), jnp.full(2, 500.0)
    condition = {"labels": jnp.array([0, 1])}
    if kind != "tiny-dit":
        condition = {"encoder_hidden_states": jax.random.normal(jax.random.key(3), (2, 3, 4))}
    further = {"timestep_cond": models.guidance_embedding(t / 100, 256)} if wide else {}
    call = jax.jit(critic_network(critic, 1000.0))
    given = {**condition, **further}
    expected = jax.jit(models.network(teacher))(params, x, t, condition)
    np.testing.assert_allclose(
        call(own["critic"], x, t, given, jnp.array([999.0, 249.0])), expected, atol=1e-5
    )
    rng = np.random.default_rng(4)
    moved = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32),
        jax.device_get(own["critic"]),
    )
    late, early = (call(moved, x, t, given, jnp.full(2, began)) for began in (999.0, 249.0))
    assert jnp.abs(late - early).max() > 1e-3


def test_the_loss_of_an_adapter_is_that_of_the_network_with_it():
    own, lora = setting("lcm", (3.0, 3.0)), LoraRecipe(rank=1, alpha=2.0, targets=("*",))
    base = {"layer": {"kernel": jnp.eye(2)}}
    seen = []

    def loss(params, state, batch, key):
        seen.append((params, state.ema_params, state.frozen))
        return jnp.sum(params["layer"]["kernel"] ** 2), {}

    down, up = jnp.array([[1.0], [0.0]]), jnp.array([[0.0, 1.0]])
    adapter = {"layer": {"lora_A": {"kernel": down}, "lora_B": {"kernel": up}}}
    average = {"layer": {"lora_A": {"kernel": down}, "lora_B": {"kernel": 2 * up}}}
    state = create_train_state(jax.random.key(0), adapter, own.optimizer, frozen={TEACHER: base})
    state = state.replace(ema_params=average)
    of = jax.grad(lambda params: of_adapter(loss, lora)(params, state, {}, jax.random.key(0))[0])
    gradient = of(adapter)
    (whole, still, frozen), *_ = seen
    np.testing.assert_allclose(still["layer"]["kernel"], [[1, 4], [0, 1]])
    np.testing.assert_array_equal(frozen[TEACHER]["layer"]["kernel"], jnp.eye(2))
    assert jax.tree.structure(gradient) == jax.tree.structure(adapter)
    np.testing.assert_allclose(gradient["layer"]["lora_B"]["kernel"], [[4, 8]])  # d/dB of |1 + 2 A B|^2
    without = state.replace(ema_params=None)
    assert of_adapter(loss, lora)(adapter, without, {}, jax.random.key(0))[0] == 6
    assert seen[-1][1] is None and whole is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"method": "dmd", "lora": LoraRecipe()},
            "dmd trains more than one network.*lcm, cd, ect, scm, reflow",
        ),
        ({"method": "progressive", "lora": LoraRecipe()}, "takes no --rank"),
        ({"method": "lcm", "guidance_scale": (1.0, 3.0), "lora": LoraRecipe()}, "give one scale"),
        ({"method": "lcm", "num_steps": 4}, "--num-steps has no effect on lcm"),
        ({"method": "ect", "guidance_scale": (3.0, 3.0)}, "--guidance-scale is not for ect"),
        ({"method": "guidance", "guidance_scale": (3.0, 3.0)}, "for a range of scales, got 3 alone"),
        ({"method": "lcm", "guidance_scale": (4.0, 3.0)}, "the lowest and the highest, got 4 and 3"),
        ({"method": "lcm", "guidance_scale": (-1.0, 3.0)}, "guidance_scale must be"),
        ({"method": "dmd", "num_steps": 0}, "num_steps must be"),
        ({"method": "cd", "numbers": {"levels": 2.5}}, "levels must be a whole number"),
        ({"method": "cd", "numbers": {"huber": -1.0}}, "huber must be"),
        ({"method": "cd", "numbers": {"levels": 1}}, "levels must be a whole number from 2 to"),
        ({"method": "ect", "numbers": {"q": 1.0}}, "q must be"),
        ({"method": "ect", "numbers": {"std": 0.0}}, "std must be"),
        ({"method": "scm", "numbers": {"warmup": 2.0}}, "warmup must be"),
        ({"method": "reflow", "numbers": {"ends": 100.0}}, "ends must be"),
        ({"method": "reflow", "numbers": {"pairs": 1e13}}, "pairs must be a whole number from 1 to"),
        ({"method": "progressive", "numbers": {"start_steps": 1e12}}, "start_steps must be"),
        ({"method": "mean_flow", "teacher": None, "numbers": {"kappa": 1.0}}, "kappa must be"),
        ({"method": "shortcut", "teacher": None, "numbers": {"smallest": 6}}, "smallest must be 2, 4, 8, 16"),
        ({"method": "cd", "teacher": None}, "cd learns from a teacher"),
        ({"method": "ict"}, "ict has no teacher"),
    ],
)
def test_a_recipe_refuses_what_a_method_cannot(changes, words):
    with pytest.raises(InvalidArgumentError, match=words):
        FewStepsRecipe(**{"teacher": "x", **changes})


@pytest.mark.parametrize("name", METHODS)
def test_every_number_has_limits_which_its_own_value_is_in(name):
    method = METHODS[name]
    assert method.limits.keys() == method.numbers.keys()
    for number, value in method.numbers.items():
        assert method.limits[number](number, value) == value
        for wrong in (-30.0, math.nan, 1e39):
            with pytest.raises(InvalidArgumentError, match=f"{number} must be"):
                method.limits[number](number, wrong)


def test_methods_without_a_teacher_are_no_distillation():
    for name, method in METHODS.items():
        for spelled in {name, name.replace("_", "-")}:
            if method.taught:
                assert taught(name) is method
                continue
            with pytest.raises(InvalidArgumentError, match="has no teacher") as error:
                taught(spelled)
            recipe = re.search("`jaxldm train (.+?)`", str(error.value))[1]
            assert RECIPES[recipe].diffusion.few_steps.method == name


def test_unknown_names_are_refused():
    with pytest.raises(UnknownNameError, match="method"):
        FewStepsRecipe(teacher="x", method="lcn")
    with pytest.raises(UnknownNameError, match="number of lcm"):
        FewStepsRecipe(teacher="x", method="lcm", numbers={"hubber": 1.0})


def checked_by(name, prediction, num_steps=None, **numbers):
    teacher = "x" if METHODS[name].taught else None
    recipe = FewStepsRecipe(method=name, teacher=teacher, num_steps=num_steps, numbers=numbers)
    METHODS[name].check(prediction, recipe.num_steps, recipe.numbers)


def test_steps_that_do_not_come_out_by_halving_are_refused():
    for num_steps in (1, 2, 4, 8):
        checked_by("progressive", V, num_steps)
    for num_steps, start in ((3, 16), (16, 16), (3, 20), (8, 20), (4, 7)):
        with pytest.raises(InvalidArgumentError, match="halves the steps"):
            checked_by("progressive", V, num_steps, start_steps=start)
    checked_by("progressive", V, 5, start_steps=20)
    with pytest.raises(InvalidArgumentError, match="start_steps must be at most the 1000 timesteps"):
        checked_by("progressive", V, 1, start_steps=1024)
    checked_by("reflow", V, teacher_steps=1000)
    with pytest.raises(InvalidArgumentError, match="teacher_steps must be at most the 1000 timesteps"):
        checked_by("reflow", V, teacher_steps=1001)


def test_pairs_of_easy_tuning_stay_apart_in_float32():
    checked_by("ect", V, q=2.0, stages=16)
    with pytest.raises(InvalidArgumentError, match=r"q \*\* stages .* at most 65536, got 2 \*\* 17"):
        checked_by("ect", V, q=2.0, stages=17)


def test_teachers_that_a_method_cannot_take_are_refused():
    weak, path = D.epsilon(D.VP.named("cosine")), D.VP.named("linear")
    for name in ("progressive", "lcm", "cd", "ect", "scm", "reflow", "dmd"):
        with pytest.raises(InvalidArgumentError, match="leaves the image undefined at the noisy end"):
            checked_by(name, weak)
        checked_by(name, D.epsilon(path))
    checked_by("guidance", weak)
    for name in ("progressive", "guidance", "reflow", "dmd"):  # those that the message names
        checked_by(name, D.x0(path))
    for name in ("lcm", "cd", "ect", "scm"):
        with pytest.raises(InvalidArgumentError, match="the method progressive, guidance, reflow or dmd"):
            checked_by(name, D.x0(path))
    with pytest.raises(InvalidArgumentError, match="num_steps must be 1"):
        checked_by("drifting", FLOW, 2)
    checked_by("drifting", FLOW, 1)
    for collapsing in (V, D.x0(path), D.epsilon(path)):
        with pytest.raises(InvalidArgumentError, match="what a network of zeros draws"):
            checked_by("drifting", collapsing, 1)
    with pytest.raises(InvalidArgumentError, match="counts timesteps"):
        checked_by("lcm", D.flow(D.Flow()))
    checked_by("cd", D.flow(D.Flow()))
    for name in ("mean_flow", "shortcut"):
        checked_by(name, FLOW)
        with pytest.raises(InvalidArgumentError, match="velocities on the straight path"):
            checked_by(name, V)


def test_a_recipe_says_all_its_numbers():
    recipe = FewStepsRecipe(method="ect", teacher="runs/a", numbers={"q": 2.0})
    assert recipe.numbers == {**METHODS["ect"].numbers, "q": 2.0}
    assert dataclasses.replace(recipe, numbers=recipe.numbers) == recipe
    assert not recipe.takes_scale and FewStepsRecipe(method="guidance", teacher="x").takes_scale
