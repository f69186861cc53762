"""How well imitators do, over seeds and tasks: python tools/report.py RUN [RUN ...]

Each RUN is a folder that train_ac.py wrote to the end. Runs that differ in nothing but the seed
share a row. Prints a table with each row's score, its interval and what it took, and writes a page
into the folder `--out`: the same table, learning curves, bars where a task's rows differ in
options, the translators' own scores, and the command, machine and packages behind each run.
"""
import argparse
import json
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from evaluate import table
from matplotlib.ticker import EngFormatter
from omegaconf import DictConfig, OmegaConf

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import snapshots
import utils
import video
from logger import SUCCESS, episode_scores

# Options that make no other row; a translator does, by its hash.
UNSAID = ('task', 'seed', 'use_tb', 'save_video', 'device', 'translator')
PAGE = """# Imitators

Made by `python tools/report.py`. A score is (imitator - random) / (expert - random): 0 is a
random policy's, 1 the expert's. Episodes are held out, in held-out contexts. *IQM* is the
interquartile mean over all seeds' episodes of the last evaluation. Its 95% interval is a percentile
bootstrap: with two seeds or more it draws seeds, and from each drawn seed episodes; with one seed
(marked *) it draws episodes only, and says nothing of other seeds. *Score ≥ {success}* counts
episodes. The last columns are means over seeds.

{table}

![learning curves: thin lines are seeds, thick ones their mean](curves.png)

Bands are 95% bootstrap intervals of the mean over seeds; of three seeds that is about their range.

{sections}
"""


def scores_of(rows: np.ndarray) -> np.ndarray:
    """Return the scores of rows with the named returns; of one row of means, the mean score."""
    return episode_scores(*(rows[f'{who}_return'] for who in ('task', 'expert', 'random')))


class Run(NamedTuple):
    """A finished run; `curve` is its eval.csv and `episodes` its episodes.csv, as arrays with named
    columns."""

    folder: Path
    cfg: DictConfig
    options: dict[str, str]  # that it was given, but for those that make no other row
    curve: np.ndarray
    episodes: np.ndarray
    made: dict  # its snapshot, without weights

    @property
    def made_by(self) -> dict:
        return self.made['made_by']

    def setting(self, key: str) -> str:
        """What an option was in this run, whether it was given or not."""
        if key == 'translator':
            return self.made_by['translator_sha256'][:8]
        if key == 'oracle':
            return self.made_by.get('oracle', 'none')
        value = OmegaConf.select(self.cfg, key)
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None:  # or no key of the settings, but a choice of a file
            value = self.options.get(key)
        return value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))

    @property
    def scores(self) -> np.ndarray:
        """The score of each episode of the last evaluation."""
        return scores_of(self.episodes)

    @property
    def progress(self) -> np.ndarray:
        """The mean score of each evaluation."""
        return np.array([scores_of(means) for means in self.curve])

    @property
    def steps(self) -> np.ndarray:
        """Agent steps before each evaluation; a resumed run's may come a few later than is due."""
        frames, every = self.curve['frame'], self.cfg.get('eval_every_frames') or 1
        due = np.round(frames / every) * every
        frames = np.where(np.abs(frames - due) < every / 100, due, frames)
        return (frames / self.made_by['action_repeat']).astype(int)


class Task(NamedTuple):
    """All runs of a task. Rows are named by the settings in which they differ from `base`, the ones
    that most rows have."""

    name: str
    base: str
    rows: dict[str, list[Run]]


def read(folder: Path) -> Run:
    """Return the run in this folder.

    Raises: UserError for what is no finished run of train_ac.py, or has no score.
    """
    config, overrides, *results, snapshot = paths = [folder / name for name in (
        '.hydra/config.yaml', '.hydra/overrides.yaml', 'eval.csv', 'episodes.csv', 'snapshot.pt')]
    for path in paths:
        if not path.exists():
            raise utils.UserError(f'{path} is missing: choose the folder of a finished run of '
                                  'train_ac.py, or start this one again, with its options and '
                                  f'hydra.run.dir={folder}.')
    with snapshots.must_fit(folder, 'choose the folder of a finished run of train_ac.py'):
        cfg = OmegaConf.load(config)
        made = snapshots.load_snapshot(snapshot, 'imitator', cfg.task_name)
        if video.is_imported(made['made_by']):
            raise utils.UserError(f'{folder} imitated your own videos, and what their expert '
                                  'returned is not known: runs on own videos have no score, leave '
                                  'it out.')
        options = dict(text.lstrip('+').split('=', 1) for text in OmegaConf.load(overrides))
        options = {key: value for key, value in options.items()
                   if key not in UNSAID and not key.startswith('hydra')}
        run = Run(folder, cfg, options, *(
            np.atleast_1d(np.genfromtxt(path, delimiter=',', names=True)) for path in results),
            {key: made.get(key) for key in ('made_by', 'command', 'machine', 'versions')})
        _ = run.scores, run.progress, run.steps  # what is missing is told here
        return run


