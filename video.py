"""Clips: evaluation videos, side-by-side videos and the demonstration dataset on disk.

A clip is uint8 (T, H, W, 3), RGB, 0..255. A demonstration dataset has a folder for each split:

    videos/<task>/{train,valid,play,play_valid}/
        meta.json           what made every episode in here: task, sizes, seed, expert, versions;
                            `contexts` is their kind, 'seen' or 'held_out'
        episode_00012.npy   uint8 (num_contexts, episode_len + 1, H, W, 3): one episode filmed in
                            every context; frame t is what is seen before action t
        episode_00012.json  episode_seed, contexts (a vector each, see contexts.py), qpos (the
                            pose in each frame, for evaluation only); an expert's has rewards
                            and expert_return, play's has actions and, where an imitator played,
                            player_sha256; frames_crc32, the checksum of the .npy. One's own
                            videos have only `files`, their names, and `fps`, their rates
        preview_00000.mp4   the first episodes, all contexts side by side: to look at

Each json ends with the checksum of its own text. An episode is there once its json is: the frames
are written and renamed first, so a generation that is killed leaves nothing that `Clips` would
read.
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

PANEL = 256  # pixels; a panel of a side-by-side video is at least this wide and high
CAPTION = 24  # pixels; the height of the strip above it


def save(path: str | Path, frames: np.ndarray, fps: float = 20):
    """Write a clip, uint8 (T, H, W, 3) of any size, as .mp4 or .gif by the path's suffix.

    Raises: ValueError for another suffix, shape or dtype.
    """
    path = Path(path)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise ValueError(f'a clip is uint8 (T, H, W, 3), not {frames.dtype} {frames.shape}')
    if path.suffix == '.mp4':
        # Every browser plays yuv420p, which needs even sizes: imageio would rescale the picture to
        # get them, so an odd edge is repeated instead.
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


def nearest_frames(path: str | Path, fps: float, num_frames: int) -> tuple[float, np.ndarray]:
    """Return a file's own frames per second, and the numbers of the frames that lie nearest to
    `num_frames` moments 1/fps seconds apart, from its first frame on.

    Raises: UserError where it is no video, or ends before.
    """
    def nearest(num: int) -> np.ndarray:
        # Half-way between two frames it is the earlier one: the file may end with it.
        return np.ceil(np.arange(num) * rate / fps - 0.5 - 1e-9).astype(int)
    try:
        rate, (length, _) = iio.immeta(path)['fps'], imageio_ffmpeg.count_frames_and_secs(str(path))
        numbers = nearest(num_frames)
    except Exception as error:  # whatever ffmpeg says of a file that it cannot read
        raise UserError(f'{path} is no video that ffmpeg can read: remove it, or convert it to '
                        'H.264.') from error
    if numbers[-1] >= length:
        whole = max(int((nearest(int(length / rate * fps) + 2) < length).sum()) - 1, 0)
        shorter = f'set episode_len={whole} or less, or ' if whole > 1 else ''  # 2 are the least
        raise UserError(f'{path} lasts {length / rate:.2f} s, which is {whole} agent steps of '
                        f'{1 / fps:.3g} s, not {num_frames - 1}: {shorter}remove it.')
    return rate, numbers


def load(path: str | Path, fps: float, num_frames: int, im_size: int) -> tuple[np.ndarray, float]:
    """Read the beginning of a video of any size and rate: `nearest_frames`, cut to the square in
    the middle and resized.

    Returns: uint8 (num_frames, im_size, im_size, 3), and the file's own frames per second.

    Raises: UserError where it cannot be read, or ends before.
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
    """Clips next to each other, each under its caption.

    Args:
      clips: uint8 (T_k, H_k, W_k, 3) each; a shorter one stands still on its last frame, a lower
        one is filled up with black.
      labels: one for each clip; shrunk where it is wider than its panel.

    Returns: uint8 (max T_k, CAPTION + max n_k * H_k, sum of n_k * W_k, 3), where n_k is the least
      whole number that fills PANEL.
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
    """Return a caption in white on black, uint8 (CAPTION, width, 3)."""
    strip = np.zeros((CAPTION, width, 3), np.uint8)
    font, size, margin = cv2.FONT_HERSHEY_SIMPLEX, 0.5, 4
    text_width = cv2.getTextSize(label, font, size, 1)[0][0]
    size *= min(1.0, (width - 2 * margin) / max(text_width, 1))
    cv2.putText(strip, label, (margin, CAPTION - 8), font, size, (255, 255, 255), 1, cv2.LINE_AA)
    return strip


class VideoRecorder:
    """Films an evaluation episode into <work_dir>/eval_video/; `work_dir` None films nothing.

    What is filmed are `env.panels(PANEL)`, caption -> uint8 (H, W, 3), side by side.
    """

    def __init__(self, work_dir: str | Path | None):
        self._folder = None if work_dir is None else Path(work_dir) / 'eval_video'
        self._enabled, self._frames = False, []

    def init(self, env, enabled: bool = True):
        """Begin a clip with the frame of the present: call it after `env.reset()`."""
        self._enabled, self._frames = enabled and self._folder is not None, []
        self.record(env)

    def record(self, env):
        if self._enabled:
            self._frames.append(env.panels(PANEL))

    def save(self, file_name: str) -> np.ndarray | None:
        """Write the clip and return it; None where nothing was filmed."""
        if not self._enabled:
            return None
        film = panels_side_by_side(self._frames)
        save(self._folder / file_name, film)
        return film


def panels_side_by_side(frames: Sequence[dict[str, np.ndarray]], note: str = '') -> np.ndarray:
    """Set what `env.panels` gave at each step side by side; `note` ends the last caption."""
    clips = [np.stack([panels[label] for panels in frames]) for label in frames[0]]
    *labels, last = frames[0]
    return side_by_side(clips, [*labels, last + note])


def episode_clip(panels: Sequence[dict[str, np.ndarray]], own: float,
                 expert: float | None = None) -> np.ndarray:
    """Return an episode's clip, uint8 (T, H, W, 3), of what `env.panels` gave at each step. Its
    returns end the last caption, and its last frame stands still for ten more."""
    note = f': {own:.0f}' + ('' if expert is None else f' of {expert:.0f}')
    return panels_side_by_side([*panels, *[panels[-1]] * 10], note)


def frames_path(root: str | Path, i: int) -> Path:
    """Return where the frames of episode i lie; what is known of it lies beside them, in a json."""
    return Path(root) / f'episode_{i:05d}.npy'


def episode_numbers(root: str | Path) -> list[int]:
    """Return the numbers of the complete episodes, in ascending order."""
    found = Path(root).glob('episode_*.json')
    return sorted(int(path.stem.removeprefix('episode_')) for path in found)


def write_episode(root: str | Path, i: int, frames: np.ndarray, info: dict):
    """Add episode i to a split's folder; a kill at any moment leaves it whole or absent.

    Args:
      frames: uint8 (num_contexts, episode_len + 1, H, W, 3).
      info: numbers, strings, lists and dicts, for the json.
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

    Raises: UserError where the file is damaged.
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


