"""Measure each part's speed, and a plain implementation's of the same: benchmarks/bench.py

    python benchmarks/bench.py [part ...] [--device auto|cpu|cuda] [--json]

Ours and the plain one (plain.py) take turns, each in a process of its own, and the plain one at the
C library's own settings (see utils.prepare_cpu). The table gives medians and their ratio.
"""
import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

import dmc  # first: it chooses the OpenGL backend

# isort: split
import plain
import torch
from evaluate import table, table_row
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import ct_model
import generate_expert_video
import imitation
import train
import train_ac
import train_ct
import utils
from drqv2 import random_shift

TASK, NUM_THREADS = 'reacher_hard', torch.get_num_threads()


class Row(NamedTuple):
    """A line of the table."""

    part: str
    unit: str           # of what `amount` counts
    amount: float       # what one call gets done
    ours: Callable
    plain: Callable
    repeats: int = 5
    flops: float | None = None  # of one unit, where that is known
    plain_amount: float | None = None  # what one call of the plain one gets done, if not the same
    difference: Callable | None = None  # between their pictures, mean over pixels, in 1/255


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


def difference(task: str, num_poses: int = 5) -> float:
    """Mean over pixels and poses. Once our renderer was at work, dm_control's loses its OpenGL
    context, and the shadows with it: its pictures come first, each from a context of its own."""
    suites = [dmc.load_suite(task) for _ in range(num_poses)]
    theirs = []
    for seed, suite in enumerate(suites):
        suite.reset(episode_seed=seed)
        theirs.append(plain.render(suite.physics, 84, 0).astype(float))
    differences, ours = [], dmc.load_suite(task)
    for seed, picture in enumerate(theirs):
        ours.reset(episode_seed=seed)
        differences.append(np.abs(ours.render(84) - picture).mean())
    return float(np.mean(differences))


def rendering(device, folder) -> Iterator[Row]:
    for task in (TASK, 'finger_spin', 'walker_walk'):
        ours, suite = dmc.load_suite(task), dmc.load_suite(task)
        for env in (ours, suite):
            env.reset(episode_seed=1)
        yield Row(f'frame 84x84, {task}', 'frames', 20,
                  lambda ours=ours: [ours.render(84) for _ in range(20)],
                  lambda suite=suite: [plain.render(suite.physics, 84, 0) for _ in range(20)],
                  difference=lambda task=task: difference(task))
    envs = dmc.make(TASK), PlainPixels()
    for env in envs:
        env.reset()
    action = np.zeros(2, np.float32)
    steps = [lambda env=env: [env.step(action) for _ in range(20)] for env in envs]
    yield Row('environment step, pixels', 'frames', 40, *steps)


def run(workspace, num_steps: int, before: int = 2000) -> Callable:
    """Return a function that goes `num_steps` on in the run's own loop. It has gone `before` steps
    already, an expert's 2000 without updates (num_seed_frames), to fill the replay buffer."""
    def go(num_steps=num_steps):
        workspace.run((workspace.global_step + num_steps) * workspace.loop.action_repeat)

    go(before)
    return go


def plain_run(env, agent, replay, num_steps: int) -> Callable:
    time_step = env.reset()
    replay.add(time_step)

    def go(num_steps=num_steps, try_update=True):
        nonlocal time_step
        for step in range(num_steps):
            action = agent.act(time_step.observation)
            if try_update and step % 2 == 0:
                agent.update(*replay.sample(256))
            time_step = env.step(action)
            replay.add(time_step, action)
            if time_step.last():
                time_step = env.reset()
                replay.add(time_step)

    go(501, try_update=False)
    return go


def short(device) -> tuple[str, ...]:
    """Overrides of a run that is not trained to its end."""
    return 'save_video=false', 'use_tb=false', 'num_train_frames=10_000', f'device={device.type}'


class Fixed:
    """In the place of a replay buffer: always the same batch."""

    def __init__(self, batch):
        self.batch = batch

    def sample(self, batch_size):
        return self.batch


