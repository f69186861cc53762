"""Learning curves over DrQ-v2's published ones: python benchmarks/plot_curves.py RUN [RUN ...]

Each RUN is a folder that train.py wrote; the picture is demo/curves.png, a panel for each task.
"""
import argparse
import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402


def read(path: Path, *columns: str, **where: str) -> np.ndarray:
    """-> float (len(columns), rows), of the rows in which the columns of `where` hold its values.

    Raises: UserError where there are none.
    """
    rows = []
    if path.exists():
        with open(path) as file:
            rows = [[float(row[column]) for column in columns] for row in csv.DictReader(file)
                    if all(row[key] == value for key, value in where.items())]
    if not rows:
        raise utils.UserError(f"{path} holds no {', '.join([*columns, *where.values()])}: choose "
                              'a folder that train.py wrote, of a task in '
                              'benchmarks/drqv2_curves.csv.')
    return np.array(rows).T


def plot(runs: list[Path], target: Path):
    """A panel for each task, in the order in which `runs` has them."""
    cfgs = [OmegaConf.load(run / '.hydra/config.yaml') for run in runs]
    tasks = list(dict.fromkeys(cfg.task_name for cfg in cfgs))
    fig, panels = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.2), layout='constrained',
                               squeeze=False)
    for task, axes in zip(tasks, panels[0], strict=True):
        frame, mean, sd, seeds = read(ROOT / 'benchmarks/drqv2_curves.csv', 'frame', 'mean', 'sd',
                                      'seeds', task=task)
        axes.plot(frame, mean, label=f'DrQ-v2, pixels, {seeds[0]:.0f} seeds ± sd')
        axes.fill_between(frame, mean - sd, mean + sd, alpha=0.2)
        last = 0
        for run, cfg in zip(runs, cfgs, strict=True):
            if cfg.task_name == task:
                frame, reward = read(run / 'eval.csv', 'frame', 'episode_reward')
                axes.plot(frame, reward, '.-', label=f'here, {cfg.obs}, seed {cfg.seed}')
                last = max(last, frame[-1])
        axes.set(title=task, xlabel='frame', ylabel='return', xlim=(0, last), ylim=(0, 1050))
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))
        axes.grid(alpha=0.3)
        axes.legend(loc='lower right', fontsize='x-small')
    with utils.atomic_write(target) as tmp:
        fig.savefig(tmp, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN')
    plot(parser.parse_args().runs, ROOT / 'demo/curves.png')


if __name__ == '__main__':
    with utils.exit_on_user_error():
        main()
