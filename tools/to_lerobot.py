"""Export videos to LeRobot: python tools/to_lerobot.py videos/reacher_hard/valid OUT

Writes a split as a dataset of LeRobot's format v3.0, by means of LeRobot itself. It needs an
environment of its own, since LeRobot 0.4.4 does not take the PyTorch that is pinned here:

    python3.11 -m venv ~/lerobot
    ~/lerobot/bin/pip install lerobot==0.4.4 hydra-core==1.3.8

Each context is a camera, `observation.images.context_<k>`; every episode has contexts of its own.
Play has `action`, and lacks its last frame, which no action follows. Demonstrations have all frames
and no action: the expert's are not stored. Poses, rewards and what the contexts are, for evaluation
only, are left out.
"""
import argparse
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import imageio.v3 as iio
import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

INSTALL = ('pip install lerobot==0.4.4 hydra-core==1.3.8 in an environment of its own, and run '
           'this with its python.')
try:
    import utils
    import video
    from logger import Progress
    from utils import UserError
except ModuleNotFoundError as missing:  # LeRobot brings all that these import, except for Hydra
    print(f'error: {missing}: {INSTALL}', file=sys.stderr)
    sys.exit(2)


def preview_rate(root: Path) -> int:
    """Return the agent's steps per second, which are the frames per second of a split's preview.

    Raises: UserError where there is no preview, or LeRobot does not take its rate.
    """
    path = root / 'preview_00000.mp4'
    try:
        rate = iio.immeta(path)['fps']
    except Exception as error:  # whatever imageio's plugins say of a file that they cannot read
        raise UserError(f"{path}, whose rate is that of the agent's steps, is missing or damaged: "
                        'give the rate, as in --fps 25.') from error
    if rate != round(rate):
        raise UserError(f'{path} has {rate:.4g} frames per second, and LeRobot takes whole ones '
                        f'only: give the nearest, --fps {round(rate)}.')
    return round(rate)


def features(clips: video.Clips, images: bool = False) -> dict[str, dict]:
    """Return what a frame has, in LeRobot's words: a camera for each context, play's action.

    Args:
      images: whether LeRobot keeps frames as PNG images, which are exact, not as videos.
    """
    size = clips.meta['im_size']
    camera = {'dtype': 'image' if images else 'video', 'shape': (size, size, 3),
              'names': ['height', 'width', 'channels']}
    cameras = {f'observation.images.context_{k}': camera for k in range(clips.meta['num_contexts'])}
    if 'actions' not in clips.episode(0):
        return cameras
    action_dim = len(clips.episode(0)['actions'][0])
    return cameras | {'action': {'dtype': 'float32', 'shape': (action_dim,), 'names': None}}


def frames(clips: video.Clips, i: int) -> Iterator[dict]:
    """Yield the frames of episode i: uint8 (H, W, 3) of each camera, play's float32 (action_dim,),
    and the task."""
    actions = clips.episode(i).get('actions')
    task = clips.meta['task'] + (': play' if actions else '')
    num_steps = len(actions) if actions else None
    for t, images in enumerate(clips.frames(i).swapaxes(0, 1)[:num_steps]):
        frame = {f'observation.images.context_{k}': image for k, image in enumerate(images)}
        if actions:
            frame['action'] = np.asarray(actions[t], np.float32)
        yield frame | {'task': task}


def export(clips: video.Clips, out: Path, dataset_class, fps: int, images: bool = False):
    """Write all episodes to the folder `out`, which appears once it is whole.

    Args:
      dataset_class: `LeRobotDataset`.
      fps, images: see `preview_rate` and `features`.
    """
    tmp = out.with_name(f'.tmp-{out.name}')
    shutil.rmtree(tmp, ignore_errors=True)  # of an export that was killed
    progress = Progress(len(clips), 'episode')
    try:
        dataset = dataset_class.create(repo_id=f'local/{out.name}', root=tmp, fps=fps,
                                       features=features(clips, images))
        try:
            for i in range(len(clips)):
                for frame in frames(clips, i):
                    dataset.add_frame(frame)
                dataset.save_episode(parallel_encoding=False)  # else a process for each camera
                progress.show(i + 1)
        finally:
            dataset.finalize()  # else a broken-off one writes its tables when it is collected
        os.rename(tmp, out)
    finally:
        progress.close()
        shutil.rmtree(tmp, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('videos', type=Path, help='a split, such as videos/reacher_hard/train')
    parser.add_argument('out', type=Path, metavar='OUT', help='the folder to write')
    parser.add_argument('--fps', type=int,
                        help="the agent's steps per second; else those of the split's preview")
    parser.add_argument('--images', action='store_true',
                        help='keep the frames exactly, as PNG images, not as compressed videos')
    args = parser.parse_args()
    if args.fps is not None and args.fps < 1:
        parser.error('--fps is at least 1')
    if args.out.exists():
        raise UserError(f'{args.out} exists: remove it, or name another folder.')
    clips = video.Clips(args.videos)
    if clips.meta['im_size'] < 32 and not args.images:
        raise UserError(f"{args.videos} holds images of {clips.meta['im_size']} pixels, and the "
                        'video encoder takes 32 or more: add --images.')
    fps = args.fps or preview_rate(args.videos)
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ImportError as error:
        raise UserError(f'LeRobot cannot be imported ({error}): {INSTALL}') from error
    import av
    import datasets
    # Encoder, muxer and datasets would write twenty lines for each episode.
    os.environ.setdefault('SVT_LOG', '1')
    av.logging.set_libav_level(av.logging.ERROR)
    datasets.disable_progress_bars()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # leaves nothing behind
    export(clips, args.out, LeRobotDataset, fps, args.images)
    print(f'{args.out}: {len(clips)} episodes, {fps} frames per second; to load: '
          f"LeRobotDataset('local/{args.out.name}', root='{args.out}')")


if __name__ == '__main__':
    with utils.exit_on_user_error():
        main()