def learning(device, folder) -> Iterator[Row]:
    fast = train.make_workspace(config('train', *short(device)), folder / 'pixels')
    loop = run(fast, 40)
    slow, slow_replay = plain.PlainAgent(fast.agent), plain.Replay()
    slow_loop = plain_run(PlainPixels(), slow, slow_replay, 4)
    yield Row('replay sample, pixels, 256', 'batches', 1, lambda: fast.replay_buffer.sample(256),
              lambda: slow_replay.sample(256), 10)
    batch = fast.replay_buffer.sample(256)
    cpu_batch = [part.cpu() for part in batch]
    yield Row('augmentation, 256', 'batches', 1, lambda: random_shift(batch[0]),
              lambda: plain.random_shift(cpu_batch[0]))
    flops = 84e9 + 8e9 + 9e9  # of encoder, bottlenecks and hidden layers, backward passes too
    yield Row('DrQ-v2 update, batch 256', 'updates', 5,
              lambda: [fast.agent.update(Fixed(batch), 256, 0) for _ in range(5)],
              lambda: slow.update(*cpu_batch), 5, flops, plain_amount=1)
    yield Row('training loop, pixels', 'frames', 80, loop, slow_loop, 5, plain_amount=8)
    fast_states = train.make_workspace(config('train', 'obs=states', *short(device)),
                                       folder / 'states')
    slow_states = plain_run(dmc.make(TASK, obs='states'), plain.PlainAgent(fast_states.agent),
                            plain.Replay(), 40)
    yield Row('training loop, states', 'frames', 800, run(fast_states, 400), slow_states,
              plain_amount=80)


def studio_cfg(folder, **changes):
    cfg = config('generate_expert_video', f'out_dir={folder}', 'num_workers=1')
    return OmegaConf.merge(cfg, {'expert': str(ROOT / cfg.expert), **changes})


def filming(device, folder) -> Iterator[Row]:
    cfg = studio_cfg(folder / 'clips')
    suite = dmc.load_suite(TASK)

    def slow_film():
        """A context after another, the physics anew for each, at the suite's settings."""
        for _ in range(cfg.num_contexts):
            suite.reset(episode_seed=0)
            for _ in range(cfg.episode_len + 1):
                plain.render(suite.physics, cfg.im_size, 0)
                for _ in range(2):
                    suite.step(np.zeros(2))

    pools = [generate_expert_video.open_pool(cfg, num_workers) for num_workers in (2, 1)]
    film_eight = [lambda pool=pool: list(pool.map(generate_expert_video.make_episode, ['train'] * 8,
                                                  range(10, 18))) for pool in pools]
    yield Row('clips of 4 contexts, one core', 'clips', 32, film_eight[1], slow_film, 3,
              plain_amount=4)
    yield Row('clips of 4 contexts, two cores beside one', 'clips', 32, *film_eight, 3)
    for pool in pools:  # nobody else would, at the end of a process that another started
        pool.shutdown()


def translating(device, folder) -> Iterator[Row]:
    cfg = config('train_ct')
    torch.manual_seed(0)
    model_args = {**cfg.model, 'code_dim': None}
    model = ct_model.ContextTranslator(**model_args).to(device)
    slow = ct_model.ContextTranslator(**model_args)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    slow_optimizer = torch.optim.Adam(slow.parameters(), foreach=False)
    shape = cfg.batch_size, cfg.frames_per_clip, model.im_size, model.im_size, 3
    source, target = (torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(2))
    batch = [part.to(device) for part in (source, target, target[:, 0])]
    autocast = torch.autocast(device.type, torch.bfloat16)

    def step():
        with autocast:
            loss, _ = model.losses(*batch, **cfg.weights)
        train_ct.update(loss, model, optimizer, 1e-3)

    def slow_step():
        z3, z, translations, reconstructions = plain.translate(slow, source, target, target[:, 0])
        truth = target.permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        loss = ((translations - truth).square().mean() + (reconstructions - truth).square().mean()
                + 0.003 * (z3 - z).square().mean())
        slow_optimizer.zero_grad()
        loss.backward()
        slow_optimizer.step()

    yield Row(f'translator step, {shape[0]} pairs of {shape[1]} frames', 'clips', len(source),
              step, slow_step)