def sort(runs: list[Run]) -> list[Task]:
    """Group runs by task, then by settings. Raises UserError for two runs with the same settings
    and seed."""
    tasks = {}
    for run in runs:
        tasks.setdefault(run.cfg.task_name, []).append(run)
    return [sort_task(name, its_runs) for name, its_runs in tasks.items()]


def sort_task(name: str, runs: list[Run]) -> Task:
    keys = [*sorted(set().union(*(run.options for run in runs))), 'translator']
    if any('oracle' in run.made_by for run in runs):  # see oracles.py
        keys.append('oracle')
    rows = {}
    for run in runs:
        row = rows.setdefault(tuple(run.setting(key) for key in keys), [])
        for other in row:
            if other.made_by['seed'] == run.made_by['seed']:
                raise utils.UserError(f'{other.folder} and {run.folder} have the same task, '
                                      'options and seed: leave one of them out.')
        row.append(run)
    base = [Counter(values).most_common(1)[0][0] for values in zip(*rows, strict=True)]

    def said(values) -> str:
        return ' '.join(f'{key}={value}' for key, value in zip(keys, values, strict=True) if value)
    return Task(name, said(base), {
        said([value if value != common else None
              for value, common in zip(row, base, strict=True)]) or 'base': its_runs
        for row, its_runs in rows.items()})


# ------------------------------------------------------------------------------------- statistics

def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of the middle half (Agarwal et al. 2021)."""
    return scipy.stats.trim_mean(values, 0.25, axis=axis)


def interval(each: list[np.ndarray]) -> tuple[float, float]:
    """Return the 95% interval of the interquartile mean over all seeds' episodes, from a percentile
    bootstrap.

    With two seeds or more it is hierarchical: seeds are drawn with replacement, and from each drawn
    seed its episodes with replacement, as many as the seed with the fewest has. Episodes of one
    seed share a training run, so drawing them alone would claim too much. With one seed only
    episodes can be drawn; with one episode there is no interval, but nan.

    Args:
      each: scores (num_episodes,) of each seed.
    """
    rng = np.random.default_rng(0)

    def of_seeds(seeds: np.ndarray, axis: int) -> np.ndarray:  # (..., S) -> (...)
        seeds = seeds.astype(int)
        drawn = rng.random((*seeds.shape, num_episodes)) * lengths[seeds][..., None]
        values = padded[seeds[..., None], drawn.astype(int)]
        return interquartile_mean(values.reshape(*seeds.shape[:-1], -1))
    data, statistic = each[0], interquartile_mean
    if len(each) > 1:
        lengths = np.array([len(values) for values in each])
        num_episodes = lengths.min()
        padded = np.stack([np.resize(values, lengths.max()) for values in each])
        data, statistic = np.arange(len(each)), of_seeds
    elif len(data) == 1:
        return float('nan'), float('nan')
    return tuple(scipy.stats.bootstrap((data,), statistic, method='percentile', vectorized=True,
                                       rng=np.random.default_rng(1)).confidence_interval)


def over_seeds(runs: list[Run]) -> tuple[np.ndarray, np.ndarray, tuple | None]:
    """Return agent steps (n,) of the evaluations that all runs have, scores (S, n), and the 95%
    interval of their mean over seeds, two arrays (n,); None for one seed."""
    steps = sorted(set.intersection(*(set(run.steps.tolist()) for run in runs)))
    scores = np.stack([run.progress[np.isin(run.steps, steps)] for run in runs])
    band = None
    if len(runs) > 1:
        band = tuple(scipy.stats.bootstrap((scores,), np.mean, axis=0, method='percentile',
                                           rng=np.random.default_rng(0)).confidence_interval)
    return np.array(steps), scores, band


# ------------------------------------------------------------------------------------------ tables

def two_digits(values: np.ndarray) -> str:
    return ', '.join(f'{round(value, 2) + 0:.2f}' for value in values)  # + 0: there is no -0.00


def cells(runs: list[Run]) -> list[str]:
    """What the main table says of a row, see `main_table`."""
    each = [run.scores for run in runs]
    pooled, means = np.concatenate(each), [values.mean() for values in each]
    reached = []
    for run in runs:
        first = np.argmax(run.progress >= 0.9 * run.progress[-1])
        reached.append([run.steps[first], run.curve['frame'][first],
                        run.curve['total_time'][first] / 60, run.curve['total_time'][-1] / 60])
    steps, frames, minutes, all_minutes = np.mean(reached, axis=0)
    return [', '.join(str(run.made_by['seed']) for run in runs), two_digits(means),
            two_digits([np.mean(means)]), f'{two_digits([interquartile_mean(pooled)])} '
            f"[{two_digits(interval(each))}]{'*' * (len(runs) == 1)}",
            f'{np.sum(pooled >= SUCCESS)} of {len(pooled)}', f'{steps:,.0f} ({frames:,.0f})',
            f'{minutes:.1f}', f'{all_minutes:.1f}']


def main_table(tasks: list[Task]) -> str:
    return table(
        ['', 'seeds', 'score of each', 'mean', 'IQM [95%]', f'score ≥ {SUCCESS}',
         'agent steps (frames) to 90% of the last score', 'minutes to that', 'minutes in all'],
        [[task.name + (f' `{name}`' if len(task.rows) > 1 else ''), *cells(runs)]
         for task in tasks for name, runs in task.rows.items()])


def evaluations(task: Task) -> str:
    """The scores after each evaluation, those of a row's seeds after one another."""
    curves = {name: over_seeds(runs) for name, runs in task.rows.items()}
    steps = sorted({int(step) for at, *_ in curves.values() for step in at})
    lines = []
    for name, (at, scores, _) in curves.items():
        known = dict(zip(at.tolist(), scores.T, strict=True))
        lines.append([f'`{name}`', *(two_digits(known.get(step, ())) for step in steps)])
    return table(['agent steps', *(f'{step:,}' for step in steps)], lines)


