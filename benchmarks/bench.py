"""How fast each part is beside a plain way to compute the same: python benchmarks/bench.py

    python benchmarks/bench.py [part ...] [--device auto|cpu|cuda] [--json]

Ours and the plain one (plain.py) take turns in one process; the table gives medians and their
ratio. Times depend on the machine and on what else it does; ratios much less.
"""
import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dmc  # noqa: E402  first: it chooses the OpenGL backend

# isort: split
import plain  # noqa: E402
import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

import ct_model  # noqa: E402
import generate_expert_video  # noqa: E402
import train_ac  # noqa: E402
import train_ct  # noqa: E402
import utils  # noqa: E402
import video  # noqa: E402
from ac_agent import ACAgent  # noqa: E402
from drqv2 import DrQV2Agent, random_shift  # noqa: E402
from replay_buffer import ReplayBuffer  # noqa: E402

TASK = 'reacher_hard'


class Row(NamedTuple):
    """A line of the table."""

    part: str
    unit: str           # of what `amount` counts
    amount: float       # what one call gets done
    ours: Callable
    plain: Callable | None
    repeats: int = 5
    floor: float | None = None  # seconds a call takes at the machine's peak, where that is known


def config(name: str, *overrides: str):
    with initialize_config_dir(str(ROOT / 'cfgs'), version_base='1.3'):
        return compose(name, [f'task={TASK}', *overrides])


class PlainPixels:
    """The suite's task with action repeat, pictures and stacks, and nothing shared."""

    def __init__(self, im_size: int = 84):
        self.env, self.im_size = dmc.make(TASK, obs='states'), im_size

    def reset(self):
        return self._observe(self.env.reset(), 3)

    def step(self, action):
        return self._observe(self.env.step(action), 1)

    def _observe(self, time_step, num_new: int):
        frame = plain.render(self.env.physics, self.im_size, 0).transpose(2, 0, 1)
        self.frames = (self.frames[1:] if num_new == 1 else []) + [frame] * num_new
        return time_step._replace(observation=np.concatenate(self.frames))


def walk(env, num_steps: int):
    """Random steps: -> time_steps and actions."""
    rng, time_step = np.random.default_rng(0), env.reset()
    yield time_step, None
    for _ in range(num_steps):
        action = rng.uniform(-1, 1, 2).astype(np.float32)
        time_step = env.step(action)
        yield time_step, action
        if time_step.last():
            yield env.reset(), None


def rendering(device, folder) -> Iterator[Row]:
    for task in (TASK, 'finger_spin', 'walker_walk'):
        ours, suite = dmc.load_suite(task), dmc.load_suite(task)
        for env in (ours, suite):
            env.reset(episode_seed=1)
        pictures = ours.render(84), plain.render(suite.physics, 84, 0)
        difference = np.abs(pictures[0].astype(float) - pictures[1]).mean()
        yield Row(f'frame 84x84, {task} (differs by {difference:.3f}/255)', 'frames', 20,
                  lambda ours=ours: [ours.render(84) for _ in range(20)],
                  lambda suite=suite: [plain.render(suite.physics, 84, 0) for _ in range(20)])
    envs = dmc.make(TASK), PlainPixels()
    for env in envs:
        env.reset()
    action = np.zeros(2, np.float32)
    steps = [lambda env=env: [env.step(action) for _ in range(20)] for env in envs]
    yield Row('environment step, pixels', 'frames', 40, *steps)


def fill(buffers, env, num_steps: int):
    for time_step, action in walk(env, num_steps):
        for buffer in buffers:
            buffer.add(time_step, action)


def ring(folder: Path, env, device) -> ReplayBuffer:
    spec = env.observation_spec()
    return ReplayBuffer(folder, spec, env.action_spec(), 20_000, 3, 0.99,
                        3 if len(spec.shape) == 3 else 1, device=device)


def expert(device, obs: str = 'pixels', **changes) -> DrQV2Agent:
    cfg = config('train', f'obs={obs}')
    args = {**OmegaConf.to_container(cfg.agent, resolve=True), **changes}
    shape = dmc.make(TASK, obs=obs).observation_spec().shape
    return DrQV2Agent(shape, 2, device, **args)


