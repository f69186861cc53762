"""Clips: evaluation videos, side-by-side videos and the demonstration dataset on disk.

A clip is uint8 (T, H, W, 3), RGB, 0..255. A demonstration dataset has a folder for each split:

    videos/<task>/{train,valid,play,play_valid}/
        meta.json           all that the episodes depend on: task, sizes, seed, expert, versions;
                            `contexts` is the kind of their contexts, 'seen' or 'held_out'
        episode_00012.npy   uint8 (num_contexts, episode_len + 1, H, W, 3): one episode filmed in
                            several contexts; frame t is before action t
        episode_00012.json  episode_seed; contexts (vectors, see contexts.py); qpos (the pose in
                            each frame, only for evaluation); frames_crc32 (checksum of the .npy).
                            Demonstrations: rewards, expert_return. Play: actions, and
                            player_sha256 if an imitator played. Own videos have only
                            frames_crc32, files (their names) and fps (their rates)
        preview_00000.mp4   the first episodes, all contexts side by side: to look at

Each json ends with the checksum of its own text. It is written after the frames, and an episode
without its json does not count. So a process that is killed leaves only whole episodes.
"""
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np

import snapshots
import utils
from utils import UserError

PANEL = 256  # pixels: the least width and height of a panel in a side-by-side video
CAPTION = 24  # pixels: the height of the caption above a panel


def save(path: str | Path, frames: np.ndarray, fps: float = 20):
    """Write a clip, uint8 (T, H, W, 3), as .mp4 or .gif, which the path's suffix says.

    Raises: ValueError for another suffix, shape or dtype.
    """
    path = Path(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise ValueError(f'a clip is uint8 (T, H, W, 3), not {frames.dtype} {frames.shape}')
    if path.suffix == '.mp4':
        # Every browser plays yuv420p, which needs even sizes. imageio would rescale the picture;
        # this repeats its last row or column instead.
        height, width = frames.shape[1:3]
        frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode='edge')
        options = {'fps': fps, 'codec': 'libx264', 'pixelformat': 'yuv420p', 'macro_block_size': 1,
                   'quality': 8, 'output_params': ['-movflags', '+faststart']}
    elif path.suffix == '.gif':
        options = {'duration': 1000 / fps, 'loop': 0}
    else:
        raise ValueError(f'a video is written as .mp4 or .gif, not as {path}')
    with snapshots.atomic_write(path) as tmp:
        iio.imwrite(tmp, frames, **options)


def find_mp4s(folder: str | Path) -> list[list[Path]]:
    """Return the files of each episode, one for each context: <name>.mp4, or <context>/<name>.mp4.

    Raises: UserError if there are fewer than two episodes, or a context lacks one.
    """
    root = Path(folder)
    found = {path.relative_to(root) for path in [*root.glob('*.mp4'), *root.glob('*/*.mp4')]}
    contexts, names = sorted({path.parent for path in found}), sorted({path.name for path in found})
    if len(names) < 2:
        raise UserError(f'{root} holds {len(names) or "no"} videos, *.mp4 or */*.mp4, and two are '
                        'needed: set from_mp4 to another folder.')
    for path in (context / name for name in names for context in contexts):
        if path not in found:
            raise UserError(f'{root / path} is missing: put all videos into {root}, or each, under '
                            'the same name, into every folder of a context.')
    return [[root / context / name for context in contexts] for name in names]


def nearest_frames(path: str | Path, fps: float, num_frames: int) -> tuple[float, np.ndarray]:
    """Return a file's own frames per second, and the numbers of the frames nearest to `num_frames`
    moments, which are 1/fps seconds apart and begin with the first frame.

    Raises: UserError if the file is no video, or is too short.
    """
    try:
        rate, (length, _) = iio.immeta(path)['fps'], imageio_ffmpeg.count_frames_and_secs(str(path))
        # If two frames are equally near, take the earlier: the file may end with it.
        numbers = np.ceil(np.arange(num_frames) * rate / fps - 0.5 - 1e-9).astype(int)
    except Exception as error:  # whatever ffmpeg says of a file that it cannot read
        raise UserError(f'{path} is no video that ffmpeg can read: remove it, or convert it to '
                        'H.264.') from error
    if numbers[-1] >= length:
        raise UserError(f'{path} ends after {(length - 1) / rate:.2f} s, within the '
                        f'{num_frames - 1} agent steps of {1 / fps:.3g} s: remove it, or set '
                        f'episode_len={int((length - 1) / rate * fps)} or less.')
    return rate, numbers