def imitating(device, folder) -> Iterator[Row]:
    """Steps of the imitator. As the project that this follows does it, the plain one films 32
    demonstrations anew for each episode (here of an agent that stands still, which takes as long),
    and translates and decodes them all, with our networks in fp32. The update is the same."""
    generate_expert_video.generate(studio_cfg(folder / 'demos', num_train=8, num_valid=1,
                                              num_play=4, num_play_valid=0))
    cfg = config('train_ac', f'data_dir={folder}/demos', f'translator={ROOT}/ct/{TASK}.pt',
                 *short(device))
    workspace = train_ac.make_workspace(cfg, folder / 'imitation')
    loop = run(workspace, 200, before=200)
    model, _ = imitation.load_translator(cfg.translator, TASK, cfg.recipe, torch.device('cpu'),
                                         'fp32')
    horizon = 50
    suite, agent = PlainPixels(model.im_size), workspace.agent
    action = np.zeros(2, np.float32)

    def film(num_frames):
        frames = [suite.reset(), *(suite.step(action) for _ in range(num_frames - 1))]
        newest = np.stack([time_step.observation[-3:] for time_step in frames])
        return torch.from_numpy(newest.transpose(0, 2, 3, 1).copy())

    @torch.no_grad()
    def episode():
        demonstrations = [film(horizon + 1) for _ in range(32)]
        context = model.context(film(1))
        for frames in demonstrations:
            model.decode(model.translate(model.encode(frames[None]), context), context)
        for _ in range(horizon):
            suite.step(action)
            model.encode(torch.from_numpy(suite.frames[-1].transpose(1, 2, 0).copy())[None])
            with torch.enable_grad():
                agent.update(workspace.replay_buffer, cfg.batch_size, 0)

    yield Row('imitator, beside filming 32 demonstrations an episode', 'steps', 200, loop,
              episode, 3, plain_amount=horizon)


PARTS = {'rendering': rendering, 'learning': learning, 'filming': filming,
         'translating': translating, 'imitating': imitating}


def peak_flops(device) -> float:
    """Measure the speed of a product of bf16 matrices, in FLOP/s."""
    size = 2048 if device.type == 'cpu' else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size ** 3 / min(timed(lambda: a @ b, device) for _ in range(10))


def timed(call: Callable, device) -> float:
    start = time.perf_counter()
    call()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def plain_side(pipe, part: str, device: torch.device):
    """A process of its own for the plain ones, at PyTorch's and the C library's own settings. Ours
    renders in it only before the plain one first does, see `difference`."""
    utils.prepare_cpu = lambda: None
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        for row in PARTS[part](device, Path(folder)):
            while pipe.recv() == 'run':
                utils.set_precision('fp32')
                torch.set_num_threads(NUM_THREADS)
                pipe.send(timed(row.plain, device))


def measure(row: Row, device, pipe, peak: float) -> dict:
    """Both by turns, after a call of each that is not counted."""
    result = {'part': row.part, 'unit': f'{row.unit}/s'}
    if row.difference:  # first: see there
        result['difference'] = row.difference()
    ours, plain_ones = [], []
    for _ in range(row.repeats + 1):
        ours.append(timed(row.ours, device))
        pipe.send('run')
        plain_ones.append(pipe.recv())
    pipe.send('next')
    fast = row.amount / float(np.median(ours[1:]))
    slow = (row.plain_amount or row.amount) / float(np.median(plain_ones[1:]))
    result |= {'ours': fast, 'plain': slow, 'ratio': fast / slow}
    if row.flops:
        result['share_of_peak'] = fast * row.flops / peak
    return result


def measured(part: str, device, peak: float) -> Iterator[dict]:
    spawn = multiprocessing.get_context('spawn')
    pipe, other_end = spawn.Pipe()
    process = spawn.Process(target=plain_side, args=(other_end, part, device))
    process.start()
    other_end.close()  # otherwise recv() would wait for ever if the process died
    torch.set_num_threads(NUM_THREADS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = PARTS[part](device, Path(folder))
            while True:
                with contextlib.redirect_stdout(sys.stderr):  # where runs show their progress
                    if (row := next(rows, None)) is None:
                        break
                    result = measure(row, device, pipe, peak)
                yield result
        process.join()
    finally:
        process.terminate()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('parts', nargs='*', metavar='part', help=', '.join(PARTS))
    parser.add_argument('--device', default='auto', choices=('auto', 'cpu', 'cuda'))
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"'{part}' is none of {', '.join(PARTS)}")
    device = utils.pick_device(args.device)
    utils.prepare_cpu()
    utils.set_precision('bf16')
    utils.set_seed_everywhere(0)
    peak = peak_flops(device)
    if not args.json:
        print(table(['part', 'ours', 'plain', 'ratio', '']), flush=True)
    for part in args.parts or PARTS:
        for result in measured(part, device, peak):
            if args.json:
                print(json.dumps(result), flush=True)
                continue
            note = (f"{result['share_of_peak']:.0%} of peak" if 'share_of_peak' in result else
                    f"differs by {result['difference']:.3f}/255" if 'difference' in result else '')
            print(table_row([result['part'], f"{result['ours']:.4g} {result['unit']}",
                             f"{result['plain']:.4g}", f"{result['ratio']:.1f}", note]), flush=True)


if __name__ == '__main__':
    with utils.exit_on_user_error():
        main()
