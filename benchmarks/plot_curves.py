"""Learning curves over DrQ-v2's published ones: python benchmarks/plot_curves.py RUN [RUN ...]

Each RUN is a folder that train.py wrote; the picture is demo/curves.png, a panel for each task.
"""
import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

from evaluate import published

import snapshots
import utils


def plot(runs: list[Path], target: Path):
    """A panel for each task, in the order in which `runs` has them.

    Raises: UserError for what is no run of train.py.
    """
    panels = {}
    for run in runs:
        if not (run / 'eval.csv').exists() or not (run / '.hydra/config.yaml').exists():
            raise utils.UserError(f'{run} is no folder of a run: choose one that train.py wrote.')
        cfg = OmegaConf.load(run / '.hydra/config.yaml')
        panels.setdefault(cfg.task_name, []).append((cfg, run))
    fig, all_axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2),
                                 layout='constrained', squeeze=False)
    for axes, (task, its_runs) in zip(all_axes[0], panels.items(), strict=True):
        curve = published(task)
        if len(curve):
            frame, mean, sd = curve['frame'], curve['mean'], curve['sd']
            axes.plot(frame, mean, label=f"DrQ-v2, pixels, {curve['seeds'][0]} seeds ± sd")
            axes.fill_between(frame, mean - sd, mean + sd, alpha=0.2)
        longest = 0
        for cfg, run in its_runs:
            ours = np.genfromtxt(run / 'eval.csv', delimiter=',', names=True)
            axes.plot(ours['frame'], ours['episode_reward'], '.-',
                      label=f'here, {cfg.obs}, seed {cfg.seed}')
            longest = max(longest, ours['frame'].max())
        axes.set_xlim(0, longest)
        axes.set(title=task, xlabel='frame', ylabel='return', ylim=(0, 1050))
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))
        axes.grid(alpha=0.3)
        axes.legend(loc='lower right', fontsize='x-small')
    with snapshots.atomic_write(target) as tmp:
        fig.savefig(tmp, dpi=100)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN')
    plot(parser.parse_args().runs, ROOT / 'demo/curves.png')


if __name__ == '__main__':
    with utils.exit_on_user_error():
        main()
