"""Visual contexts: what a task looks like, apart from what happens in it.

A context is a float64 vector (DIM,) of numbers in [0, 1), with one layout for every task. The
`scenery` config says which factors are on, and to what range each number is scaled.

`look` is a pure function: it works out what a context means for a model. `Painter` applies this to
the renderer's scene and textures. It never changes the physics' model, and needs no knowledge of a
task's XML.
"""
import colorsys
import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import mujoco
import numpy as np

from utils import UserError

Kind = Literal['seen', 'held_out']

MAX_DISTRACTORS = 4
DISTRACTOR = ('x', 'y', 'depth', 'shape', 'size', 'length', 'hue', 'saturation', 'value', 'turn')
# Factor -> its slots in a context, and its ranges in the config. The first slot of a factor is its
# key; the keys determine the kind of a context.
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
CELLS, MODULUS = 8, 4  # keys fall into 8 cells; a quarter of the sums of cells is held out

SUITE_HUES = {'body': 0.08, 'target': 0.0, 'floor': 0.58, 'sky': 0.58}  # of factors that are off
BODY, ACCENT, TARGET, FLOOR = range(4)  # colour groups of a model's parts
GROUP_FACTORS = ('body', 'body', 'target', 'floor')
SKY_SIZE, FLOOR_SIZE = 16, 64  # pixels along a texture: few, because uploads take time
PATTERNS = (np.logical_xor, np.logical_and, lambda x, y: x, lambda x, y: y)  # checks to stripes
GEOM, OBJECT = mujoco.mjtGeom, mujoco.mjtObj
GROUND = int(GEOM.mjGEOM_PLANE), int(GEOM.mjGEOM_HFIELD)
SHAPES = GEOM.mjGEOM_BOX, GEOM.mjGEOM_SPHERE, GEOM.mjGEOM_CYLINDER, GEOM.mjGEOM_CAPSULE


