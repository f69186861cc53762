"""DeepMind Control tasks as dm_env environments: pixels, states, action repeat.

Own domains join the suite's: domains/<domain>.py in the working directory, such as
tests/domains/dot.py.

A seed names an episode: `reset(episode_seed=s)` always gives the same physics state and the same
target, so an agent can start where a filmed episode started, in any context.
"""
import atexit
import importlib.util
import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from utils import UserError, exit_on_user_error

GL_PACKAGES = 'apt-get install libegl1 libgl1-mesa-dri'


def probe_gl() -> str:
    """Return 'egl' (a GPU's or software) or 'osmesa', the first that opens a context, or 'off'."""
    test = 'import mujoco; mujoco.GLContext(16, 16).make_current()'
    for backend in ('egl', 'osmesa'):
        # In another process, because a backend that failed cannot be unloaded.
        probe = subprocess.run([sys.executable, '-c', test], capture_output=True, check=False,
                               env={**os.environ, 'MUJOCO_GL': backend})
        if probe.returncode == 0:
            return backend
    return 'off'


# The user's choice wins; MuJoCo reads it in lower case.
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

# With the suite's 2048, a frame takes three times as long and differs by 0.02/255 (reacher) to
# 0.05/255 (finger).
SHADOW_SIZE = 512
MAX_EPISODE_STEPS = 1000  # the suite's lqr tasks would never end
# Facets of curved shapes, around and along. With the suite's (28, 16), a frame takes 1.5 times as
# long and differs by 0.01 to 0.05/255. In contexts, edges may be coarser still.
FACETS, CONTEXT_FACETS = (28, 8), (14, 7)
# Pictures depend on these and on MuJoCo's version. All that is learned from pictures keeps them.
QUALITY, CONTEXT_QUALITY = [SHADOW_SIZE, *FACETS], [SHADOW_SIZE, *CONTEXT_FACETS]


def load_domains(folder: Path) -> dict[str, Mapping]:
    """Import own domains: each is a file <domain>.py with a SUITE, as in dm_control. A file whose
    name begins with _ is no domain.

    Returns: domain -> task -> function that takes `random`, a seed, and returns a
      control.Environment.

    Raises: UserError if a file cannot be imported, has no SUITE, or has the name of a domain of the
      suite.
    """
    found = {}
    for path in sorted(folder.glob('[!_]*.py')):
        spec = importlib.util.spec_from_file_location(f'domains.{path.stem}', path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # as an import does: its classes can be pickled
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever the file raises
            raise UserError(f'{path} cannot be imported ({type(error).__name__}: {error}): correct '
                            f'it, or move it out of {folder}.') from error
        if not isinstance(getattr(module, 'SUITE', None), Mapping):
            raise UserError(f"{path} has no SUITE: add SUITE = {{'<task>': <function>}}, or move "
                            f'it out of {folder}.')
        if path.stem in dict(suite.ALL_TASKS):
            raise UserError(f'{path} has the name of a domain of the suite: rename it.')
        found[path.stem] = module.SUITE
    return found


with exit_on_user_error():
    DOMAINS = load_domains(Path('domains'))
ALL_TASKS = [*suite.ALL_TASKS, *((domain, task) for domain in DOMAINS for task in DOMAINS[domain])]


def task_names() -> list[str]:
    """Return the names, <domain>_<task>, of all tasks of the suite and of `DOMAINS`."""
    return [f'{domain}_{task}' for domain, task in ALL_TASKS]


def split_name(task_name: str) -> tuple[str, str]:
    """Return ('reacher', 'hard') for 'reacher_hard', and ('ball_in_cup', 'catch') also for
    DrQ-v2's name 'cup_catch'."""
    for name in task_name, task_name.replace('cup_', 'ball_in_cup_', 1):
        for domain, task in ALL_TASKS:
            if name == f'{domain}_{task}':
                return domain, task
    raise UserError(f"there is no task '{task_name}': --help lists them all.")


class Camera:
    """Draws a physics as RGB frames of `im_size` x `im_size` pixels.

    Unlike dm_control's, it keeps buffer and scene from frame to frame; pictures differ only by
    SHADOW_SIZE and `facets`. With a painter it can draw a frame in a visual context.

    Raises: UserError if no OpenGL works.
    """
    gl = None  # the OpenGL context of the process

    def __init__(self, physics, im_size: int, camera_id: int, painter=None,
                 facets: tuple[int, int] = FACETS):
        self._physics, self._painter = physics, painter
        self._model = model = physics.model.ptr
        if Camera.gl is None:
            try:
                # mujoco.GLContext would be of the backend that MUJOCO_GL named at the import.
                backend = importlib.import_module(f"mujoco.{os.environ['MUJOCO_GL']}")
                Camera.gl = backend.GLContext(im_size, im_size)
            except Exception as error:  # each backend raises its own
                raise UserError('no OpenGL works here without a screen: '
                                f'{GL_PACKAGES}, or set MUJOCO_GL.') from error
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
        """Return a frame of the present, in `context`: uint8 (im_size, im_size, 3)."""
        Camera.gl.make_current()
        if not np.array_equal(context, self._uploaded):
            self._painter.upload(context, self._gpu)
            self._uploaded = context.copy() if context is not None else None
        mujoco.mjv_updateScene(self._model, self._physics.data.ptr, self._option, self._perturb,
                               self._view, mujoco.mjtCatBit.mjCAT_ALL, self._scene)
        if self._painter:
            self._painter.dress(context, self._scene)
        # Another camera may have bound the buffer, which all cameras share.
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._gpu)
        mujoco.mjr_render(self._rect, self._scene, self._gpu)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, self._gpu)
        return self._pixels[::-1].copy()  # OpenGL's first row is the lowest


