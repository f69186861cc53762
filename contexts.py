"""Visual contexts: what a task looks like, apart from what happens in it.

A context is a float64 vector (DIM,) of uniforms in [0, 1), with one layout for every task; the
`scenery` config says which factors are on and over what range each number is laid.

`look` works out what a context means for a model, and is pure. `Painter` applies it: it changes the
model's colours and textures only while a frame is drawn, and restores them bit for bit. Light,
camera offset and distractors are added to the renderer's scene only, so they cannot affect the
physics, and no knowledge of a task's XML is needed.
"""
import colorsys
import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import mujoco
import numpy as np

import settings
from utils import UserError

Kind = Literal['seen', 'held_out']

MAX_DISTRACTORS = 4
DISTRACTOR = ('x', 'y', 'depth', 'shape', 'size', 'length', 'hue', 'saturation', 'value', 'turn')
# Factor -> its slots, and its ranges in the config. A factor's first slot is its key; the keys
# determine the kind of a context.
FACTORS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    'body': (('hue', 'saturation', 'value', 'accent hue', 'accent saturation', 'accent value'),
             ('saturation', 'value')),
    'target': (('hue', 'saturation', 'value'), ('saturation', 'value')),
    'floor': (('hue', 'saturation', 'value', 'contrast', 'pattern'),
              ('saturation', 'value', 'contrast')),
    'sky': (('hue', 'low saturation', 'low value', 'high saturation', 'high value'),
            ('saturation', 'value')),
    'light': (('brightness', 'hue', 'tint', 'azimuth', 'tilt'), ('brightness', 'tint', 'tilt')),
    'camera': (('yaw', 'pitch', 'roll', 'zoom'), ('orbit', 'roll', 'zoom')),
    'distractors': (('hue', 'count', 'first corner', *MAX_DISTRACTORS * DISTRACTOR),
                    ('count', 'size', 'saturation', 'value')),
}
_ENDS = np.cumsum([len(slots) for slots, _ in FACTORS.values()]).tolist()
SLOTS = {name: slice(end - len(FACTORS[name][0]), end)
         for name, end in zip(FACTORS, _ENDS, strict=True)}
DIM = _ENDS[-1]
CELLS, MODULUS = 8, 4  # keys are quantised to 8 cells; 1 in 4 sums of cells is held out

SUITE_HUES = {'body': 0.08, 'target': 0.0, 'floor': 0.58, 'sky': 0.58}  # of factors that are off
BODY, ACCENT, TARGET, FLOOR = range(4)  # colour groups of a model's parts
GROUP_FACTORS = ('body', 'body', 'target', 'floor')
SKY_SIZE, FLOOR_SIZE = 16, 64  # pixels along a texture: few, since textures are uploaded often
PATTERNS = (np.logical_xor, np.logical_and, lambda x, y: x, lambda x, y: y)  # checks to stripes
GEOM = mujoco.mjtGeom
GROUND = int(GEOM.mjGEOM_PLANE), int(GEOM.mjGEOM_HFIELD)
SHAPES = GEOM.mjGEOM_BOX, GEOM.mjGEOM_SPHERE, GEOM.mjGEOM_CYLINDER, GEOM.mjGEOM_CAPSULE