def is_whole(root: str | Path) -> bool:
    """Tell whether a split is there, with all the episodes that were ordered."""
    meta = Path(root) / 'meta.json'
    return utils.exists(meta) and len(episode_numbers(root)) >= read_json(meta)['num_episodes']


def is_imported(made_by: dict) -> bool:
    """Tell whether a split's meta.json, or what a run was made by, is of own videos."""
    return 'mp4_sha256' in made_by


class Clips:
    """A split of a demonstration dataset: checked when opened, its frames read lazily.

    Args:
      root: the split's folder, e.g. videos/reacher_hard/train.
      task, im_size, quality: what the videos must be of, see `dmc.CONTEXT_QUALITY`; None takes
        any.
      max_episodes: how many episodes to open at most.

    Raises: UserError where something is missing, damaged or of another task, size or format; the
      sentence has the folder or file and the remedy.
    """

    def __init__(self, root: str | Path, task: str | None = None, im_size: int | None = None,
                 quality: list | None = None, max_episodes: int | None = None):
        self.root = Path(root)
        command = f"python generate_expert_video.py task={task or '<task>'}"
        if not utils.exists(self.root / 'meta.json'):
            raise UserError(f'there are no videos in {self.root}: {command} '
                            f'out_dir={self.root.parent}.')
        self.meta = meta = read_json(self.root / 'meta.json')
        if meta.get('format') != snapshots.FORMAT:
            raise UserError(f"{self.root} holds videos of format {meta.get('format')}, not "
                            f'{snapshots.FORMAT}: remove it and {command}.')
        if task is not None and meta['task'] != task:
            raise UserError(f"{self.root} holds videos of {meta['task']}, not {task}: {command} "
                            'out_dir=<another folder>.')
        command = f"python generate_expert_video.py task={meta['task']}"
        if im_size is not None and meta['im_size'] != im_size:
            raise UserError(f"{self.root} holds images of {meta['im_size']} pixels, not {im_size}: "
                            f'{command} im_size={im_size} out_dir=<another folder>.')
        if quality is not None:
            snapshots.require_same_pictures(self.root, meta['versions'], meta['quality'], quality,
                                            f'remove it, and {command}')
        if not is_whole(self.root):
            raise UserError(f"{self.root} lacks some of its {meta['num_episodes']} episodes, since "
                            f'filming was interrupted: {command} goes on with it, given the same '
                            'options.')
        self._paths = [frames_path(self.root, i) for i in episode_numbers(self.root)[:max_episodes]]
        size = meta['im_size']
        self._shape = (meta['num_contexts'], meta['episode_len'] + 1, size, size, 3)
        self._episodes = [read_json(path.with_suffix('.json')) for path in self._paths]
        self._checked = set()
        for i in range(len(self)):  # reads the headers and compares the files' sizes with them
            self._open(i)

    def __len__(self) -> int:
        return len(self._paths)

    def frames(self, i: int) -> np.ndarray:
        """Return uint8 (num_contexts, episode_len + 1, H, W, 3), a read-only memory map.

        Raises: UserError where they are damaged: their checksum is compared at the first reading.
        """
        frames = self._open(i)
        if i not in self._checked:
            if self._episodes[i].get('frames_crc32') != zlib.crc32(self._paths[i].read_bytes()):
                raise _damaged(self._paths[i])
            self._checked.add(i)
        return frames

    def _open(self, i: int) -> np.ndarray:
        """Map the frames anew (50 us): a map keeps its file open, and 1,000 is a usual limit."""
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
        """Return what is known of episode i, see above: plain values."""
        return self._episodes[i]

    @property
    def imported(self) -> bool:
        """Whether these are own videos: seeds, contexts, poses and returns are unknown."""
        return is_imported(self.meta)

    @property
    def min_contexts(self) -> int:
        """The least number of contexts for imitation: the agent needs one that is not demonstrated,
        which is drawn anew beside own videos."""
        return 1 if self.imported else 2


def _damaged(path: Path) -> utils.Damaged:
    lost = path.parent if path.name == 'meta.json' else path.with_suffix('.*')
    return utils.Damaged(f'{path} is damaged, or of an earlier version: delete {lost} and run '
                         'python generate_expert_video.py again.')
