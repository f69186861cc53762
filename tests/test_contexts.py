import itertools
import json

import dmc  # first: it chooses the OpenGL backend before anything imports mujoco

# isort: split
import mujoco
import numpy as np
import pytest
from dm_control import suite
from fakes import SCENERY, kind_of

import contexts
from utils import UserError

DOMAINS = sorted({domain for domain, _ in suite.ALL_TASKS})


def only(*names: str) -> dict:
    return {name: {**SCENERY[name], 'enabled': name in names} for name in SCENERY}


def draw(seed: int, scenery=SCENERY, kind='seen') -> np.ndarray:
    return contexts.Scenery(scenery).sample(np.random.default_rng(seed), kind)


def load(name: str, scenery=SCENERY):
    env = suite.load(*dmc.split_name(name), task_kwargs={'random': 1})
    env.reset()
    return env, contexts.Painter(env.physics.model.ptr, contexts.Scenery(scenery), 0)


def to_bytes(model: mujoco.MjModel) -> np.ndarray:
    """Every field of the model, as it would be written to disk."""
    buffer = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, buffer)
    return buffer


def arrange(env, painter, context) -> mujoco.MjvScene:
    """Return the scene that dmc.Camera draws, without OpenGL."""
    model, view = env.physics.model.ptr, mujoco.MjvCamera()
    view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, 0
    scene = mujoco.MjvScene(model, maxgeom=1000)
    mujoco.mjv_updateScene(model, env.physics.data.ptr, mujoco.MjvOption(), None, view,
                           mujoco.mjtCatBit.mjCAT_ALL, scene)
    painter.dress(context, scene)
    return scene


def colours(env, scene) -> dict[str, np.ndarray]:
    """Return the RGB of a scene's named geoms."""
    return {env.physics.model.id2name(geom.objid, 'geom'): geom.rgba[:3].copy()
            for geom in scene.geoms[:scene.ngeom] if geom.objtype == mujoco.mjtObj.mjOBJ_GEOM}


@pytest.fixture
def uploads(monkeypatch) -> dict[str, np.ndarray]:
    """Return the textures that OpenGL is given: name -> pixels (height, width, 3)."""
    given = {}

    def upload(model, gpu, index):
        texture = model.tex(index)
        shape = int(texture.height[0]), int(texture.width[0]), 3
        start = int(texture.adr[0])
        given[texture.name] = model.tex_data[start:start + np.prod(shape)].reshape(shape).copy()
    monkeypatch.setattr(mujoco, 'mjr_uploadTexture', upload)
    return given


@pytest.mark.parametrize('domain', DOMAINS)
def test_a_context_dresses_the_scene_of_every_task_and_never_changes_its_model(domain, uploads):
    for _, task in [names for names in suite.ALL_TASKS if names[0] == domain]:
        env, painter = load(f'{domain}_{task}')
        model = env.physics.model.ptr
        before, plain = to_bytes(model), colours(env, arrange(env, painter, None))
        for seed in range(2):
            painter.upload(draw(seed), None)
            painted = colours(env, arrange(env, painter, draw(seed)))
            assert any((painted[name] != plain[name]).any() for name in plain), task
            assert np.array_equal(to_bytes(model), before), task
        assert {'grid', 'skybox'} <= set(uploads), task


def test_what_a_context_means_is_a_function_of_context_scenery_and_model():
    env, _ = load('finger_turn_hard')
    model = env.physics.model.ptr
    before, scenery = to_bytes(model), contexts.Scenery(SCENERY)
    looks = [contexts.look(draw(seed), scenery, contexts.Stage(model, scenery.names, 0))
             for seed in (0, 0, 1)]
    one, again, other = ([*look.colours, *look.textures.values(), *look.light, *look.camera]
                         for look in looks)
    assert all(np.array_equal(a, b) for a, b in zip(one, again, strict=True))
    assert not np.array_equal(one[0], other[0])
    assert np.array_equal(to_bytes(model), before)