class Scenery:
    """What the `scenery` config says, see cfgs/generate_expert_video.yaml.

    Attributes:
      names: the factors that are on, in the order of FACTORS.
      ranges: (factor, key) -> (low, high).
    """

    def __init__(self, config: Mapping[str, Any]):
        """Read the config, of checked settings or of a dataset's meta.json.

        Raises: UserError if all factors are off.
        """
        self.names = [name for name in FACTORS if config[name]['enabled']]
        self.ranges = {(name, key): tuple(config[name][key]) for name in self.names
                       for key in FACTORS[name][1]}
        if not self.names:
            raise UserError('every factor of scenery is off: set scenery.body.enabled=true.')

    def sample(self, rng: np.random.Generator, kind: Kind) -> np.ndarray:
        """Draw a context (DIM,) uniformly from all contexts of a kind.

        The key of each factor that is on falls into one of 8 cells. A context is held out if the
        sum of these cells is a multiple of 4. So no context is of both kinds, a quarter is held
        out, and the combination of looks is new in a held-out context. The number of random draws
        does not depend on the factors.
        """
        context = rng.random(DIM)
        seen_remainder, half = rng.integers(1, MODULUS), rng.integers(CELLS // MODULUS)
        *keys, last = [SLOTS[name].start for name in self.names]
        # The last key moves to a cell that gives the remainder, and keeps its place in the cell.
        remainder = seen_remainder if kind == 'seen' else 0
        cell = (remainder - sum(int(CELLS * context[key]) for key in keys)) % MODULUS
        context[last] = (cell + MODULUS * half + CELLS * context[last] % 1) / CELLS
        return context

    def scale(self, factor: str, key: str, uniform):
        """Scale a number or an array in [0, 1) to the range of a factor's key."""
        low, high = self.ranges[factor, key]
        return low + uniform * (high - low)

    def colour(self, factor: str, hue: float, saturation: float, value: float) -> np.ndarray:
        """Return RGB (3,) in [0, 1]; saturation and value in [0, 1) are scaled to their ranges."""
        return np.array(colorsys.hsv_to_rgb(hue, self.scale(factor, 'saturation', saturation),
                                            self.scale(factor, 'value', value)))


class Distractor(NamedTuple):
    shape: int  # mjtGeom
    size: np.ndarray  # (3,), metres, as mjv_initGeom takes it
    position: np.ndarray  # (3,), metres, in the world, before the camera travels
    frame: np.ndarray  # (9,), rotation
    rgba: np.ndarray  # (4,)
    period: float  # metres


class Look(NamedTuple):
    """The meaning of a context for a model. A part is empty or None if its factor is off."""
    colours: np.ndarray  # (4, 3): RGB of each colour group, in [0, 1]
    textures: dict[int, np.ndarray]  # texture id -> uint8 (height, width, 3)
    light: tuple[np.ndarray, np.ndarray] | None  # factor of the colour (3,), rotation (3, 3)
    camera: tuple[np.ndarray, float] | None  # rotation (3, 3), factor of the distance
    distractors: list[Distractor]


class Stage:
    """The properties of a model that contexts depend on: its parts, textures and camera.

    Attributes:
      parts: (object type, id) -> colour group, of the geoms, sites and skins to paint.
      textures: 'floor' and 'sky' -> texture ids, see `room_for`; empty if the factor is off.
      eye, axes: the camera's position (3,) and axes (3, 3), columns right, up, back, in the model's
        initial pose, so that a picture depends on state and context alone.
      half_view: tangent of half the field of view.
      depth: distance from the camera to the body, metres.
      floor: height of the floor, metres; -inf without one.
      tiles: how often the pattern repeats within one floor texture: 1, 2, 4 or 8.
    """

    def __init__(self, model: mujoco.MjModel, factors: Sequence[str], camera_id: int):
        self._sort_parts(model, factors)
        self._measure_view(model, camera_id)

    def _sort_parts(self, model: mujoco.MjModel, factors: Sequence[str]):
        floors, self.parts = set(), {}
        for kind, object_type, number in (('geom', OBJECT.mjOBJ_GEOM, model.ngeom),
                                          ('site', OBJECT.mjOBJ_SITE, model.nsite),
                                          ('skin', OBJECT.mjOBJ_SKIN, model.nskin)):
            for i in range(number):
                part = getattr(model, kind)(i)
                material = int(part.matid[0])
                name = model.mat(material).name if material >= 0 else ''
                texture = int(model.mat_texid[material].max()) if material >= 0 else -1
                ground = kind == 'geom' and part.type[0] in GROUND
                group = colour_group(kind, part.name, name, ground)
                if ground and texture >= 0:
                    floors.add(texture)  # a colour could only dim it
                elif group >= 0 and GROUP_FACTORS[group] in factors:
                    self.parts[int(object_type), i] = group
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
        # The suite's floors repeat their texture every metre, but a small task's camera sees less.
        width = 2 * self.half_view * self.depth
        self.tiles = 2 ** int(np.clip(np.round(np.log2(2.5 / width)), 0, 3))

    def cast(self, spot: np.ndarray) -> tuple[np.ndarray, float]:
        """Cast a ray from the camera through a point (2,) of the picture, in [-1, 1].

        Returns: the ray (3,) per metre of depth, and the depth at which it meets the floor, or inf.
        """
        ray = self.axes @ [*(self.half_view * spot), -1]
        return ray, (self.floor - self.eye[2]) / ray[2] if ray[2] < 0 else np.inf


def room_for(model: mujoco.MjModel, textures: Iterable[int], num_pixels: int) -> list[int]:
    """Return the ids of the RGB textures that hold `num_pixels`; the others keep their looks."""
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
        image = colours[FLOOR] * (1 - dark * scenery.scale('floor', 'contrast', contrast))
        textures |= dict.fromkeys(stage.textures['floor'], (255 * image).astype(np.uint8))
    if 'sky' in slots:
        _, *saturations_and_values = slots['sky']
        low, high = (scenery.colour('sky', hues['sky'], *pair)
                     for pair in (saturations_and_values[:2], saturations_and_values[2:]))
        image = np.tile(np.linspace(high, low, SKY_SIZE)[:, None], (6, SKY_SIZE, 1))
        textures |= dict.fromkeys(stage.textures['sky'], (255 * image).astype(np.uint8))
    if 'light' in slots:
        brightness, hue, tint, azimuth, tilt = slots['light']
        colour = np.array(colorsys.hsv_to_rgb(hue, scenery.scale('light', 'tint', tint), 1))
        axis = [np.cos(2 * np.pi * azimuth), np.sin(2 * np.pi * azimuth), 0]
        light = (scenery.scale('light', 'brightness', brightness) * colour,
                 rotation(axis, scenery.scale('light', 'tilt', tilt)))
    if 'camera' in slots:
        yaw, pitch, roll, zoom = (
            scenery.scale('camera', key, slot) for key, slot in
            zip(('orbit', 'orbit', 'roll', 'zoom'), slots['camera'], strict=True))
        camera = (rotation([0, 1, 0], yaw) @ rotation([1, 0, 0], pitch)
                  @ rotation([0, 0, 1], roll), zoom)
    if 'distractors' in slots:
        distractors = place_distractors(slots['distractors'], hues, scenery, stage)
    return Look(colours, textures, light, camera, distractors)


def place_distractors(slots: np.ndarray, hues: Mapping[str, float], scenery: Scenery,
                      stage: Stage) -> list[Distractor]:
    """Place distractors near the corners of the picture, away from the body.

    Each floats behind the body, or stands on the floor if the floor is nearer.
    """
    low, high = scenery.ranges['distractors', 'count']
    hue, count, first, *others = slots
    count, first = int(low + count * (high - low + 1)), int(4 * first)
    taken = [hues[name] for name in ('body', 'accent', 'target') if name in hues]
    # Seen from above, the floor is about as far as the body. Seen from the side, the floor must be
    # well behind the body, or a shape on it would hide the body.
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
        radius = scenery.scale('distractors', 'size', size) * stage.half_view * depth
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
    """Return the colour group of a geom, site or skin; -1 for a mark, which keeps its colour."""
    if 'target' in (material if kind == 'site' else material + name):
        return TARGET
    if kind == 'site':
        return -1
    if not material:
        return FLOOR if ground else BODY
    return BODY if material.startswith(('self', 'skin')) else ACCENT


def spread_hues(slots: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return a hue for each colour group and the sky: neighbours in the picture differ."""
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
    """Map `uniform` in [0, 1) to a hue at least `gap` away from the n hues in `taken`.

    Hues are in [0, 1) and wrap around. `gap` must be below 1 / (2 * n).
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
    """Shows one model in any context. The looks of the last 256 contexts are cached.

    To draw a frame in a context (None: the suite's own look) with an MjrContext, `gpu`:
        painter.upload(context, gpu)  # only if gpu still holds another context's textures
        mujoco.mjv_updateScene(..., scene)
        painter.dress(context, scene)
        mujoco.mjr_render(...)
    """

    def __init__(self, model: mujoco.MjModel, scenery: Scenery, camera_id: int):
        self._model, self._stage = model, Stage(model, scenery.names, camera_id)
        self._canvas = copy.copy(model)  # a model of its own, for the textures to upload
        self._cached_look = functools.lru_cache(maxsize=256)(
            lambda values: look(np.frombuffer(values), scenery, self._stage))

    def _look(self, context: np.ndarray) -> Look:
        context = np.asarray(context, np.float64)
        if context.shape != (DIM,):
            raise UserError(f'a context has {DIM} numbers, not {context.size}: film again with '
                            'python generate_expert_video.py.')
        return self._cached_look(context.tobytes())

    def upload(self, context: np.ndarray | None, gpu: mujoco.MjrContext):
        """Give `gpu` the context's textures."""
        canvas = self._canvas
        for index in self._stage.textures['floor'] + self._stage.textures['sky']:
            if context is None:
                mujoco.mjr_uploadTexture(self._model, gpu, index)
                continue
            image, start = self._look(context).textures[index], canvas.tex_adr[index]
            canvas.tex_data[start:start + image.size] = image.ravel()
            canvas.tex_height[index], canvas.tex_width[index] = image.shape[:2]
            mujoco.mjr_uploadTexture(canvas, gpu, index)

    def dress(self, context: np.ndarray | None, scene: mujoco.MjvScene):
        """Apply a context's colours, distractors, light and camera to an updated scene."""
        if context is None:
            return
        look, cameras = self._look(context), scene.camera
        for geom in scene.geoms[:scene.ngeom]:
            group = self._stage.parts.get((geom.objtype, geom.objid))
            if group is not None:
                geom.rgba[:3] = look.colours[group]  # alpha stays: tasks hide parts by it
        eye = (cameras[0].pos + cameras[1].pos) / 2  # the two are a stereo pair
        forward, up = cameras[0].forward.copy(), cameras[0].up.copy()
        # If the camera travels sideways, distractors stand still, and come by again every period.
        # If it travels ahead, they travel with it and stay behind the body.
        travel, aside = eye - self._stage.eye, self._stage.axes[:, 0]
        ahead = (travel - travel @ aside * aside) * [1, 1, 0]
        for shape in look.distractors:
            offset = (shape.position - eye) @ aside
            position = shape.position + ahead - round(offset / shape.period) * shape.period * aside
            geom = scene.geoms[scene.ngeom]
            mujoco.mjv_initGeom(geom, shape.shape, shape.size, position, shape.frame, shape.rgba)
            geom.category = mujoco.mjtCatBit.mjCAT_STATIC  # decoration would cast no shadow
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
