"""DeepMind Control tasks as dm_env environments: pixels, states, action repeat.

A domain of one's own, domains/<domain>.py where a script is started, joins the suite's: see
tests/domains/dot.py.

An episode is named by its seed: `reset(episode_seed=s)` always gives the same physics state and
the same target, so that a filmed episode can be entered again at its very start, in any context.
"""
import atexit
import importlib.util
import os
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from utils import UserError, exit_on_user_error

GL_PACKAGES = 'apt-get install libegl1 libgl1-mesa-dri'


def probe_gl() -> str:
    """Return 'egl' (a GPU's or software) or 'osmesa', the first that opens a context, or 'off'."""
    test = 'import mujoco; mujoco.GLContext(16, 16).make_current()'
    for backend in ('egl', 'osmesa'):
        # In a process of its own: a failed backend can't be unloaded again.
        probe = subprocess.run([sys.executable, '-c', test], capture_output=True, check=False,
                               env={**os.environ, 'MUJOCO_GL': backend})
        if probe.returncode == 0:
            return backend
    return 'off'


# A user's choice stands, in lower case as in MuJoCo.
os.environ['MUJOCO_GL'] = os.environ.get('MUJOCO_GL', '').strip().lower() or probe_gl()

with exit_on_user_error():  # every script imports this module before it could catch an error
    try:
        import dm_env
        import mujoco
        import numpy as np
        from dm_control import suite  # these read MUJOCO_GL
        from dm_env import specs
    except (RuntimeError, AttributeError, ImportError) as error:
        if isinstance(error, ModuleNotFoundError):
            raise
        raise UserError(f"MUJOCO_GL={os.environ['MUJOCO_GL']} does not work here: unset it, or "
                        f'{GL_PACKAGES}.') from error

import contexts  # noqa: E402  it imports mujoco

# The suite's 2048 costs three times the frame, for a difference of 0.02/255 (reacher) to 0.05/255
# (finger).
SHADOW_SIZE = 512
MAX_EPISODE_STEPS = 1000  # the suite's lqr tasks would go on for ever
# Facets of curved shapes, around and along. The suite's (28, 16) cost half as much again for a
# difference of 0.01 to 0.05/255. Where scenery varies, edges may be coarser still.
FACETS, CONTEXT_FACETS = (28, 8), (14, 7)
# What pictures depend on beside MuJoCo's version: written into all that is learned from them.
QUALITY, CONTEXT_QUALITY = [SHADOW_SIZE, *FACETS], [SHADOW_SIZE, *CONTEXT_FACETS]


def load_domains(folder: Path) -> dict[str, Mapping]:
    """Import one's own domains: <domain>.py for each, with a SUITE as dm_control's own have.

    Returns: domain -> task -> function of `random`, a seed, that returns a control.Environment.

    Files that begin with _ are left to the others to import.

    Raises: UserError for a file that cannot be imported, without SUITE, or of a domain that the
      suite has.
    """
    found = {}
    for path in sorted(folder.glob('[!_]*.py')):
        spec = importlib.util.spec_from_file_location(f'domains.{path.stem}', path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # as an import does: its classes can be pickled
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the file raises
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
                     if frame.filename == str(path)] or [getattr(error, 'lineno', None)]
            raise UserError(f'{path}, line {lines[-1]}: {type(error).__name__}: {error}: correct '
                            f'it, or move the file out of {folder}.') from error
        if not isinstance(getattr(module, 'SUITE', None), Mapping):
            raise UserError(f"{path} has no SUITE: add SUITE = {{'<task>': <function>}} to it, or "
                            f'move it out of {folder}.')
        if path.stem in dict(suite.ALL_TASKS):
            raise UserError(f'{path} has the name of a domain of the suite: rename it.')
        found[path.stem] = module.SUITE
    return found


with exit_on_user_error():
    DOMAINS = load_domains(Path('domains'))
