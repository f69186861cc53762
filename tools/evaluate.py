"""How good experts and imitators are: python tools/evaluate.py [SNAPSHOT ...]

Plays each snapshot of train.py or train_ac.py, or the one in a run's folder, and prints its returns
beside those of a random policy, an imitator's beside the expert's as well. It films the episodes
from the worst to the best (`--show 1`: the median) into SNAPSHOT's .mp4, or `--out` FILE.mp4 or
.gif. An imitator meets held-out demonstrations, as in training; what it shows are episodes in which
there was something to do, where the expert does better than a random policy.

Without a snapshot it plays each experts/<task>.pt; over 20 episodes or more, it writes
experts/README.md, where returns seen on other CPUs stay, and demo/expert/<task>.gif as well.
"""
import argparse
import itertools
import math
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dmc  # first: it chooses the OpenGL backend

# isort: split
import snapshots
import utils
import video
from ac_agent import load_imitator
from contexts import Scenery
from generate_expert_video import frame_rate, load_expert
from logger import SUCCESS, episode_scores
from train import EVAL

# Returns over 20 episodes of 1000 frames that a shipped expert should reach.
BARS = {'reacher_hard': 920, 'finger_spin': 850, 'finger_turn_easy': 900, 'walker_walk': 920,
        'cheetah_run': 700, 'reacher_easy': 940, 'cup_catch': 940, 'cartpole_swingup': 830,
        'hopper_stand': 850, 'walker_run': 550}
MISSED = '(not reached)'
COLUMNS = ['task', 'obs', 'frames', 'time', 'machine', 'return', 'bar', 'random',
           'DrQ-v2, same frames', 'DrQ-v2, end', 'command', 'versions', 'sha256']
RETURN = COLUMNS.index('return')
SEED = 2026  # of episodes that no training run was judged by
MOST_FRAMES = {'.mp4': 250, '.gif': 30}  # of an episode; of more, every second, third, ...


def table_row(cells: Iterable) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def table(names: list[str], rows: Iterable[Iterable] = ()) -> str:
    """Return a Markdown table, or its head only."""
    return '\n'.join([table_row(names), f"|{'---|' * len(names)}", *map(table_row, rows)])


def shipped() -> list[Path]:
    """Return the paths of all weights in experts/, by task."""
    return sorted((ROOT / 'experts').glob('*.pt'))


def cpu_name() -> str:
    """Return this CPU's name, ending in 'with AMX' where it has AMX, which rounds differently."""
    info = Path('/proc/cpuinfo').read_text()
    name = re.search(r'model name\s*: (.*)', info)
    name = re.sub(r'\(R\)|\(TM\)|Processor|\s+', ' ', name[1]) if name else platform.machine()
    return ' '.join(name.split()) + (' with AMX' if 'amx_bf16' in info else '')


def seen_on(returns: np.ndarray, earlier: str = '') -> str:
    """Return the table's cell of returns, one figure for each CPU; `earlier`, the same file's cell,
    keeps those of the other CPUs."""
    figures = dict(re.findall(r'(?:^|; )([^;:]+): ([^;]+)', earlier))
    figures[cpu_name()] = f'**{returns.mean():.0f}** ± {returns.std():.0f}'
    return '; '.join(f'{name}: {figure}' for name, figure in sorted(figures.items()))


class Player(NamedTuple):
    """A policy in its environment; `start` gives what an episode's seed decides beside the task."""

    env: dmc.Wrapper
    act: Callable[[np.ndarray], np.ndarray]
    start: Callable[[int], dict] = lambda episode_seed: {}

    def play(self, seed: int, episode: int) -> Iterator:
        """Yield the time steps of a whole episode, the same start for every policy."""
        episode_seed = utils.derive_seed(seed, EVAL, episode)
        time_step = self.env.reset(episode_seed=episode_seed, **self.start(episode_seed))
        yield time_step
        while not time_step.last():
            time_step = self.env.step(self.act(time_step.observation))
            yield time_step

    def results(self, num_episodes: int, seed: int = SEED) -> list[dict[str, float]]:
        """Return for each episode its 'return' and its 'steps', and what else the environment
        tells."""
        results = []
        for episode in range(num_episodes):
            rewards = [time_step.reward for time_step in self.play(seed, episode)][1:]
            info = self.env.episode_info  # an imitator's rewards are not the task's
            results.append({'return': info.get('task_return', sum(rewards)),
                            'steps': len(rewards), **info})
        return results