def translators(tasks: list[Task]) -> str:
    """Return the translators' own scores, blank where the file has moved or changed."""
    users = {}
    for run in all_runs(tasks):
        users.setdefault(run.made_by['translator_sha256'], []).append(run)
    lines = []
    for sha256, runs in users.items():
        cfg = runs[0].cfg
        path, task = cfg.get('translator') or cfg.snapshot, cfg.task_name  # of earlier runs
        there = snapshots.newest_snapshot(path) and snapshots.sha256(path) == sha256
        scores = (snapshots.load_snapshot(path, 'translator', task).get('scores', {})
                  if there else {})
        psnr, copy = (np.mean([run.curve[f'psnr_{what}'][-1] for run in runs])
                      for what in ('translation', 'copy_first'))
        pairs = [('agreement', 'agreement_play', '{:.3f} / {:.3f}'),
                 ('rank', 'rank_play', '{:.2f} / {:.2f}'),
                 ('probe', 'probe_play', '{:.2f} / {:.2f}'),
                 ('probe_gross', 'probe_gross_play', '{:.1%} / {:.1%}'),
                 ('open_loop', 'open_loop_still', '{:.2f} ({:.2f})')]
        lines.append([task, sha256[:8], f"`{path}`{'' if there else ': not there any more'}",
                      f'{psnr:.1f} dB ({copy:.1f})',
                      *(text.format(scores[one], scores[other]) if {one, other} <= scores.keys()
                        else '' for one, other, text in pairs)])
    return table(['', 'sha256', 'translator', "PSNR in the runs' evaluations (copying the first "
                  'frame)', 'agreement, demonstrations / play', 'rank', 'probe, rad',
                  'gross errors', 'open loop (standing still)'], lines)


def origins(tasks: list[Task]) -> str:
    """What made each run."""
    lines = []
    for run in all_runs(tasks):
        command = (run.made['command'] or '').replace('|', '\\|')
        lines.append([str(run.folder), f'`python {command}`' if command else 'not kept',
                      run.made['machine'] or 'not kept',
                      ', '.join(f'{name} {number}' for name, number in
                                run.made['versions'].items())])
    return table(['run', 'command', 'machine', 'versions'], lines)


def all_runs(tasks: list[Task]) -> list[Run]:
    return [run for task in tasks for runs in task.rows.values() for run in runs]


# ---------------------------------------------------------------------------------------- pictures

def draw_curves(axes, rows: list[list[Run]], colours: list):
    """For each row a thin line for each seed, their mean and its band."""
    for runs, colour in zip(rows, colours, strict=True):
        steps, scores, band = over_seeds(runs)
        if band:
            axes.plot(steps, scores.T, color=colour, linewidth=0.8, alpha=0.6)
            axes.fill_between(steps, *band, color=colour, alpha=0.2, linewidth=0)
        axes.plot(steps, scores.mean(0), '.-', color=colour, linewidth=2)
    for level, name in ((0, 'random'), (1, 'expert')):
        axes.axhline(level, color='grey', linewidth=0.8, linestyle='--')
        axes.annotate(name, (1, level), xycoords=('axes fraction', 'data'), fontsize='x-small',
                      color='dimgrey', ha='right', va='bottom', textcoords='offset points',
                      xytext=(-2, 1))
    low, high = axes.get_ylim()
    axes.set(xlabel='agent steps', ylim=(min(-0.1, low), max(1.12, high)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=''))
    axes.grid(alpha=0.3)