def learning(device, folder) -> Iterator[Row]:
    env, slow_replay = dmc.make(TASK), plain.Replay()
    buffer = ring(folder / 'pixels', env, device)
    fill([buffer, slow_replay], env, 1500)
    yield Row('replay sample, pixels, 256', 'batches', 1, lambda: buffer.sample(256),
              lambda: slow_replay.sample(256), 10)
    batch = buffer.sample(256)
    yield Row('augmentation, 256', 'batches', 1, lambda: random_shift(batch[0]),
              lambda: plain.random_shift(batch[0].cpu()))
    agent = expert(device)
    slow = plain.PlainAgent(agent if device.type == 'cpu' else expert('cpu'))

    class Batch:
        @staticmethod
        def sample(_):
            return batch

    cpu_batch = [part.cpu() for part in batch]
    flops = 104e9  # see references: of one update at batch 256
    yield Row('DrQ-v2 update, batch 256', 'updates', 1, lambda: agent.update(Batch, 256, 0),
              lambda: slow.update(*cpu_batch), 3, flops / peak_flops(device))

    def fast_loop(env, agent, buffer, num_steps, time_steps):
        for step in range(num_steps):
            action = agent.act(time_steps[-1].observation, 10_000, False)
            agent.update(buffer, 256, step)
            time_step = env.step(action)
            buffer.add(time_step, action)
            if time_step.last():
                time_step = env.reset()
                buffer.add(time_step)
            time_steps[:] = [time_step]

    slow_env, slow_steps = PlainPixels(), []

    def slow_loop():
        time_step = slow_steps[-1] if slow_steps else slow_env.reset()
        slow_replay.add(dmc.dm_env.restart(time_step.observation))
        for step in range(4):
            action = slow.act(time_step.observation)
            if step % 2 == 0:
                slow.update(*slow_replay.sample(256))
            time_step = slow_env.step(action)
            slow_replay.add(time_step, action)
        slow_steps[:] = [time_step]

    first = env.reset()
    buffer.add(first)
    steps = [first]
    yield Row('training loop, pixels', 'frames', 8,
              lambda: fast_loop(env, agent, buffer, 4, steps), slow_loop, 3)
    states = dmc.make(TASK, obs='states')
    state_buffer, state_agent = ring(folder / 'states', states, device), expert(device, 'states')
    fill([state_buffer], states, 3000)
    first = states.reset()
    state_buffer.add(first)
    state_steps = [first]
    yield Row('training loop, states', 'frames', 400,
              lambda: fast_loop(states, state_agent, state_buffer, 200, state_steps), None)


def studio_cfg(folder, **changes):
    cfg = config('generate_expert_video', f'out_dir={folder}', 'num_workers=1')
    return OmegaConf.merge(cfg, {'snapshot': str(ROOT / cfg.snapshot), **changes})


def film(i: int):
    generate_expert_video.make_episode('train', i + 10)


def filming(device, folder) -> Iterator[Row]:
    cfg = studio_cfg(folder / 'clips')
    studio = generate_expert_video.Studio(cfg)
    suite = dmc.load_suite(TASK)

    def slow_film():
        """A context after another, the physics anew for each, at the suite's settings."""
        for _ in range(cfg.num_contexts):
            suite.reset(episode_seed=0)
            for _ in range(cfg.episode_len + 1):
                plain.render(suite.physics, cfg.im_size, 0)
                for _ in range(2):
                    suite.step(np.zeros(2))

    yield Row('clips of 4 contexts, one process', 'clips', 4, lambda: film_here(studio),
              slow_film, 3)
    pools = [ProcessPoolExecutor(n, multiprocessing.get_context('spawn'),
                                 generate_expert_video.start_worker, (cfg,)) for n in (2, 1)]
    for pool in pools:
        list(pool.map(film, range(4)))  # each worker starts up

    yield Row('clips of 4 contexts, two processes beside one', 'clips', 32,
              lambda: list(pools[0].map(film, range(8))),
              lambda: list(pools[1].map(film, range(8))), 3)


def film_here(studio):
    studio.make('train', 10)


def translating(device, folder) -> Iterator[Row]:
    cfg = config('train_ct')
    torch.manual_seed(0)
    model = ct_model.ContextTranslator(**cfg.model).to(device)
    slow = ct_model.ContextTranslator(**cfg.model)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    slow_optimizer = torch.optim.Adam(slow.parameters(), foreach=False)
    shape = cfg.batch_size, cfg.frames_per_clip, model.im_size, model.im_size, 3
    source, target = (torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(2))
    batch = [part.to(device) for part in (source, target, target[:, 0])]
    autocast = torch.autocast(device.type, torch.bfloat16)

    def slow_step():
        z3, z, translations, reconstructions = plain.translate(slow, source, target, target[:, 0])
        truth = target.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        loss = ((translations - truth).square().mean() + (reconstructions - truth).square().mean()
                + 0.003 * (z3 - z).square().mean())
        slow_optimizer.zero_grad()
        loss.backward()
        slow_optimizer.step()

    yield Row(f'translator step, {shape[0]} pairs of {shape[1]} frames', 'clips', len(source),
              lambda: train_ct.update(model, optimizer, batch, autocast, cfg), slow_step)