def test_a_texture_without_room_for_ours_stays_as_it_is(uploads):
    model = mujoco.MjModel.from_xml_string('''<mujoco><asset>
        <texture name="small" type="2d" builtin="checker" width="32" height="32"/>
        <texture name="grid" type="2d" builtin="checker" width="64" height="64"/>
        <texture name="skybox" type="skybox" builtin="flat" width="8" height="8"/>
        <material name="small" texture="small"/><material name="grid" texture="grid"/>
        </asset><worldbody><camera name="fixed" pos="0 0 3"/>
        <geom type="plane" size="1 1 1" material="small"/>
        <geom type="plane" size="1 1 1" material="grid"/></worldbody></mujoco>''')
    painter, before = contexts.Painter(model, contexts.Scenery(SCENERY), 0), to_bytes(model)
    painter.upload(draw(0), None)
    assert set(uploads) == {'grid'} and np.array_equal(to_bytes(model), before)


def test_every_switch_moves_its_own_factor_and_nothing_else(uploads):
    def observe(context) -> dict:
        uploads.clear()
        painter.upload(context, None)
        scene = arrange(env, painter, context)
        parts = colours(env, scene)
        return {'body': np.stack([parts[name] for name in ('arm', 'finger', 'root')]),
                'target': parts['target'],
                'floor': uploads.get('grid', np.zeros(0)),
                'sky': uploads.get('skybox', np.zeros(0)),
                'light': np.concatenate([[*light.diffuse, *light.ambient, *light.dir, *light.pos]
                                         for light in scene.lights[:scene.nlight]]),
                'camera': np.concatenate([[*camera.pos, *camera.up, *camera.forward]
                                          for camera in scene.camera]),
                'distractors': np.array([geom.pos for geom in scene.geoms[:scene.ngeom]])}

    for factor in SCENERY:
        env, painter = load('reacher_easy', only(factor))
        plain, painted = observe(None), observe(draw(1))
        assert {name for name in plain if not np.array_equal(plain[name], painted[name])
                } == {factor}


def test_distractors_are_there_in_a_context_only():
    scenery = only('distractors')
    scenery['distractors']['count'] = [4, 4]
    env, painter = load('walker_walk', scenery)
    assert arrange(env, painter, draw(0)).ngeom == arrange(env, painter, None).ngeom + 4


def test_distractors_stand_still_but_come_by_again_under_a_travelling_camera():
    scenery = only('distractors')
    scenery['distractors']['count'] = [4, 4]
    env, painter = load('cheetah_run', scenery)

    def shapes(x: float) -> np.ndarray:
        env.physics.named.data.qpos['rootx'] = x
        env.physics.forward()
        scene = arrange(env, painter, draw(0))
        return np.array([geom.pos for geom in scene.geoms[scene.ngeom - 4:scene.ngeom]])

    np.testing.assert_allclose(shapes(0.01), shapes(0.0), atol=1e-4)
    offset = shapes(40.0)[:, 0] - env.physics.named.data.cam_xpos['side', 'x']
    assert np.all(abs(offset) < 5)
    np.testing.assert_allclose(shapes(40.0)[:, 1:], shapes(0.0)[:, 1:], atol=1e-4)


def test_what_a_task_hides_stays_hidden():
    env, painter = load('finger_spin')
    target = env.physics.model.name2id('target', 'site')
    assert env.physics.model.site_rgba[target, 3] == 0
    scene = arrange(env, painter, draw(0))
    assert all(geom.rgba[3] == 0 for geom in scene.geoms[:scene.ngeom]
               if (geom.objtype, geom.objid) == (mujoco.mjtObj.mjOBJ_SITE, target))