class Scenery:
    """The `scenery` config, laid out as in cfgs/generate_expert_video.yaml.

    Attributes:
      names: the factors that are on, in the order of FACTORS.
      ranges: (factor, key) -> (low, high).
    """

    def __init__(self, config: Mapping[str, Any]):
        """Check the config, which may come from a dataset's meta.json.

        Raises: UserError for a factor or key that is unknown, a range that is missing or that
          settings.py does not allow, and where all factors are off.
        """
        for name, factor in config.items():
            if name not in FACTORS:
                raise UserError(f'scenery.{name} is unknown: take one of {", ".join(FACTORS)}.')
            if not isinstance(factor, Mapping):
                raise UserError(f'scenery.{name}={factor} is no factor with ranges: the switch is '
                                f'scenery.{name}.enabled=false.')
            ranges = FACTORS[name][1]
            for key in factor.keys() - {'enabled', *ranges}:
                raise UserError(f'scenery.{name}.{key} is unknown: take one of enabled, '
                                f'{", ".join(ranges)}.')
            for key in ranges if factor.get('enabled') else ():
                if key not in factor:
                    raise UserError(f'scenery.{name}.{key} is missing: set '
                                    f'scenery.{name}.{key}=[low,high].')
        settings.check_settings({'scenery': config}, 'scenery')
        self.names = [name for name in FACTORS if name in config and config[name].get('enabled')]
        self.ranges = {(name, key): tuple(config[name][key]) for name in self.names
                       for key in FACTORS[name][1]}
        if not self.names:
            raise UserError('every factor of scenery is off: set scenery.body.enabled=true.')

    def sample(self, rng: np.random.Generator, kind: Kind) -> np.ndarray:
        """Return a context (DIM,), uniform among those of a kind. Takes the same number of random
        draws, whichever factors are on.

        The key of every enabled factor is quantised to 8 cells; a context is held out where the sum
        of its cells is a multiple of 4. So no context is of both kinds, a quarter is held out, and
        what is new in a held-out context is its combination of looks.
        """
        context = rng.random(DIM)
        seen_remainder, half = rng.integers(1, MODULUS), rng.integers(CELLS // MODULUS)
        *keys, last = [SLOTS[name].start for name in self.names]
        # The last key moves to a cell that gives the remainder, and keeps its place in the cell.
        remainder = seen_remainder if kind == 'seen' else 0
        cell = (remainder - sum(int(CELLS * context[key]) for key in keys)) % MODULUS
        context[last] = (cell + MODULUS * half + CELLS * context[last] % 1) / CELLS
        return context

    def lay(self, factor: str, key: str, uniform):
        """Scale numbers in [0, 1) (a float or an array) to the range of a factor's key."""
        low, high = self.ranges[factor, key]
        return low + uniform * (high - low)

    def colour(self, factor: str, hue: float, saturation: float, value: float) -> np.ndarray:
        """Return RGB (3,) in [0, 1]; saturation and value in [0, 1) are scaled to their ranges."""
        return np.array(colorsys.hsv_to_rgb(hue, self.lay(factor, 'saturation', saturation),
                                            self.lay(factor, 'value', value)))


class Distractor(NamedTuple):
    shape: int  # mjtGeom
    size: np.ndarray  # (3,), metres, as mjv_initGeom takes it
    position: np.ndarray  # (3,), metres, in the world, for the camera at its first place
    frame: np.ndarray  # (9,), rotation
    rgba: np.ndarray  # (4,)
    period: float  # metres


class Look(NamedTuple):
    """The meaning of a context for a model; empty or None where the factor is off."""
    paint: list[np.ndarray]  # for each of Stage.parts: (rows, 3)
    textures: dict[int, np.ndarray]  # texture id -> uint8 (height, width, 3)
    light: tuple[np.ndarray, np.ndarray] | None  # factor of the colour (3,), rotation (3, 3)
    camera: tuple[np.ndarray, float] | None  # rotation (3, 3), factor of the distance
    distractors: list[Distractor]


class Stage:
    """The measures of a model that `look` needs: its parts to paint, and its camera.

    Attributes:
      parts: for geoms, sites and skins: the model's own array of colours (n, 4), the rows to paint,
        and the colour group of each row.
      textures: 'floor' and 'sky' -> texture ids, see `room_for`; empty where the factor is off.
      eye, axes: the camera's position (3,) and axes (3, 3), columns right, up, back, in the model's
        initial pose, so that a picture depends on state and context alone.
      half_view: tangent of half the field of view.
      depth: distance from the camera to what moves, metres.
      floor: height of the floor, metres; -inf without one.
      tiles: how often the pattern repeats within one texture: 1, 2, 4 or 8.
    """

    def __init__(self, model: mujoco.MjModel, factors: Sequence[str], camera_id: int):
        self._sort_parts(model, factors)
        self._measure_view(model, camera_id)

    def _sort_parts(self, model: mujoco.MjModel, factors: Sequence[str]):
        floors, self.parts = set(), []
        for kind, colours in (('geom', model.geom_rgba), ('site', model.site_rgba),
                              ('skin', model.skin_rgba)):
            groups = np.full(len(colours), -1)
            for i in range(len(colours)):
                part = getattr(model, kind)(i)
                material = int(part.matid[0])
                name = model.mat(material).name if material >= 0 else ''
                texture = int(model.mat_texid[material].max()) if material >= 0 else -1
                ground = kind == 'geom' and part.type[0] in GROUND
                if ground and texture >= 0:
                    floors.add(texture)  # rgba could only dim it
                elif material < 0 or model.mat_rgba[material, 3] == 1:  # else rgba would replace it
                    groups[i] = colour_group(kind, part.name, name, ground)
            on = [group for group, factor in enumerate(GROUP_FACTORS) if factor in factors]
            rows = np.flatnonzero(np.isin(groups, on))
            self.parts.append((colours, rows, groups[rows]))
        skies = np.flatnonzero(model.tex_type == mujoco.mjtTexture.mjTEXTURE_SKYBOX).tolist()
        self.textures = {
            'floor': room_for(model, floors, FLOOR_SIZE ** 2) if 'floor' in factors else [],
            'sky': room_for(model, skies, 6 * SKY_SIZE ** 2) if 'sky' in factors else []}

    def _measure_view(self, model: mujoco.MjModel, camera_id: int):
        data = mujoco.MjData(model)
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_camlight(model, data)
        self.eye = data.cam_xpos[camera_id].copy()
        self.axes = data.cam_xmat[camera_id].reshape(3, 3).copy()  # columns: right, up, back
        self.half_view = np.tan(np.deg2rad(model.cam_fovy[camera_id]) / 2)
        distance = (self.eye - data.subtree_com[0]) @ self.axes[:, 2]
        self.depth = max(distance, 0.1 * model.stat.extent)  # a body may carry its camera
        self.floor = min((data.geom_xpos[i, 2] for i in range(model.ngeom)
                           if model.geom_type[i] in GROUND and data.geom_xmat[i, 8] > 0.9),
                          default=-np.inf)
        # The suite's floors repeat their texture every metre: a small task's camera sees less.
        width = 2 * self.half_view * self.depth
        self.tiles = 2 ** int(np.clip(np.round(np.log2(2.5 / width)), 0, 3))

    def cast(self, spot: np.ndarray) -> tuple[np.ndarray, float]:
        """Cast a ray from the camera through a point (2,) of the picture, whose edges are at -1, 1.

        Returns: the ray (3,) per unit of depth, and the depth at which it meets the floor, or inf.
        """
        ray = self.axes @ [*(self.half_view * spot), -1]
        return ray, (self.floor - self.eye[2]) / ray[2] if ray[2] < 0 else np.inf


def room_for(model: mujoco.MjModel, textures: Iterable[int], num_pixels: int) -> list[int]:
    """Return the ids of those RGB textures that hold so many pixels; others keep their looks."""
    return [i for i in sorted(textures) if model.tex_nchannel[i] == 3
            and model.tex_height[i] * model.tex_width[i] >= num_pixels]


def look(context: np.ndarray, scenery: Scenery, stage: Stage) -> Look:
    """Work out what a context means on a stage."""
    slots = {name: context[SLOTS[name]] for name in scenery.names}
    hues = spread_hues(slots)
    colours = np.zeros((4, 3))
    for group, name, first in ((BODY, 'body', 1), (ACCENT, 'accent', 4),
                               (TARGET, 'target', 1), (FLOOR, 'floor', 1)):
        factor = GROUP_FACTORS[group]
        if factor in slots:
            colours[group] = scenery.colour(factor, hues[name], *slots[factor][first:first + 2])
    textures = {}
    light, camera, distractors = None, None, []
    if 'floor' in slots:
        y, x = np.mgrid[:FLOOR_SIZE, :FLOOR_SIZE] * 2 * stage.tiles // FLOOR_SIZE % 2
        *_, contrast, pattern = slots['floor']
        dark = PATTERNS[int(len(PATTERNS) * pattern)](x, y)[..., None]
        image = colours[FLOOR] * (1 - dark * scenery.lay('floor', 'contrast', contrast))
        textures |= dict.fromkeys(stage.textures['floor'], (255 * image).astype(np.uint8))
    if 'sky' in slots:
        _, *saturations_and_values = slots['sky']
        low, high = (scenery.colour('sky', hues['sky'], *pair)
                     for pair in (saturations_and_values[:2], saturations_and_values[2:]))
        image = np.tile(np.linspace(high, low, SKY_SIZE)[:, None], (6, SKY_SIZE, 1))
        textures |= dict.fromkeys(stage.textures['sky'], (255 * image).astype(np.uint8))
    if 'light' in slots:
        brightness, hue, tint, azimuth, tilt = slots['light']
        colour = np.array(colorsys.hsv_to_rgb(hue, scenery.lay('light', 'tint', tint), 1))
        axis = [np.cos(2 * np.pi * azimuth), np.sin(2 * np.pi * azimuth), 0]
        light = (scenery.lay('light', 'brightness', brightness) * colour,
                 rotation(axis, scenery.lay('light', 'tilt', tilt)))
    if 'camera' in slots:
        yaw, pitch, roll, zoom = (
            scenery.lay('camera', key, slot) for key, slot in
            zip(('orbit', 'orbit', 'roll', 'zoom'), slots['camera'], strict=True))
        camera = (rotation([0, 1, 0], yaw) @ rotation([1, 0, 0], pitch)
                  @ rotation([0, 0, 1], roll), zoom)
    if 'distractors' in slots:
        distractors = place_distractors(slots['distractors'], hues, scenery, stage)
    return Look([colours[groups] for _, _, groups in stage.parts], textures, light, camera,
                distractors)


def place_distractors(slots: np.ndarray, hues: Mapping[str, float], scenery: Scenery,
                      stage: Stage) -> list[Distractor]:
    """Place distractors near the corners of the picture, away from where the body moves.

    They float behind the body, or stand on the floor where the ray meets the floor first.
    """
    low, high = scenery.ranges['distractors', 'count']
    hue, count, first, *others = slots
    count, first = int(low + count * (high - low + 1)), int(4 * first)
    taken = [hues[name] for name in ('body', 'accent', 'target') if name in hues]
    # Seen from above, the whole floor is about as far as the body; seen from the side, the
    # floor must be well behind for a shape on it not to hide the body.
    nearest = stage.depth * (0.9 + 0.3 * np.hypot(*stage.axes[:2, 2]))
    distractors = []
    for i, own in enumerate(np.reshape(others, (MAX_DISTRACTORS, len(DISTRACTOR)))[:count]):
        x, y, depth, shape, size, length, own_hue, saturation, value, turn = own
        spot = np.array([(-1, -1), (1, 1), (-1, 1), (1, -1)][(first + i) % 4])
        spot = spot * (0.6 + 0.35 * np.array([x, y]))
        ray, ground = stage.cast(spot)
        if ground < nearest:
            ray, ground = stage.cast(spot * [1, -0.7])
        depth = min(stage.depth * (1.3 + 0.6 * depth), ground)
        position = stage.eye + depth * ray
        shape = SHAPES[int(len(SHAPES) * shape)]
        radius = scenery.lay('distractors', 'size', size) * stage.half_view * depth
        length = radius * (0.6 + 0.8 * length)
        if depth == ground:
            position[2] += {GEOM.mjGEOM_SPHERE: radius,
                            GEOM.mjGEOM_CAPSULE: radius + length}.get(shape, length)
        size = [radius, radius, length] if shape == GEOM.mjGEOM_BOX else [radius, length, 0]
        apart = hue_apart((hue + (i + 0.3 * own_hue) / count) % 1, taken, 0.14)
        rgba = [*scenery.colour('distractors', apart, saturation, value), 1]
        distractors.append(Distractor(
            shape, np.array(size), position, rotation([0, 0, 1], 360 * turn).ravel(),
            np.array(rgba, np.float32), 2.6 * stage.half_view * depth))
    return distractors


def colour_group(kind: str, name: str, material: str, ground: bool) -> int:
    """Return the group of a geom, site or skin; -1 for marks, which are left alone."""
    if 'target' in (material if kind == 'site' else material + name):
        return TARGET
    if kind == 'site':
        return -1
    if not material:
        return FLOOR if ground else BODY
    return BODY if material.startswith(('self', 'skin')) else ACCENT


def spread_hues(slots: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return a hue for every colour group, such that groups which touch can be told apart."""
    hues = {name: hue for name, hue in SUITE_HUES.items() if name not in slots}
    for name, gap, others in (('body', 0.15, ('target', 'floor', 'sky')),
                              ('target', 0.2, ('body', 'floor')),
                              ('floor', 0.17, ('body', 'target')),
                              ('sky', 0.15, ('body', 'target'))):
        if name in slots:
            taken = [hues[other] for other in others if other in hues]
            hues[name] = hue_apart(slots[name][0], taken, gap)
    if 'body' in slots:
        hues['accent'] = hue_apart(slots['body'][3], hues.values(), 0.1)
    return hues


def hue_apart(uniform: float, taken: Iterable[float], gap: float) -> float:
    """Map `uniform` in [0, 1) to a hue at least `gap` away from every hue in `taken`.

    Hues are in [0, 1) and wrap around. With n hues taken, this needs gap < 1 / (2 * n).
    """
    taken = sorted(taken)
    if not taken:
        return uniform
    arcs = [(hue + gap, after - hue - 2 * gap)
            for hue, after in zip(taken, [*taken[1:], taken[0] + 1], strict=True)
            if after - hue > 2 * gap]
    left = uniform * sum(width for _, width in arcs)
    while left > arcs[0][1] and len(arcs) > 1:
        left -= arcs.pop(0)[1]
    return (arcs[0][0] + left) % 1


def rotation(axis: list[float], degrees: float) -> np.ndarray:
    """Return the matrix (3, 3) that turns by `degrees` about `axis` (3,)."""
    quaternion, matrix = np.empty(4), np.empty(9)
    mujoco.mju_axisAngle2Quat(quaternion, axis, np.deg2rad(degrees))
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


class Painter:
    """Shows one model in any context; the look of each is worked out once and cached.

    To draw a frame (`gpu` is the MjrContext; context None is the suite's own look):
        painter.upload(context, gpu)  # only where gpu still holds another context's textures
        painter.arrange(context, scene, update)
        mujoco.mjr_render(...)
    """

    def __init__(self, model: mujoco.MjModel, scenery: Scenery, camera_id: int):
        self._model, self._stage = model, Stage(model, scenery.names, camera_id)
        self._cached_look = functools.lru_cache(maxsize=256)(
            lambda values: look(np.frombuffer(values), scenery, self._stage))

    def _look(self, context: np.ndarray) -> Look:
        context = np.asarray(context, np.float64)
        if context.shape != (DIM,):
            raise UserError(f'a context has {DIM} numbers, this one {context.size}: it is of '
                            'another version, so film anew with generate_expert_video.py.')
        return self._cached_look(context.tobytes())

    def arrange(self, context: np.ndarray | None, scene: mujoco.MjvScene,
                update: Callable[[], None]):
        """Update a scene in a context: paint the model while `update` runs, then add distractors,
        light and camera.

        Args:
          update: calls mujoco.mjv_updateScene for the scene.
        """
        with self.painted(context):
            update()
        self._dress(context, scene)

    @contextlib.contextmanager
    def painted(self, context: np.ndarray | None) -> Iterator[None]:
        """Paint the model in the context's colours in this block; its own bits return after it."""
        paint = [] if context is None else self._look(context).paint
        saved = [(rgba, rgba.copy()) for rgba, _, _ in self._stage.parts]
        try:
            for (rgba, rows, _), colours in zip(self._stage.parts, paint, strict=False):
                rgba[rows, :3] = colours  # alpha stays: tasks hide parts by it
            yield
        finally:
            for rgba, before in saved:
                rgba[:] = before

    def upload(self, context: np.ndarray | None, gpu: mujoco.MjrContext):
        """Give `gpu` the context's textures; afterwards the model holds its own again."""
        model = self._model
        for index in self._stage.textures['floor'] + self._stage.textures['sky']:
            if context is None:
                mujoco.mjr_uploadTexture(model, gpu, index)
                continue
            image, start = self._look(context).textures[index], model.tex_adr[index]
            pixels = model.tex_data[start:start + image.size]
            saved = pixels.copy(), model.tex_height[index], model.tex_width[index]
            try:
                pixels[:] = image.ravel()
                model.tex_height[index], model.tex_width[index] = image.shape[:2]
                mujoco.mjr_uploadTexture(model, gpu, index)
            finally:
                pixels[:], model.tex_height[index], model.tex_width[index] = saved

    def _dress(self, context: np.ndarray | None, scene: mujoco.MjvScene):
        """Put the context's distractors, light and camera into a scene that has been updated."""
        if context is None:
            return
        look, cameras = self._look(context), scene.camera
        eye = (cameras[0].pos + cameras[1].pos) / 2  # the two are a stereo pair
        forward, up = cameras[0].forward.copy(), cameras[0].up.copy()
        # Shapes stand still while the camera travels sideways, and come by again every period;
        # however far it travels ahead, they keep their distance behind the body.
        travel, aside = eye - self._stage.eye, self._stage.axes[:, 0]
        ahead = (travel - travel @ aside * aside) * [1, 1, 0]
        for shape in look.distractors:
            offset = (shape.position - eye) @ aside
            position = shape.position + ahead - round(offset / shape.period) * shape.period * aside
            geom = scene.geoms[scene.ngeom]
            mujoco.mjv_initGeom(geom, shape.shape, shape.size, position, shape.frame, shape.rgba)
            geom.category = mujoco.mjtCatBit.mjCAT_STATIC  # geoms of category decor cast no shadow
            scene.ngeom += 1
        if look.light is not None:
            colour, turn = look.light
            pivot = eye + self._stage.depth * forward
            for light in scene.lights[:scene.nlight]:
                light.ambient[:] *= colour
                light.diffuse[:] *= colour
                if not light.headlight:
                    light.pos[:] = pivot + turn @ (light.pos - pivot)
                    light.dir[:] = turn @ light.dir
        if look.camera is not None:
            turn, zoom = look.camera
            right = np.empty(3)
            mujoco.mju_cross(right, forward, up)
            _, new_up, new_back = turn.T @ np.stack([right, up, -forward])
            for camera in cameras:
                camera.pos[:] += self._stage.depth * (forward + zoom * new_back)
                camera.up[:], camera.forward[:] = new_up, -new_back