def imitating(device, folder) -> Iterator[Row]:
    """An episode of the imitator with its updates; the plain one films 32 demonstrations first."""
    made = utils.load_snapshot(ROOT / f'ct/{TASK}.pt', 'translator', TASK, 'train it')
    model = ct_model.ContextTranslator(**made['model_args'])
    model.load_state_dict(made['model'])
    model.to(device).eval()
    cfg = studio_cfg(folder / 'demos', num_train=8, num_valid=1)
    generate_expert_video.generate(cfg)
    clips = video.Clips(folder / 'demos/train')
    cfg = config('train_ac')
    translator = train_ac.DemoTranslator(model, clips, cfg.z_dim)
    env = train_ac.make_env(cfg, clips, translator, evaluate=False)
    agent = ACAgent(env.observation_spec().shape, 2, device=device,
                    **OmegaConf.to_container(cfg.agent, resolve=True))
    buffer = ring(folder / 'imitation', env, device)
    fill([buffer], env, 2000)
    suite, slow_model = PlainPixels(model.im_size), ct_model.ContextTranslator(**made['model_args'])
    slow_model.load_state_dict(made['model'])
    slow_agent, scripted = plain.PlainAgent(agent), np.zeros(2, np.float32)

    def episode():
        time_step = env.reset()
        buffer.add(time_step)
        step = 0
        while not time_step.last():
            action = agent.act(time_step.observation, 10_000, False)
            agent.update(buffer, cfg.batch_size, step)
            time_step = env.step(action)
            buffer.add(time_step, action)
            step += 1

    @torch.no_grad()
    def encoded(frame):
        return slow_model.encode(torch.from_numpy(frame)[None])

    def slow_episode():
        videos = []
        for _ in range(32):
            frames = [suite.reset().observation[-3:]]
            frames += [suite.step(scripted).observation[-3:] for _ in range(50)]
            videos.append(torch.from_numpy(np.stack(frames).transpose(0, 2, 3, 1)))
        with torch.no_grad():
            first = suite.reset().observation[-3:].transpose(1, 2, 0)
            context = slow_model.context(torch.from_numpy(np.ascontiguousarray(first))[None])
            for frames in videos:
                z3 = slow_model.translate(slow_model.encode(frames[None]), context)
                slow_model.decode(z3, context)
        for _ in range(50):
            frame = suite.step(scripted).observation[-3:].transpose(1, 2, 0)
            encoded(np.ascontiguousarray(frame))
            slow_agent.update(*buffer.sample(cfg.batch_size))

    yield Row('imitator: an episode of 50 steps and updates', 'steps', 50, episode, slow_episode, 1)


PARTS = {'rendering': rendering, 'learning': learning, 'filming': filming,
         'translating': translating, 'imitating': imitating}


def peak_flops(device) -> float:
    """Of a product of bf16 matrices, measured: FLOP/s."""
    size = 2048 if device.type == 'cpu' else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size ** 3 / min(timed(lambda: a @ b, device) for _ in range(10))


def timed(call: Callable, device) -> float:
    start = time.perf_counter()
    call()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(row: Row, device) -> dict:
    """Both by turns, after a call of each that is not counted."""
    calls = {'ours': row.ours, 'plain': row.plain}
    times = {name: [] for name, call in calls.items() if call}
    for repeat in range(row.repeats + 1):
        for name in times:
            seconds = timed(calls[name], device)
            if repeat or row.repeats == 1:
                times[name].append(seconds)
    result = {'part': row.part, 'unit': f'{row.unit}/s',
              **{name: row.amount / float(np.median(values)) for name, values in times.items()}}
    if row.plain:
        result['ratio'] = result['ours'] / result['plain']
    if row.floor:
        result['share_of_peak'] = result['ours'] / row.amount * row.floor
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('parts', nargs='*', metavar='part', help=', '.join(PARTS))
    parser.add_argument('--device', default='auto')
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"'{part}' is none of {', '.join(PARTS)}")
    device = utils.pick_device(args.device)
    utils.set_seed_everywhere(0)
    if not args.json:
        print('| part | ours | plain | ratio | of peak |\n|---|---|---|---|---|', flush=True)
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            for row in PARTS[part](device, Path(folder)):
                result = measure(row, device)
                if args.json:
                    print(json.dumps(result), flush=True)
                    continue
                cells = [f"{result['ours']:.4g} {result['unit']}"]
                cells += [f"{result[key]:{form}}" if key in result else '' for key, form in
                          (('plain', '.4g'), ('ratio', '.1f'), ('share_of_peak', '.0%'))]
                print(f"| {result['part']} | {' | '.join(cells)} |", flush=True)


if __name__ == '__main__':
    main()