ALL_TASKS = [*suite.ALL_TASKS, *((domain, task) for domain in DOMAINS for task in DOMAINS[domain])]


def task_names() -> list[str]:
    """Return the names of all tasks of the suite and of `DOMAINS`, domain_task."""
    return [f'{domain}_{task}' for domain, task in ALL_TASKS]


def split_name(task_name: str) -> tuple[str, str]:
    """Return ('reacher', 'hard') for 'reacher_hard'; 'cup_catch' is DrQ-v2's name of
    ball_in_cup_catch."""
    for name in task_name, task_name.replace('cup_', 'ball_in_cup_', 1):
        for domain, task in ALL_TASKS:
            if name == f'{domain}_{task}':
                return domain, task
    raise UserError(f"there is no task '{task_name}': see --help for those there are.")


class Camera:
    """Films a physics into `im_size` x `im_size` RGB; one OpenGL context for the whole process.

    Unlike dm_control's, it keeps buffer and scene from frame to frame; pictures differ only by
    SHADOW_SIZE and `facets`. With a painter a frame can be in a visual context, which is applied
    only while rendering.

    Raises: UserError where no OpenGL works.
    """
    gl = None

    def __init__(self, physics, im_size: int, camera_id: int, painter=None,
                 facets: tuple[int, int] = FACETS):
        self._physics, self._painter = physics, painter
        self._model = model = physics.model.ptr
        if Camera.gl is None:
            try:
                # By name: mujoco.GLContext is what MUJOCO_GL was when mujoco was first imported.
                backend = importlib.import_module(f"mujoco.{os.environ['MUJOCO_GL']}")
                Camera.gl = backend.GLContext(im_size, im_size)
            except Exception as error:  # each backend raises its own
                raise UserError('no working OpenGL was found for rendering without a screen: '
                                f'{GL_PACKAGES} (or set MUJOCO_GL yourself).') from error
            atexit.register(Camera.gl.free)
        Camera.gl.make_current()
        model.vis.quality.shadowsize = SHADOW_SIZE
        model.vis.quality.numslices, model.vis.quality.numstacks = facets
        model.vis.global_.offwidth = model.vis.global_.offheight = im_size
        self._gpu = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100)
        self._scene = mujoco.MjvScene(model, maxgeom=1000)
        self._option, self._perturb = mujoco.MjvOption(), mujoco.MjvPerturb()
        self._view = mujoco.MjvCamera()
        self._view.type, self._view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, camera_id
        self._rect = mujoco.MjrRect(0, 0, im_size, im_size)
        self._pixels = np.empty((im_size, im_size, 3), np.uint8)
        self._uploaded = None  # the context whose textures OpenGL holds

    def render(self, context: np.ndarray | None = None) -> np.ndarray:
        """Return the physics as it is now, in `context`: uint8 (im_size, im_size, 3)."""
        Camera.gl.make_current()
        if not np.array_equal(context, self._uploaded):
            self._painter.upload(context, self._gpu)
            self._uploaded = context.copy() if context is not None else None
        mujoco.mjv_updateScene(self._model, self._physics.data.ptr, self._option, self._perturb,
                               self._view, mujoco.mjtCatBit.mjCAT_ALL, self._scene)
        if self._painter:
            self._painter.dress(context, self._scene)
        # Contexts of the GPU share one buffer binding: another camera may have been here.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._gpu)
        mujoco.mjr_render(self._rect, self._scene, self._gpu)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, self._gpu)
        return self._pixels[::-1].copy()  # OpenGL's first row is the lowest