def test_body_target_floor_and_sky_can_be_told_apart(uploads):
    env, painter = load('reacher_hard')
    for seed in range(100):
        context = draw(seed)
        painter.upload(context, None)
        parts = colours(env, arrange(env, painter, context))
        body, target = parts['arm'], parts['target']
        grounds = [uploads['grid'].min((0, 1)) / 255, uploads['grid'].max((0, 1)) / 255]
        for one, other in [(body, target), *itertools.product((body, target), grounds),
                           (body, uploads['skybox'][0, 0] / 255)]:
            assert np.linalg.norm(one - other) > 0.25


def test_hue_apart_by_hand():
    assert contexts.hue_apart(0.3, [], 0.1) == 0.3
    assert contexts.hue_apart(0.0, [0.5], 0.1) == pytest.approx(0.6)
    assert contexts.hue_apart(0.5, [0.5], 0.1) == pytest.approx(0.0)
    # Free are 0.3 to 0.7, and 0.9 to 1.1: 0.6 in all.
    assert contexts.hue_apart(0.5, [0.2, 0.8], 0.1) == pytest.approx(0.6)
    assert contexts.hue_apart(0.75, [0.2, 0.8], 0.1) == pytest.approx(0.95)
    for uniform, taken in itertools.product(np.linspace(0, 1, 97, endpoint=False),
                                            [(0.0,), (0.1, 0.15), (0.0, 0.3, 0.65, 0.9)]):
        away = abs(contexts.hue_apart(uniform, taken, 0.12) - np.array(taken))
        assert np.minimum(away, 1 - away).min() > 0.12 - 1e-9


def test_samples_are_of_their_kind_whatever_is_switched_on():
    for number in range(1, len(SCENERY) + 1):
        for names in itertools.combinations(SCENERY, number):
            scenery = only(*names)
            for kind in ('seen', 'held_out'):
                context = draw(number, scenery, kind)
                assert kind_of(contexts.Scenery(scenery), context) == kind
                assert context.shape == (contexts.DIM,) and context.dtype == np.float64
                assert context.min() >= 0 and context.max() < 1


def test_held_out_contexts_are_a_quarter_of_all_and_cover_every_cell_they_may():
    rng, scenery = np.random.default_rng(0), contexts.Scenery(SCENERY)
    share = np.mean([kind_of(scenery, rng.random(contexts.DIM)) == 'held_out'
                     for _ in range(2000)])
    assert 0.22 < share < 0.28
    for kind, cells in ('seen', {1, 2, 3, 5, 6, 7}), ('held_out', {0, 4}):
        key = contexts.SLOTS['sky'].start
        assert {int(8 * contexts.Scenery(only('sky')).sample(rng, kind)[key])
                for _ in range(200)} == cells


def test_contexts_are_functions_of_the_generator_and_survive_json():
    assert np.array_equal(draw(3), draw(3)) and not np.array_equal(draw(3), draw(4))
    assert np.array_equal(json.loads(json.dumps(draw(3).tolist())), draw(3))
    generators = [np.random.default_rng(0) for _ in range(2)]
    for rng, kind in zip(generators, ('seen', 'held_out'), strict=True):
        contexts.Scenery(SCENERY).sample(rng, kind)
    assert generators[0].random() == generators[1].random()


def test_contexts_are_seen_in_the_pixels_and_gone_without():
    env, painter = load('reacher_hard')
    camera = dmc.Camera(env.physics, 64, 0, painter)
    plain, one, other = camera.render(), camera.render(draw(0)), camera.render(draw(1))
    for frame in one, other:
        assert abs(frame.astype(int) - plain).mean() > 10
    assert abs(one.astype(int) - other).mean() > 10
    assert np.array_equal(camera.render(draw(0)), one)
    assert np.array_equal(camera.render(), plain)


def test_a_scenery_without_factors_is_refused():
    with pytest.raises(UserError, match='every factor of scenery is off'):
        contexts.Scenery(only())


def test_a_context_of_another_layout_is_refused():
    _, painter = load('reacher_hard')
    with pytest.raises(UserError, match=f'a context has {contexts.DIM} numbers, not 5'):
        painter.upload(np.zeros(5), None)