def pick_colours(task: Task) -> list:
    """One for each row, the same in all pictures."""
    return list(plt.cm.turbo(np.linspace(0.08, 0.92, len(task.rows)))) if len(task.rows) > 1 else [
        'C0']


def plot_curves(tasks: list[Task], target: Path):
    """A panel for each task."""
    columns = min(len(tasks), 4)
    height = -(-len(tasks) // columns)
    fig, all_axes = plt.subplots(height, columns, figsize=(3.1 * columns, 2.7 * height),
                                 sharey=True, layout='constrained', squeeze=False)
    for axes in all_axes.flat[len(tasks):]:
        axes.remove()
    for axes, task in zip(all_axes.flat, tasks, strict=False):
        draw_curves(axes, list(task.rows.values()), pick_colours(task))
        axes.set_title(task.name)
    for axes in all_axes[:, 0]:
        axes.set_ylabel('score')
    save(fig, target)


def plot_rows(task: Task, target: Path):
    """A bar for each row, its IQM and interval, and beside them the curves in the same colours."""
    rows, colours = list(task.rows.values()), pick_colours(task)
    each = [[run.scores for run in runs] for runs in rows]
    values = np.array([interquartile_mean(np.concatenate(scores)) for scores in each])
    ends = np.array([interval(scores) for scores in each])
    names = [textwrap.fill(name, 50, break_long_words=False) for name in task.rows]
    heights = np.array([name.count('\n') + 2 for name in names])  # in lines
    places = np.cumsum(heights) - heights / 2
    fig, (bars, curves) = plt.subplots(1, 2, figsize=(12, max(2.8, 1 + 0.17 * heights.sum())),
                                       layout='constrained')
    bars.barh(places, values, 1.4, xerr=np.abs(ends - values[:, None]).T, color=colours,
              alpha=0.8, error_kw={'elinewidth': 1.2, 'capsize': 3})
    bars.set_yticks(places, names, fontsize='small')
    for place, value, end, runs in zip(places, values, ends, rows, strict=True):
        bars.annotate(f"{value:.2f}, {len(runs)} seed{'s' * (len(runs) > 1)}",
                      (max(0, value, *np.nan_to_num(end)), place), va='center',
                      textcoords='offset points', xytext=(6, 0), fontsize='small')
    bars.axvline(1, color='grey', linewidth=0.8, linestyle='--')
    bars.set(xlabel='score: IQM and its 95% interval',
             xlim=(min(0, np.nanmin(ends, initial=0)), max(1, np.nanmax(ends, initial=0)) + 0.35))
    bars.invert_yaxis()
    bars.grid(axis='x', alpha=0.3)
    draw_curves(curves, rows, colours)
    curves.set_ylabel('score')
    fig.suptitle(task.name)
    save(fig, target)


def save(fig, target: Path):
    with snapshots.atomic_write(target) as tmp:
        fig.savefig(tmp, dpi=120)
    plt.close(fig)


def write_page(tasks: list[Task], folder: Path) -> Path:
    """Write report.md and its pictures, and return the page's path."""
    plot_curves(tasks, folder / 'curves.png')
    sections = []
    for task in tasks:
        sections += [f'## {task.name}', f'Settings, where a row does not say otherwise: '
                     f'`{task.base}` (`translator` is the beginning of its sha256). '
                     'Scores after each evaluation, seed by seed:', evaluations(task)]
        if len(task.rows) > 1:
            plot_rows(task, folder / f'{task.name}.png')
            sections.append(f'![{task.name}: scores by settings]({task.name}.png)')
    sections += ['## Translators', 'Their own scores, on held-out videos; the README says what '
                 'they mean.', translators(tasks), '## What made each run', origins(tasks)]
    with snapshots.atomic_write(folder / 'report.md') as tmp:
        tmp.write_text(PAGE.format(success=SUCCESS, table=main_table(tasks),
                                   sections='\n\n'.join(sections)))
    return folder / 'report.md'


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN')
    parser.add_argument('--out', type=Path, default=Path('ac_local/report'),
                        help="the page's folder (ac_local/report)")
    parser.add_argument('--picture', type=Path, help='where else to draw the learning curves')
    args = parser.parse_args()
    tasks = sort([read(run) for run in args.runs])
    print(main_table(tasks))
    if args.picture:
        plot_curves(tasks, args.picture)
    print(f'\npage: {write_page(tasks, args.out)}')


if __name__ == '__main__':
    with utils.exit_on_user_error():
        main()