class Wrapper:
    """A dm_env environment: `env`, but for what a subclass defines."""

    def __init__(self, env: dm_env.Environment):
        self._env = env

    def __getattr__(self, name):
        return getattr(self._env, name)


class SuiteEpisodes(Wrapper):
    """A suite environment; a seed names each episode, and a context says how it looks.

    Actions are float32 in [-1, 1]. `episode_info` is a dict about the episode, empty here.
    """

    def __init__(self, env, camera_id: int, painter=None, seed: int = 0):
        super().__init__(env)
        self.camera_id, self.painter = camera_id, painter
        self._cameras, self._context = {}, None
        self._seeds = np.random.default_rng(seed)
        spec = env.action_spec()
        # The bounds of an actuator without limits are 1e10: it takes actions as they are.
        unlimited = spec.maximum >= mujoco.mjMAXVAL
        self._low, high = (np.where(unlimited, own, bound) for own, bound in (
            (-1.0, spec.minimum), (1.0, spec.maximum)))
        self._scale = (high - self._low) / 2.0
        self._action_spec = specs.BoundedArray(spec.shape, np.float32, -1.0, 1.0, 'action')

    def action_spec(self):
        return self._action_spec

    def reset(self, episode_seed: int | None = None, context: np.ndarray | None = None):
        """Start the episode of a seed; by default of the next in a seeded stream."""
        if episode_seed is None:
            episode_seed = int(self._seeds.integers(2**32))
        self._context, self.episode_info = context, {}
        self._env.task.random.seed(episode_seed)
        return self._env.reset()

    def step(self, action):
        action = np.asarray(action, np.float64)
        return self._env.step(self._low + self._scale * (action + 1.0))

    def camera(self, im_size: int) -> Camera:
        """Return another camera on the same physics; its pictures are coarser if they can be in
        contexts."""
        if self.painter is None:
            return Camera(self._env.physics, im_size, self.camera_id)
        return Camera(self._env.physics, im_size, self.camera_id, self.painter, CONTEXT_FACETS)

    def qpos(self) -> np.ndarray:
        """Return the pose, float64 (nq,): only for evaluation."""
        return self._env.physics.data.qpos.copy()

    def joints(self) -> list[str]:
        """Return the kind of each number in `qpos`: 'hinge' (an angle, rad), 'slide' (a length,
        metres), 'travel' (the distance that the body has come, which no picture shows) or
        'other'."""
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
        """Return the pictures in a frame of the episode's video: caption -> uint8 (H, W, 3)."""
        return {'agent': self.render(im_size)}


class ActionRepeat(Wrapper):
    """Takes each action `num_repeats` times and adds up the rewards."""

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
    """The observation is the suite's own, flat: float32 (n,)."""

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
    """The observation is the last `num_frames` frames, newest last: uint8 (3 * num_frames, im_size,
    im_size)."""

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
        # At the start of an episode, its first frame fills the stack.
        self._frames.extend([frame] * (self._frames.maxlen if time_step.first() else 1))
        return time_step._replace(observation=np.concatenate(self._frames))


def load_suite(task_name: str, scenery: contexts.Scenery | None = None, seed: int = 0
               ) -> SuiteEpisodes:
    """Return a task that can be filmed; with a scenery, in visual contexts."""
    domain, task = split_name(task_name)
    if domain in DOMAINS:
        env = DOMAINS[domain][task](random=seed)
        if not env.physics.model.ncam:
            raise UserError(f'the model of {task} in domains/{domain}.py has no camera: add '
                            '<camera .../> to its worldbody.')
    else:
        env = suite.load(domain, task, task_kwargs={'random': seed})
    env._step_limit = min(env._step_limit, MAX_EPISODE_STEPS)
    camera_id = 2 if domain == 'quadruped' else 0  # as in DrQ-v2; 0 is inside the quadruped
    painter = (contexts.Painter(env.physics.model.ptr, scenery, camera_id)
               if scenery is not None else None)
    return SuiteEpisodes(env, camera_id, painter, seed)


def make(task_name: str, obs: str = 'pixels', action_repeat: int = 2, frame_stack: int = 3,
         im_size: int = 84, seed: int = 0, scenery: contexts.Scenery | None = None
         ) -> dm_env.Environment:
    """Return a task as DrQ-v2 sees it.

    Args:
      obs: 'pixels', uint8 (3 * frame_stack, im_size, im_size), or 'states', float32 (n,).
      seed: of the stream of episodes; `reset()` without a seed takes the next.
      scenery: of the contexts in which it can be filmed.
    """
    if obs not in ('pixels', 'states'):  # a snapshot may hold anything
        raise UserError(f'obs={obs} is neither pixels nor states: choose another snapshot.')
    env = ActionRepeat(load_suite(task_name, scenery, seed), action_repeat)
    return Pixels(env, im_size, frame_stack) if obs == 'pixels' else States(env)