def open_expert(path: Path, task: str, contexts: str = 'own') -> tuple[Player, Player]:
    """Return the expert, in the task's own look or in random held-out contexts, which it sees where
    it acts on pixels; and a random policy."""
    agent, env_args = load_expert(path, task)
    def act(obs):
        return agent.act(obs, 0, eval_mode=True)
    if contexts == 'own':
        expert = Player(dmc.make(task, **env_args), act)
    else:
        cfg = OmegaConf.load(ROOT / 'cfgs/generate_expert_video.yaml')
        scenery = Scenery(OmegaConf.to_container(cfg.scenery))
        expert = Player(dmc.make(task, scenery=scenery, **env_args), act, lambda episode_seed: {
            'context': scenery.sample(np.random.default_rng(episode_seed), 'held_out')})
    env = dmc.make(task, **{**env_args, 'obs': 'states'})  # its observations are not looked at
    rng, shape = np.random.default_rng(SEED), env.action_spec().shape
    return expert, Player(env, lambda _: rng.uniform(-1, 1, shape))


def evaluate(path: Path, num_episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the returns of the expert and of a random policy, in the same episodes."""
    return tuple(np.array([result['return'] for result in player.results(num_episodes)])
                 for player in open_expert(path, path.stem))


def film_episode(player: Player, seed: int, episode: int, result: dict, every: int) -> np.ndarray:
    """Return a clip of every so many frames of the episode, see `video.episode_clip`."""
    panels = [player.env.panels(video.PANEL)
              for step, _ in enumerate(player.play(seed, episode)) if step % every == 0]
    return video.episode_clip(panels, result['return'], result.get('expert_return'))


def spread(values: np.ndarray, num: int) -> list[int]:
    """Return the indices of `num` values from the lowest to the highest; of one, the median's."""
    order = np.argsort(values, kind='stable')
    at = np.linspace(0, len(values) - 1, num) if num > 1 else [len(values) // 2]
    return [int(order[round(place)]) for place in at]


def judge(path: Path, args: argparse.Namespace) -> str:
    """Play and film a snapshot, and return lines that say what came of it.

    Raises: UserError for a file that does not act, and options that do not go with its kind.
    """
    path = path / 'snapshot.pt' if path.is_dir() else path
    made = snapshots.load_snapshot(path, None,
                                   remedy='choose a snapshot of train.py or train_ac.py')
    kind, task = made['kind'], made['task']
    if kind == 'imitator':
        if args.contexts != 'own':
            raise utils.UserError(f'{path} is an imitator, which acts in the contexts of its '
                                  'demonstrations: leave --contexts out.')
        env, agent = load_imitator(path, args.translator or f'ct/{task}.pt',
                                   args.videos or f'videos/{task}/valid', task, evaluate=True)
        player = Player(env, lambda obs: agent.act(obs, 0, eval_mode=True))
    elif kind == 'expert':
        if args.translator or args.videos:
            raise utils.UserError(f'{path} is an expert, which follows no videos: leave '
                                  '--translator and --videos out.')
        player, rand = open_expert(path, task, args.contexts)
    else:
        raise utils.UserError(f'{path} is a {kind}, which does not act: choose a snapshot of '
                              'train.py or train_ac.py.')
    results = player.results(args.episodes, args.seed)
    returns = np.array([result['return'] for result in results])
    text = (f'{path}, {kind} of {task}: {returns.mean():.1f} ± {returns.std():.1f} over '
            f'{len(returns)} episodes, lowest {returns.min():.1f}')
    if kind == 'imitator' and 'expert_return' not in results[0]:  # of own videos
        means = {name: np.mean([result[name] for result in results])
                 for name in ('random_return', 'distance', 'distance_other') if name in results[0]}
        scores = -np.array([result['distance'] for result in results])
        other = (f", from another video {means['distance_other']:.3f}"
                 if 'distance_other' in means else '')
        text += (f"; random {means['random_return']:.1f}; squared distance from its video "
                 f"{means['distance']:.3f}{other}; no score, since the return of the videos' "
                 'expert is not known')
    elif kind == 'imitator':
        expert, low = (np.array([result[f'{who}_return'] for result in results])
                       for who in ('expert', 'random'))
        scores = episode_scores(returns, expert, low)
        text += (f'; expert {expert.mean():.1f} ± {expert.std():.1f}, random {low.mean():.1f}; '
                 f'score {scores.mean():.2f}; {np.sum(scores >= SUCCESS)} of {len(scores)} score '
                 f'{SUCCESS} or more')
    else:
        scores = returns
        low = [result['return'] for result in rand.results(args.episodes, args.seed)]
        text += f'; random {np.mean(low):.1f}'
    if not args.show:
        return text
    made_by = made['made_by']
    fps = frame_rate(player.env, made_by.get('env_args', made_by))
    target = args.out or path.with_suffix('.mp4')
    every = math.ceil(max(result['steps'] for result in results)
                      / MOST_FRAMES[target.suffix])
    shown = [episode for episode, result in enumerate(results) if 'expert_return' not in result
             or result['expert_return'] > result['random_return']] or range(len(results))
    clips = [film_episode(player, args.seed, shown[i], results[shown[i]], every)
             for i in spread(scores[shown], min(args.show, len(shown)))]
    video.save(target, np.concatenate(clips), fps / every)
    return f'{text}\nvideo: {target}'


def preview(path: Path, num_images: int = 50, im_size: int = 128) -> np.ndarray:
    """The start of the first episode, every fourth frame: uint8 (num_images, H, W, 3)."""
    _, env_args = load_expert(path, path.stem)
    player, _ = open_expert(path, path.stem)
    every = max(1, 4 // env_args['action_repeat'])
    steps = itertools.islice(player.play(SEED, 0), 0, num_images * every, every)
    return np.stack([player.env.render(im_size) for _ in steps])


def published(task: str) -> np.ndarray:
    """DrQ-v2's curve, with fields frame, mean, sd, seeds; empty for a task that it leaves out."""
    curves = np.genfromtxt(ROOT / 'benchmarks/drqv2_curves.csv', delimiter=',', names=True,
                           dtype=None, encoding='utf8')
    return np.sort(curves[curves['task'] == task], order='frame')


def official(task: str, frames: int) -> tuple[str, str]:
    """DrQ-v2's mean return over its seeds, at `frames` (between two points that are published, on
    the line that joins them) and at the end of its curve."""
    curve = published(task)
    if not len(curve):
        return '', ''
    end = curve[-1]
    return (f"{np.interp(frames, curve['frame'], curve['mean']):.0f}",
            f"{end['mean']:.0f} at {end['frame'] / 1e6:.1f}M")


def line(path: Path, num_episodes: int, earlier: list[list[str]]) -> list[str]:
    """Play, print what came of it, and return the cells of the table's row; `earlier`: its rows as
    they stand."""
    made = snapshots.load_snapshot(path, 'expert', path.stem)
    env_args = made['made_by']['env_args']
    expert, rand = evaluate(path, num_episodes)
    frames = made['global_step'] * env_args['action_repeat'] if 'global_step' in made else 0
    at_frames, at_end = official(path.stem, frames)
    bar = BARS.get(path.stem)
    # older snapshots have no command
    default = f"train.py task={path.stem} obs={env_args['obs']} seed={made['made_by']['seed']}"
    digest = f'`{snapshots.sha256(path)[:16]}`'
    returns = seen_on(expert, *(row[RETURN] for row in earlier if row[-1] == digest))
    is_missed = bar and min(map(int, re.findall(r'\*\*(\d+)\*\*', returns))) < bar
    cells = [path.stem, env_args['obs'], f'{frames:,}' if frames else '',
             f"{made['elapsed'] / 60:.0f} min" if 'elapsed' in made else '',
             made.get('machine', ''), returns, f"{bar or ''}{f' {MISSED}' if is_missed else ''}",
             f'{rand.mean():.0f}',
             at_frames if frames else '', at_end,
             f"`{made.get('command') or default}`",
             ', '.join(f'{name} {version}' for name, version in made['versions'].items()),
             digest]
    print(f"{path.stem} from {env_args['obs']}: {expert.mean():.1f} +- {expert.std():.1f}, "
          f'lowest {expert.min():.0f}; random {rand.mean():.1f}', flush=True)
    return cells


def write_table(num_episodes: int):
    """Play all that is shipped; over 20 episodes or more, write experts/README.md and pictures."""
    target = ROOT / 'experts/README.md'
    there = target.read_text() if target.exists() else ''
    over = f'return over {num_episodes} episodes of 1000 frames'
    earlier = [row.strip('| ').split(' | ') for row in there.splitlines()
               if row.startswith('| ')] if over in there else []
    lines = [line(path, num_episodes, earlier) for path in shipped()]
    if num_episodes < 20:
        return
    text = ('# Trained experts\n\n'
            f'Made by `python tools/evaluate.py`: {over}, mean ± standard deviation, of the '
            'deterministic policy, on each CPU where it was played, since they round differently. '
            '"bar" is what it should reach; "frames" is how far the run had come, whether or not '
            'it was to go on. DrQ-v2 learns from pixels, with action_repeat=2: its figures are '
            'means over the seeds of its published curves, at the same number of frames and at '
            'their end. Where machine and command were not kept yet, the first is blank and the '
            'second put together from task, obs and seed. "sha256" is the first 16 digits of the '
            "file's.\n\n"
            f'{table(COLUMNS, lines)}\n')
    with snapshots.atomic_write(target) as tmp:
        tmp.write_text(text)
    for path in shipped():
        video.save(ROOT / f'demo/expert/{path.stem}.gif', preview(path), fps=15)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('snapshots', nargs='*', type=Path, metavar='SNAPSHOT')
    parser.add_argument('--episodes', type=int, default=20)
    parser.add_argument('--seed', type=int, default=SEED,
                        help='which episodes: a run was judged by those of its own seed')
    parser.add_argument('--contexts', choices=('own', 'random'), default='own',
                        help="an expert's: the task's own look, or held-out ones")
    parser.add_argument('--translator', help="an imitator's, ct/<task>.pt")
    parser.add_argument('--videos', help="an imitator's demonstrations, videos/<task>/valid")
    parser.add_argument('--show', type=int, default=3, help='episodes in the video; 0: no video')
    parser.add_argument('--out', type=Path, help='the video: .mp4 or .gif')
    args = parser.parse_args()
    if args.episodes < 1:
        parser.error('--episodes is at least 1')
    if min(args.seed, args.show) < 0:
        parser.error('--seed and --show are at least 0')
    if args.out and (len(args.snapshots) != 1 or args.out.suffix not in MOST_FRAMES):
        parser.error('--out is an .mp4 or .gif, of one SNAPSHOT')
    if not args.snapshots:
        write_table(args.episodes)
    for path in args.snapshots:
        print(judge(path, args), flush=True)


if __name__ == '__main__':
    with utils.exit_on_user_error():
        main()