class Wrapper(dm_env.Environment):
    """A wrapper that delegates to `env` everything that a subclass does not override."""

    def __init__(self, env: dm_env.Environment):
        self._env = env

    def close(self):  # dm_env's own would hide it
        self._env.close()

    def __getattr__(self, name):
        if name == '_env':  # not there yet while unpickling or before __init__
            raise AttributeError(name)
        return getattr(self._env, name)

    def reset(self, **episode):
        return self._env.reset(**episode)

    def step(self, action):
        return self._env.step(action)

    def observation_spec(self):
        return self._env.observation_spec()

    def action_spec(self):
        return self._env.action_spec()

    def reward_spec(self):
        return self._env.reward_spec()

    def discount_spec(self):
        return self._env.discount_spec()


class SuiteEpisodes(Wrapper):
    """A suite environment whose episodes are named by a seed and filmed in a context.

    Actions are float32 in [-1, 1]. `episode_info` holds what is known of the episode so far.
    """

    def __init__(self, env, camera_id: int, painter=None, seed: int = 0):
        super().__init__(env)
        self.camera_id, self.painter = camera_id, painter
        self._cameras, self._context = {}, None
        self._seeds = np.random.default_rng(seed)
        spec = env.action_spec()
        # An actuator without limits has bounds of 1e10 here: it takes actions as they are.
        unlimited = spec.maximum >= mujoco.mjMAXVAL
        self._low, high = (np.where(unlimited, own, bound) for own, bound in (
            (-1.0, spec.minimum), (1.0, spec.maximum)))
        self._scale = (high - self._low) / 2.0
        self._action_spec = specs.BoundedArray(spec.shape, np.float32, -1.0, 1.0, 'action')

    def action_spec(self):
        return self._action_spec

    def reset(self, episode_seed: int | None = None, context: np.ndarray | None = None):
        """Start the episode of that seed (the next of a seeded stream by default)."""
        if episode_seed is None:
            episode_seed = int(self._seeds.integers(2**32))
        self._context, self.episode_info = context, {}
        self._env.task.random.seed(episode_seed)
        return self._env.reset()

    def step(self, action):
        action = np.asarray(action, np.float64)
        return self._env.step(self._low + self._scale * (action + 1.0))

    def camera(self, im_size: int) -> Camera:
        """Another camera on the same physics, for films: coarser where there are contexts."""
        if self.painter is None:
            return Camera(self._env.physics, im_size, self.camera_id)
        return Camera(self._env.physics, im_size, self.camera_id, self.painter, CONTEXT_FACETS)

    def qpos(self) -> np.ndarray:
        """Return the physical pose, float64 (nq,): kept beside videos, for evaluation only."""
        return self._env.physics.data.qpos.copy()

    def joints(self) -> list[str]:
        """Return what each number of `qpos` is: 'hinge' (an angle, in rad), 'slide' (a length),
        'travel' (how far the whole body has come, which no picture shows) or 'other'."""
        model = self._env.physics.model
        kinds = ['other'] * model.nq
        for joint, (kind, start) in enumerate(zip(model.jnt_type, model.jnt_qposadr, strict=True)):
            if kind == mujoco.mjtJoint.mjJNT_HINGE:
                kinds[start] = 'hinge'
            elif kind == mujoco.mjtJoint.mjJNT_SLIDE:
                kinds[start] = 'travel' if model.id2name(joint, 'joint') == 'rootx' else 'slide'
        return kinds

    def render(self, im_size: int) -> np.ndarray:
        """Return a frame in the episode's context, uint8 (im_size, im_size, 3)."""
        plain = self._context is None  # then the picture is what an expert was trained on
        if (im_size, plain) not in self._cameras:
            self._cameras[im_size, plain] = Camera(
                self._env.physics, im_size, self.camera_id) if plain else self.camera(im_size)
        return self._cameras[im_size, plain].render(self._context)

    def panels(self, im_size: int) -> dict[str, np.ndarray]:
        """Return what a video of the episode shows side by side: caption -> uint8 (H, W, 3)."""
        return {'agent': self.render(im_size)}


