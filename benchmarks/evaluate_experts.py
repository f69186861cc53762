"""How good the shipped experts are: python benchmarks/evaluate_experts.py [--episodes 20]

Plays each experts/<task>.pt and a random policy, and what stands in experts/states/, the experts
from states that others from pixels replaced; over 20 episodes or more, it writes experts/README.md
and demo/expert/<task>.gif as well.
"""
import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dmc  # noqa: E402  first: it chooses the OpenGL backend

# isort: split
import utils  # noqa: E402
import video  # noqa: E402
from generate_expert_video import load_expert  # noqa: E402
from train import EVAL  # noqa: E402

# Returns over 20 episodes of 1000 frames that a shipped expert should reach.
BARS = {'reacher_hard': 920, 'finger_spin': 850, 'finger_turn_easy': 900, 'walker_walk': 920,
        'cheetah_run': 700, 'reacher_easy': 940, 'cup_catch': 940, 'cartpole_swingup': 830,
        'hopper_stand': 850, 'walker_run': 550}
MISSED = '(not reached)'
SEED = 2026  # of episodes that no training run was judged by


def shipped() -> list[Path]:
    """All weights under experts/, by task; where there are two, those to be used come first."""
    return sorted((ROOT / 'experts').rglob('*.pt'), key=lambda path: (path.stem, len(path.parts)))


def play(env, act, num_episodes: int) -> np.ndarray:
    """Whole episodes, the same for every policy -> their returns."""
    returns = []
    for episode in range(num_episodes):
        time_step = env.reset(episode_seed=utils.derive_seed(SEED, EVAL, episode))
        returns.append(0.0)
        while not time_step.last():
            time_step = env.step(act(time_step.observation))
            returns[-1] += time_step.reward
    return np.array(returns)


def evaluate(path: Path, num_episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """-> returns of the expert and of a random policy, in the same episodes."""
    agent, env_args = load_expert(path, path.stem)
    expert = play(dmc.make(path.stem, **env_args),
                  lambda obs: agent.act(obs, 0, eval_mode=True), num_episodes)
    env = dmc.make(path.stem, **{**env_args, 'obs': 'states'})  # its observations are not looked at
    rng, shape = np.random.default_rng(SEED), env.action_spec().shape
    return expert, play(env, lambda _: rng.uniform(-1, 1, shape), num_episodes)


def film(path: Path, num_images: int = 50, im_size: int = 128) -> np.ndarray:
    """The start of the first episode, every fourth frame: uint8 (num_images, H, W, 3)."""
    agent, env_args = load_expert(path, path.stem)
    env, frames = dmc.make(path.stem, **env_args), []
    time_step = env.reset(episode_seed=utils.derive_seed(SEED, EVAL, 0))
    every = max(1, 4 // env_args['action_repeat'])
    for step in range(num_images * every):
        if step % every == 0:
            frames.append(env.render(im_size))
        time_step = env.step(agent.act(time_step.observation, 0, eval_mode=True))
    return np.stack(frames)


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


def line(path: Path, num_episodes: int) -> str:
    """Plays, prints what came of it, and -> the table's row."""
    made = utils.load_snapshot(path, 'expert', path.stem)
    env_args = made['made_by']['env_args']
    expert, rand = evaluate(path, num_episodes)
    frames = made['global_step'] * env_args['action_repeat'] if 'global_step' in made else 0
    at_frames, at_end = official(path.stem, frames)
    bar = BARS.get(path.stem)
    # of snapshots from before these were kept
    default = f"train.py task={path.stem} obs={env_args['obs']} seed={made['made_by']['seed']}"
    cells = [path.stem, env_args['obs'], f'{frames:,}' if frames else '',
             f"{made['elapsed'] / 60:.0f} min" if 'elapsed' in made else '',
             made.get('machine', ''), f'**{expert.mean():.0f}** ± {expert.std():.0f}',
             f"{bar or ''}{f' {MISSED}' if bar and expert.mean() < bar else ''}",
             f'{rand.mean():.0f}',
             at_frames if frames else '', at_end,
             f"`{made.get('command') or default}`",
             ', '.join(f'{name} {version}' for name, version in made['versions'].items()),
             f'`{utils.sha256(path)[:16]}`']
    print(f"{path.stem} from {env_args['obs']}: {expert.mean():.1f} +- {expert.std():.1f}, "
          f'lowest {expert.min():.0f}; random {rand.mean():.1f}', flush=True)
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--episodes', type=int, default=20)
    num_episodes = parser.parse_args().episodes
    if num_episodes < 1:
        parser.error('--episodes is at least 1')
    names = ['task', 'obs', 'frames', 'time', 'machine', 'return', 'bar', 'random',
             'DrQ-v2, same frames', 'DrQ-v2, end', 'command', 'versions', 'sha256']
    lines = [line(path, num_episodes) for path in shipped()]
    if num_episodes < 20:
        return
    text = ('# Trained experts\n\n'
            'Made by `python benchmarks/evaluate_experts.py`: return over '
            f'{num_episodes} episodes of 1000 frames, mean ± standard deviation, of the '
            'deterministic policy. "bar" is what it should reach; "frames" is how far the run had '
            'come, whether or not it was to go on. DrQ-v2 learns from pixels, with '
            'action_repeat=2: its figures are means over the seeds of its published curves, at the '
            'same number of frames and at their end. Of snapshots from before machine and command '
            'were kept, the first is blank and the second put together from task, obs and seed. '
            '"sha256" is the first 16 digits of the file\'s. Where a task has two, the expert from '
            'pixels is `experts/<task>.pt`, and the one from states that it replaced is in '
            '`experts/states/`.\n\n'
            f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n" + '\n'.join(lines) + '\n')
    with utils.atomic_write(ROOT / 'experts/README.md') as tmp:
        tmp.write_text(text)
    for path in (ROOT / 'experts').glob('*.pt'):
        video.save(ROOT / f'demo/expert/{path.stem}.gif', film(path), fps=15)


if __name__ == '__main__':
    with utils.exit_on_user_error():
        main()
