"""How well imitators do, over seeds: python benchmarks/plot_imitators.py RUN [RUN ...]

Each RUN is a folder that train_ac.py wrote to the end. Prints a table with a row for each task and
overrides: runs that differ in nothing but the seed share one. With --picture it also draws the
learning curves.
"""
import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402

UNSAID = ('task=', 'seed=', 'hydra.', 'use_tb=', 'device=')  # overrides that make no other row


def read(run: Path) -> tuple[str, str, np.ndarray, np.ndarray]:
    """-> the run's task, its other overrides, and its eval.csv and episodes.csv as arrays with
    named columns.

    Raises: UserError for what is no finished run of train_ac.py.
    """
    paths = [run / name for name in ('.hydra/config.yaml', '.hydra/overrides.yaml', 'eval.csv',
                                     'episodes.csv')]
    for path in paths:
        if not path.exists():
            raise utils.UserError(f'{path} is missing: choose the folder of a finished run of '
                                  'train_ac.py, or start this one again, with its options and '
                                  f'hydra.run.dir={run}.')
    curve, episodes = (np.atleast_1d(np.genfromtxt(path, delimiter=',', names=True))
                       for path in paths[2:])
    # Of a key that is given twice, the last counts.
    overrides = dict(text.split('=', 1) for text in OmegaConf.load(paths[1])
                     if not text.startswith(UNSAID))
    named = ' '.join(f'{key}={value}' for key, value in sorted(overrides.items()))
    return OmegaConf.load(paths[0]).task_name, named, curve, episodes


def scores(episodes: np.ndarray) -> np.ndarray:
    """Each episode's score, 1 - (expert - imitator) / mean(expert - random): 1 is the expert's.

    Their mean is (imitator - random) / (expert - random) of the mean returns. The denominator is a
    mean over episodes because in some of them even a random policy gets what the expert gets.
    """
    span = (episodes['expert_return'] - episodes['random_return']).mean()
    return 1 - (episodes['expert_return'] - episodes['task_return']) / span


def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of the middle half (Agarwal et al. 2021)."""
    return scipy.stats.trim_mean(values, 0.25, axis=axis)


def row(name: str, runs: list[tuple[np.ndarray, np.ndarray]]) -> str:
    """A row of the table: the mean of each seed; over all their episodes the interquartile mean,
    with a 95% interval from a percentile bootstrap of episodes, not of seeds; frames and minutes
    until a seed first had 90% of its last mean, on average."""
    each = [scores(episodes) for _, episodes in runs]
    pooled = np.concatenate(each)
    interval = scipy.stats.bootstrap((pooled,), interquartile_mean, method='percentile',
                                     rng=np.random.default_rng(0)).confidence_interval
    reached = []
    for curve, _ in runs:
        level = progress(curve)
        first = np.argmax(level >= 0.9 * level[-1])
        reached.append((curve['frame'][first], curve['total_time'][first] / 60))
    frames, minutes = np.mean(reached, axis=0)
    return (f"| {name} | {' '.join(f'{values.mean():.2f}' for values in each)} | "
            f'{np.mean([values.mean() for values in each]):.2f} | '
            f'{interquartile_mean(pooled):.2f} [{interval.low:.2f}, {interval.high:.2f}] | '
            f'{frames:,.0f} | {minutes:.0f} |')


def progress(curve: np.ndarray) -> np.ndarray:
    """The mean score of each evaluation: 0 is a random policy's, 1 the expert's."""
    return ((curve['task_return'] - curve['random_return'])
            / (curve['expert_return'] - curve['random_return']))


def plot(tasks: dict[str, list], target: Path):
    """A panel for each task, a line for each seed."""
    fig, all_axes = plt.subplots(1, len(tasks), figsize=(3.4 * len(tasks), 2.8), sharey=True,
                                 layout='constrained', squeeze=False)
    for axes, (task, runs) in zip(all_axes[0], tasks.items(), strict=True):
        for curve, _ in runs:
            axes.plot(curve['frame'] / 1000, progress(curve), '.-')
        axes.axhline(1, color='grey', linewidth=0.8)
        axes.set(title=task, xlabel='thousand frames', ylim=(-0.1, 1.1))
        axes.grid(alpha=0.3)
    all_axes[0][0].set_ylabel('random 0, expert 1')
    with utils.atomic_write(target) as tmp:
        fig.savefig(tmp, dpi=100)
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN')
    parser.add_argument('--picture', type=Path, help='where to draw the learning curves')
    args = parser.parse_args()
    rows, tasks = {}, {}
    for run in args.runs:
        task, overrides, *results = read(run)
        rows.setdefault(f'{task} {overrides}'.strip(), []).append(results)
        tasks.setdefault(task, []).append(results)
    print('| | seeds | mean | IQM [95%] | frames to 90% of the last mean | minutes |\n'
          '|---|---|---|---|---|---|')
    for name, runs in rows.items():
        print(row(name, runs))
    if args.picture:
        plot(tasks, args.picture)


if __name__ == '__main__':
    with utils.exit_on_user_error():
        main()