def load(path: str | Path, fps: float, num_frames: int, im_size: int) -> tuple[np.ndarray, float]:
    """Read the `nearest_frames` of a video, cut to the square in the middle and resized.

    Returns: uint8 (num_frames, im_size, im_size, 3), and the file's own frames per second.

    Raises: UserError if the file cannot be read, or is too short.
    """
    rate, numbers = nearest_frames(path, fps, num_frames)
    clip, number = [], -1
    for number, frame in enumerate(iio.imiter(path)):
        if number in numbers:
            edge = min(frame.shape[:2])
            top, left = ((size - edge) // 2 for size in frame.shape[:2])
            image = cv2.resize(frame[top:top + edge, left:left + edge], (im_size, im_size),
                               interpolation=cv2.INTER_AREA)
            clip += [image] * int((numbers == number).sum())
        if len(clip) == num_frames:
            return np.stack(clip), rate
    raise UserError(f'{path} is damaged at frame {number + 1}: remove it.')


def side_by_side(clips: Sequence[np.ndarray], labels: Sequence[str]) -> np.ndarray:
    """Return one clip of several next to each other, each under its caption.

    Args:
      clips: uint8 (T_k, H_k, W_k, 3) each. A shorter one stands still at its end, and a lower one
        is filled up with black.
      labels: the captions, one for each clip.

    Returns: uint8 (max T_k, CAPTION + max n_k * H_k, sum of n_k * W_k, 3); the scale n_k is the
      least whole number that makes a panel of PANEL or more.
    """
    length, panels = max(len(clip) for clip in clips), []
    for clip, label in zip(clips, labels, strict=True):
        factor = math.ceil(PANEL / min(clip.shape[1:3]))
        clip = np.pad(clip, ((0, length - len(clip)), (0, 0), (0, 0), (0, 0)), mode='edge')
        clip = clip.repeat(factor, axis=1).repeat(factor, axis=2)
        caption = _caption(label, clip.shape[2])
        panels.append(np.concatenate([caption[None].repeat(length, axis=0), clip], axis=1))
    height = max(panel.shape[1] for panel in panels)
    return np.concatenate([np.pad(panel, ((0, 0), (0, height - panel.shape[1]), (0, 0), (0, 0)))
                           for panel in panels], axis=2)


def mse(image: np.ndarray, other: np.ndarray) -> float:
    """Return the mean squared difference of uint8 images that broadcast together, in [0, 1]."""
    return float(np.mean((image.astype(np.float32) - other) ** 2)) / 255 ** 2


def psnr(error: float) -> float:
    """Convert a mean squared error of pixels in [0, 1] to dB, at most 100; nan stays nan."""
    return float(-10 * np.log10(max(error, 1e-10)))


def _caption(label: str, width: int) -> np.ndarray:
    """Return a caption in white on black, uint8 (CAPTION, width, 3); shrink it if it is wider."""
    strip = np.zeros((CAPTION, width, 3), np.uint8)
    font, size, margin = cv2.FONT_HERSHEY_SIMPLEX, 0.5, 4
    text_width = cv2.getTextSize(label, font, size, 1)[0][0]
    size *= min(1.0, (width - 2 * margin) / max(text_width, 1))
    cv2.putText(strip, label, (margin, CAPTION - 8), font, size, (255, 255, 255), 1, cv2.LINE_AA)
    return strip


class VideoRecorder:
    """Films an evaluation episode into <work_dir>/eval_video/; without a `work_dir`, films nothing.

    Each frame is `env.panels(PANEL)` side by side: caption -> uint8 (H, W, 3).
    """

    def __init__(self, work_dir: str | Path | None):
        self._folder = None if work_dir is None else Path(work_dir) / 'eval_video'

    def init(self, env, enabled: bool = True):
        """Begin a clip with the present frame: call this after `env.reset()`."""
        self._frames = [] if enabled and self._folder else None
        self.record(env)

    def record(self, env):
        if self._frames is not None:
            self._frames.append(env.panels(PANEL))

    def save(self, file_name: str) -> np.ndarray | None:
        """Write the clip and return it; return None if nothing was filmed."""
        if self._frames is None:
            return None
        film = panels_side_by_side(self._frames)
        save(self._folder / file_name, film)
        return film


def panels_side_by_side(frames: Sequence[dict[str, np.ndarray]], note: str = '') -> np.ndarray:
    """Return the clip of `env.panels` at each step, side by side; `note` ends the last caption."""
    clips = [np.stack([panels[label] for panels in frames]) for label in frames[0]]
    *labels, last = frames[0]
    return side_by_side(clips, [*labels, last + note])


def episode_clip(panels: Sequence[dict[str, np.ndarray]], own: float,
                 expert: float | None = None) -> np.ndarray:
    """Return the clip of an episode's `env.panels` at each step, uint8 (T, H, W, 3). Its own return
    and the expert's end the last caption, and it stands still for ten more frames."""
    note = f': {own:.0f}' + ('' if expert is None else f' of {expert:.0f}')
    return panels_side_by_side([*panels, *[panels[-1]] * 10], note)


def frames_path(root: str | Path, i: int) -> Path:
    """Return the path of the frames of episode i; its json lies beside it."""
    return Path(root) / f'episode_{i:05d}.npy'


def episode_numbers(root: str | Path) -> list[int]:
    """Return the numbers of the whole episodes, in ascending order."""
    found = Path(root).glob('episode_*.json')
    return sorted(int(path.stem.removeprefix('episode_')) for path in found)


def write_episode(root: str | Path, i: int, frames: np.ndarray, info: dict):
    """Add episode i to a split's folder. A kill at any moment leaves it whole or absent.

    Args:
      frames: uint8 (num_contexts, episode_len + 1, H, W, 3).
      info: plain values for the json.
    """
    path = frames_path(root, i)
    with snapshots.atomic_write(path) as tmp:
        np.save(tmp, frames, allow_pickle=False)
        checksum = zlib.crc32(tmp.read_bytes())
    write_json(path.with_suffix('.json'), {'index': i, **info, 'frames_crc32': checksum})


def write_json(path: Path, values: dict):
    """Write plain values and the checksum of their text."""
    checksum = zlib.crc32(json.dumps(values).encode())
    with snapshots.atomic_write(path) as tmp:
        tmp.write_text(json.dumps({**values, 'crc32': checksum}) + '\n')


def read_json(path: Path) -> dict:
    """Return what `write_json` wrote.

    Raises: UserError if the file is missing or damaged.
    """
    try:
        values = json.loads(path.read_text())
        if values.pop('crc32', None) != zlib.crc32(json.dumps(values).encode()):
            raise ValueError
        return values
    except PermissionError as error:
        raise utils.not_readable(path) from error
    except (AttributeError, OSError, ValueError) as error:
        raise _damaged(path) from error


def is_imported(made_by: dict) -> bool:
    """Return True if a split's meta.json, or the `made_by` of a run, tells of own videos."""
    return 'mp4_sha256' in made_by


class Clips:
    """A split of a demonstration dataset. Frames are read when they are needed.

    Args:
      root: the split's folder, e.g. videos/reacher_hard/train.
      task, im_size, quality: these the videos must have, see `dmc.CONTEXT_QUALITY`; None: any.
      max_episodes: the greatest number of episodes to open.

    Raises: UserError if something is missing, damaged or of another task, size, quality or format.
    """

    def __init__(self, root: str | Path, task: str | None = None, im_size: int | None = None,
                 quality: list | None = None, max_episodes: int | None = None):
        self.root = Path(root)
        command = f"python generate_expert_video.py task={task or '<task>'}"
        if not utils.exists(self.root / 'meta.json'):
            raise UserError(f'there are no videos in {self.root}: {command} '
                            f'out_dir={self.root.parent}.')
        self.meta = meta = read_json(self.root / 'meta.json')
        command = f"python generate_expert_video.py task={task or meta['task']}"
        there = {**meta, 'mujoco': meta.get('versions', {}).get('mujoco')}
        wanted = {'format': snapshots.FORMAT, 'task': task, 'im_size': im_size, 'quality': quality,
                  'mujoco': quality and snapshots.versions()['mujoco']}
        wanted = {key: value for key, value in wanted.items() if value is not None}
        snapshots.require_same(self.root, {key: there.get(key) for key in wanted}, wanted,
                               f"{command}{f' im_size={im_size}' if im_size else ''} "
                               'out_dir=<another folder>')
        numbers = episode_numbers(self.root)
        if len(numbers) < meta['num_episodes']:
            raise UserError(f"{self.root} lacks some of its {meta['num_episodes']} episodes: "
                            f'{command} goes on with it, if it is given the same options.')
        self._paths = [frames_path(self.root, i) for i in numbers[:max_episodes]]
        size = meta['im_size']
        self._shape = (meta['num_contexts'], meta['episode_len'] + 1, size, size, 3)
        self._episodes = [read_json(path.with_suffix('.json')) for path in self._paths]
        self._checked = set()
        for i in range(len(self)):  # compares the files' sizes with their headers
            self._open(i)

    def __len__(self) -> int:
        return len(self._paths)

    def frames(self, i: int) -> np.ndarray:
        """Return uint8 (num_contexts, episode_len + 1, H, W, 3), a read-only memory map.

        Raises: UserError if the frames are damaged; their checksum is compared the first time.
        """
        frames = self._open(i)
        if i not in self._checked:
            if self._episodes[i].get('frames_crc32') != zlib.crc32(self._paths[i].read_bytes()):
                raise _damaged(self._paths[i])
            self._checked.add(i)
        return frames

    def _open(self, i: int) -> np.ndarray:
        """Map the frames again (50 us): a kept map would keep its file open, and often only 1,000
        files may be open."""
        path = self._paths[i]
        try:
            frames = np.lib.format.open_memmap(path, mode='r')
        except PermissionError as error:
            raise utils.not_readable(path) from error
        except Exception as error:  # missing, cut short, or whatever a damaged header raises
            raise _damaged(path) from error
        if frames.shape != self._shape or frames.dtype != np.uint8:
            raise _damaged(path)
        return frames

    def episode(self, i: int) -> dict:
        """Return the json of episode i."""
        return self._episodes[i]

    @property
    def imported(self) -> bool:
        """True for own videos, whose seeds, contexts, poses and returns are unknown."""
        return is_imported(self.meta)

    @property
    def min_contexts(self) -> int:
        """The least number of contexts for imitation. The agent acts in one that is not
        demonstrated; with own videos, it acts in a new one."""
        return 1 if self.imported else 2


def _damaged(path: Path) -> utils.Damaged:
    lost = path.parent if path.name == 'meta.json' else path.with_suffix('.*')
    return utils.Damaged(f'{path} is damaged or missing: delete {lost} and run '
                         'python generate_expert_video.py again.')
