"""What a translator predicts: python benchmarks/plot_translations.py reacher_hard [finger_spin ...]

Draws demo/context_translation/<task>.jpg from ct/<task>.pt and videos/<task>/valid: three held-out
episodes, each in three rows: the expert in the source context, the translation, the truth.
"""
import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import snapshots
import utils
import video
from ac_agent import Demonstrations
from ct_model import ContextTranslator


def translations(snapshot: Path, clips: video.Clips, num_episodes: int, steps: list[int]
                 ) -> list[np.ndarray]:
    """Return for each episode uint8 (3, len(steps), H, W, 3): source, translation, truth."""
    made = snapshots.load_snapshot(snapshot, 'translator', clips.meta['task'])
    model = snapshots.rebuild(ContextTranslator, made['model_args'], made['model'])
    demos = Demonstrations(model.only_answer(torch.device('cpu'), torch.bfloat16), clips)
    parts = []
    for i in range(num_episodes):
        source, truth = np.array(clips.frames(i))[:2]
        predicted = demos.translate(i, [0], truth[0], images=True).images
        parts.append(np.stack([source[steps], predicted[steps], truth[steps]]))
    return parts


def picture(parts: list[np.ndarray], scale: int = 2, gap: int = 4) -> np.ndarray:
    """All episodes below one another, white between them: uint8 (H, W, 3)."""
    strips = [np.concatenate([np.concatenate(list(row), axis=1) for row in part])
              for part in parts]
    strips = [np.pad(strip, ((0, gap), (0, 0), (0, 0)), constant_values=255) for strip in strips]
    return np.concatenate(strips)[:-gap].repeat(scale, axis=0).repeat(scale, axis=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('tasks', nargs='+', metavar='TASK')
    for task in parser.parse_args().tasks:
        clips = video.Clips(ROOT / f'videos/{task}/valid', task)
        steps = np.linspace(0, clips.meta['episode_len'], 9).round().astype(int).tolist()
        image = picture(translations(ROOT / f'ct/{task}.pt', clips, 3, steps))
        target = ROOT / f'demo/context_translation/{task}.jpg'
        with snapshots.atomic_write(target) as tmp:
            cv2.imwrite(str(tmp), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
        print(target.relative_to(ROOT))


if __name__ == '__main__':
    with utils.exit_on_user_error():
        main()