class ActionRepeat(Wrapper):
    """Takes each action `num_repeats` times; rewards add up until a terminal discount."""

    def __init__(self, env, num_repeats: int):
        super().__init__(env)
        self._num_repeats = num_repeats

    def step(self, action):
        reward, discount = 0.0, 1.0
        for _ in range(self._num_repeats):
            time_step = self._env.step(action)
            if time_step.first():  # the step after LAST begins a new episode
                return time_step
            reward += time_step.reward * discount
            discount *= time_step.discount
            if time_step.last():
                break
        return time_step._replace(reward=reward, discount=discount)


class States(Wrapper):
    """The proprioceptive observation, flat: float32 (n,)."""

    def __init__(self, env):
        super().__init__(env)
        size = sum(int(np.prod(spec.shape)) for spec in env.observation_spec().values())
        self._spec = specs.Array((size,), np.float32, 'observation')

    def observation_spec(self):
        return self._spec

    def reset(self, **episode):
        return self._flatten(self._env.reset(**episode))

    def step(self, action):
        return self._flatten(self._env.step(action))

    def _flatten(self, time_step):
        parts = [np.ravel(part) for part in time_step.observation.values()]
        return time_step._replace(observation=np.concatenate(parts).astype(np.float32))


class Pixels(Wrapper):
    """The last `num_frames` frames: uint8 (3 * num_frames, im_size, im_size), newest last."""

    def __init__(self, env, im_size: int, num_frames: int):
        super().__init__(env)
        self._im_size, self._frames = im_size, deque(maxlen=num_frames)
        self._spec = specs.BoundedArray((3 * num_frames, im_size, im_size), np.uint8, 0, 255,
                                        'observation')

    def observation_spec(self):
        return self._spec

    def reset(self, **episode):
        return self._stack(self._env.reset(**episode))

    def step(self, action):
        return self._stack(self._env.step(action))

    def _stack(self, time_step):
        frame = self._env.render(self._im_size).transpose(2, 0, 1)
        # Before an episode's first frame, nothing moved: that frame fills the stack.
        self._frames.extend([frame] * (self._frames.maxlen if time_step.first() else 1))
        return time_step._replace(observation=np.concatenate(self._frames))


def load_suite(task_name: str, scenery: contexts.Scenery | None = None, seed: int = 0
               ) -> SuiteEpisodes:
    """Return the bare task, able to film itself, with a scenery in visual contexts as well."""
    domain, task = split_name(task_name)
    if domain in DOMAINS:
        env = DOMAINS[domain][task](random=seed)
        if not env.physics.model.ncam:
            raise UserError(f'domains/{domain}.py has no camera in the model of {task}: add '
                            '<camera .../> to its worldbody.')
    else:
        env = suite.load(domain, task, task_kwargs={'random': seed})
    env._step_limit = min(env._step_limit, MAX_EPISODE_STEPS)
    camera_id = 2 if domain == 'quadruped' else 0  # as in DrQ-v2: 0 is inside the quadruped
    painter = (contexts.Painter(env.physics.model.ptr, scenery, camera_id)
               if scenery is not None else None)
    return SuiteEpisodes(env, camera_id, painter, seed)


def make(task_name: str, obs: str = 'pixels', action_repeat: int = 2, frame_stack: int = 3,
         im_size: int = 84, seed: int = 0, scenery: contexts.Scenery | None = None
         ) -> dm_env.Environment:
    """Return a suite task as DrQ-v2 sees it.

    Args:
      obs: 'pixels', uint8 (3 * frame_stack, im_size, im_size), or 'states', float32 (n,).
      seed: of the stream of episodes that plain `reset()` draws from.
      scenery: for an environment that can be filmed in visual contexts.
    """
    if obs not in ('pixels', 'states'):  # a snapshot may say anything
        raise UserError(f'obs={obs} is neither pixels nor states: choose another snapshot.')
    env = ActionRepeat(load_suite(task_name, scenery, seed), action_repeat)
    return Pixels(env, im_size, frame_stack) if obs == 'pixels' else States(env)
