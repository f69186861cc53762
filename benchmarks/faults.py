"""What happens when things go wrong: python benchmarks/faults.py [--seed 0]

Damages every kind of file; kills, interrupts and starves all four scripts; and prints a table. For
each fault, how often it was tried, and how it ended:

    refused     one sentence and exit code 2 (or that of the signal)
    survived    the results are those of an undisturbed run
    undetected  other results, and nobody was told
    failed      a traceback, a hang, or a run that was lost

The last two must be 0. A full disk is tried where this user may mount one: as root.
"""
import argparse
import contextlib
import functools
import os
import pickle
import random
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dm_env
import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

import dmc  # first: it chooses the OpenGL backend

# isort: split
from evaluate import table, table_row

import generate_expert_video
import imitation
import snapshots
import utils
import video
from ac_agent import load_imitator
from replay_buffer import ReplayBuffer

TASK = 'reacher_easy'
COLUMNS = 'tried', 'refused', 'survived', 'undetected', 'failed'
CPU = torch.device('cpu')
SMALL = ['device=cpu', 'use_tb=false', f'task={TASK}']
RUN = [*SMALL, 'save_video=false', 'num_eval_episodes=1', 'batch_size=32', 'hidden_dim=32',
       'snapshot_every_frames=1000', 'eval_every_frames=2000']


def commands(folder: Path) -> dict[str, list[str]]:
    """The four scripts, each with inputs that the ones before it left in `folder`."""
    videos, expert = folder / 'videos', folder / 'train/snapshot.pt'
    return {
        'train': ['train.py', *RUN, 'obs=states', 'num_train_frames=8000', 'num_seed_frames=1000'],
        'generate_expert_video': [
            'generate_expert_video.py', f'task={TASK}', f'expert={expert}', 'num_train=30',
            'num_valid=4', 'num_play=30', 'num_play_valid=4', 'num_contexts=2', 'episode_len=20',
            'im_size=32', 'num_workers=2'],
        'train_ct': ['train_ct.py', *SMALL, f'data_dir={videos}', 'num_train_steps=200',
                     'code.num_steps=200', 'snapshot_every=40', 'eval_every=100', 'batch_size=2',
                     'model.channels=[8,8,8,8]', 'model.hidden=32', 'model.z_dim=16',
                     'model.code_dim=4'],
        'train_ac': ['train_ac.py', *RUN, f'data_dir={videos}', 'num_train_frames=4000',
                     f'translator={folder}/train_ct/best.pt', 'num_pretrain_updates=20',
                     'num_eval_demos=4']}


def start(command: list[str], out: Path) -> subprocess.Popen:
    option = 'out_dir' if command[0].startswith('generate') else 'hydra.run.dir'
    return subprocess.Popen(
        [sys.executable, str(ROOT / command[0]), *command[1:], f'{option}={out}'], text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True)


def finish(process: subprocess.Popen, seconds: float = 300) -> str:
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        output += f'Traceback: still there after {seconds} seconds'
    return output


def result(out: Path) -> bytes:
    """All that must be equal over a fault: weights, or frames and what is known of them."""
    if (out / 'meta.json').exists() or (out / 'train/meta.json').exists():
        return b''.join(path.read_bytes() for path in sorted(out.rglob('episode_*')))
    name = 'best.pt' if (out / 'best.pt').exists() else 'snapshot.pt'
    made = snapshots.load_snapshot(out / name, None)
    return pickle.dumps({key: plain(made.get(key)) for key in ('agent', 'model', 'scores')})


def plain(value):
    """Tensors become bytes, so that equal weights have equal pickles."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in sorted(value.items(), key=str)}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------ damaged files

def try_to_read(read: Callable, whole) -> str:
    try:
        return 'survived' if read() == whole else 'undetected'
    except utils.UserError:
        return 'refused'
    except Exception as error:
        print(f'failed: {type(error).__name__}: {error}', file=sys.stderr)
        return 'failed'


def damage(path: Path, read: Callable, rng: random.Random, num_flips: int, num_cuts: int = 5
           ) -> Counter:
    """Flip single bits of a file, and cut it short, each time reading what it belongs to."""
    before, whole, counts = path.read_bytes(), read(), Counter()
    for fault in range(num_flips + num_cuts):
        changed = bytearray(before)
        at = rng.randrange(len(before))
        if fault < num_flips:
            changed[at] ^= 1 << rng.randrange(8)
        else:
            del changed[at:]
        path.write_bytes(changed)
        counts[try_to_read(read, whole)] += 1
    path.write_bytes(before)
    return counts


def read_expert(path: Path):
    agent, env_args = generate_expert_video.load_expert(path, TASK)
    return plain(agent.actor.state_dict()), env_args


def read_translator(path: Path):
    model, scores = imitation.load_translator(path, TASK, 'pose_code', CPU, 'fp32')
    return plain(model.state_dict()), scores


def read_videos(root: Path):
    clips = video.Clips(root, TASK)
    return [(clips.frames(i).tobytes(), clips.episode(i)) for i in range(len(clips))], clips.meta


def ring(folder: Path, num_episodes: int) -> tuple[Callable, list[Path]]:
    """Return what reads a ring of 100 rows back as a resumed run does, and its files."""
    env, action = dmc.make(TASK, obs='states'), np.zeros(2, np.float32)

    def make(resume: bool) -> ReplayBuffer:
        return ReplayBuffer(folder, env.observation_spec(), env.action_spec(), 100, 3, 0.99,
                            slack=21, resume=resume)
    buffer = make(resume=False)
    for _ in range(num_episodes):
        buffer.add(env.reset())
        for t in range(20):
            kind = dm_env.StepType.LAST if t == 19 else dm_env.StepType.MID
            buffer.add(env.step(action)._replace(step_type=kind), action)
    state = buffer.state_dict()

    def read():
        again = make(resume=True)
        again.load_state_dict(state)
        return [part.numpy().tobytes() for part in again.sample(200)]
    return read, sorted(folder.glob('*.npy'))


def malicious(path: Path, read: Callable) -> Counter:
    """Files that are well formed and hold something else: code, a bomb, other contents."""
    trace = path.with_name('it-ran')

    class Code:
        def __reduce__(self):
            return os.system, (f'touch {trace}',)
    whole, before, counts = read(), path.read_bytes(), Counter()
    made = torch.load(path, weights_only=True)
    args = 'agent_args' if 'agent_args' in made else 'model_args'
    weights = 'agent' if args == 'agent_args' else 'model'
    sizes = [{key: size} for size in (60_000, 10 ** 6, 10 ** 12) for key in made[args]
             if key in ('hidden_dim', 'hidden', 'z_dim', 'code_dim', 'action_dim', 'im_size')]
    expanded = torch.zeros(1).expand(10 ** 11)
    for content in (Code(), {**made, weights: Code()}, {}, [], {**made, 'made_by': None},
                    {**made, args: None}, {**made, weights: expanded},
                    *({**made, args: made[args] | size} for size in sizes),
                    *({other: made[other] for other in made if other != key}
                      for key in ('made_by', args, weights))):
        torch.save(content, path)
        counts[try_to_read(read, whole)] += 1
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr('archive/data/0', bytes(10 ** 9))
    counts[try_to_read(read, whole)] += 1
    path.write_bytes(before)
    counts['undetected'] += trace.exists()
    return counts


def renames(path: Path) -> Counter:
    """End `save_snapshot` before, between and after its renames: the old or the new must load."""
    before, replace, counts = path.read_bytes(), os.replace, Counter()
    made = torch.load(path, weights_only=True)
    for at in range(3):
        calls = []

        def dying(*args, calls=calls, at=at):
            if len(calls) == at:
                raise SystemExit
            calls.append(replace(*args))
        os.replace = dying
        try:
            with contextlib.suppress(SystemExit):
                snapshots.save_snapshot(path, made['kind'], made['task'], {
                    'made_by': {}, 'model': {'w': torch.ones(3)}, 'is_new': True})
        finally:
            os.replace = replace
        try:
            loaded = snapshots.load_snapshot(path, made['kind'])
            counts['survived' if loaded.get('is_new', False) == (at == 2) else 'undetected'] += 1
        except Exception:
            counts['failed'] += 1
        snapshots.previous(path).unlink(missing_ok=True)
        path.write_bytes(before)
    return counts


# ------------------------------------------------------------------------------ disturbed processes

def judge(process: subprocess.Popen, output: str, code: int, words: str = '') -> str:
    if 'Traceback' in output or process.returncode != code or words not in output:
        print(f'{process.args[1]}: exit code {process.returncode}, not {code} with "{words}":\n'
              f'{output[-2000:]}', file=sys.stderr)
        return 'failed'
    return 'refused'


def progress(folder: Path) -> int:
    """Steps in the run's last snapshot, or episodes filmed."""
    path = folder / 'snapshot.pt'
    if not snapshots.newest_snapshot(path):
        return len(list(folder.rglob('episode_*.json')))
    made = snapshots.load_snapshot(path, None)
    return made.get('global_step', made.get('step'))


def traces(folder: Path) -> set:
    """What shows that a run is at work: rows that it logs, episodes that it films."""
    return {(path, path.stat().st_mtime_ns) for pattern in ('*.csv', 'episode_*.json')
            for path in folder.rglob(pattern)}


def disturbed(command: list[str], whole: bytes, seconds: float, folder: Path, rng: random.Random,
              number: int) -> Counter:
    """Signal a run at three random moments of its work, resuming it each time; the last start runs
    through."""
    counts, hits, steps = Counter(), 0, 0
    for _ in range(3):
        before = traces(folder)
        process, deadline = start(command, folder), time.monotonic() + 300
        while (process.poll() is None and traces(folder) == before
               and time.monotonic() < deadline):
            time.sleep(0.02)
        hangs = process.poll() is None and traces(folder) == before
        time.sleep(rng.uniform(0, 0.15) * seconds)
        process.send_signal(number)
        output = finish(process, 30)
        if process.returncode == 0 and 'to resume' not in output:
            break  # it was at its end
        code = -number if number == signal.SIGKILL else 128 + number
        said = 'to resume: python' if number != signal.SIGKILL else ''
        ended = judge(process, output, code, said)
        if hangs or progress(folder) < steps:
            ended = 'failed'
        steps, hits = progress(folder), hits + 1
        if ended == 'failed':
            counts['failed'] += 1
    process = start(command, folder)
    output = finish(process)
    begins_anew = steps and 'eval at frame 0 ' in output
    if judge(process, output, 0) == 'failed' or begins_anew:
        counts['failed'] += 1
    # After SIGTERM an RL run drops the broken-off episode: another run, but a whole one.
    elif number != signal.SIGKILL and command[0] in ('train.py', 'train_ac.py'):
        counts['survived' if len(result(folder)) == len(whole) else 'undetected'] += hits
    else:
        counts['survived' if result(folder) == whole else 'undetected'] += hits
    return counts


def intruded(command: list[str], out: Path) -> Counter:
    """Run in a folder where another process, this one, is at work."""
    with snapshots.only_one_at_work(out):
        process = start(command, out)
        return Counter([judge(process, finish(process), 2, 'another process')])


def diverged(command: list[str], out: Path) -> Counter:
    """Run with a learning rate that makes the weights nan."""
    process = start(command, out)
    return Counter([judge(process, finish(process), 2, 'nan or infinite')])


def full_disks(command: list[str], whole: bytes, folder: Path, size: int) -> Counter:
    """Run where the disk is full after shares of what a run writes, `size` bytes."""
    return sum((full_disk(command, whole, folder.with_name(f'{folder.name}_{share}'),
                          int(share * size)) for share in (0.3, 0.7, 1.0, 1.5)), Counter())


def full_disk(command: list[str], whole: bytes, folder: Path, size: int) -> Counter:
    """Run on a file system of `size` bytes, and go on once there is room.

    Returns: nothing where this user may not mount one, or the run had room enough."""
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o']
    if subprocess.run([*mount, f'size={size}', 'tmpfs', str(folder)], capture_output=True,
                      check=False).returncode:
        return Counter()
    try:
        if not command[0].startswith('generate'):
            command = [*command, 'use_tb=true']
        process = start(command, folder / 'run')
        output = finish(process)
        if process.returncode == 0:
            return Counter()
        counts = Counter([judge(process, output, 2, 'error: ')])
        subprocess.run([*mount, 'remount,size=500m', str(folder)], check=True)
        process = start(command, folder / 'run')
        if judge(process, finish(process), 0) == 'failed':
            counts['failed'] += 1
        else:
            counts['survived' if result(folder / 'run') == whole else 'undetected'] += 1
        return counts
    finally:
        subprocess.run(['umount', str(folder)], check=True)


def campaign(folder: Path, rng: random.Random):
    """Yield the table's rows: what was tried, and how it ended."""
    scripts, wholes, seconds, sizes = commands(folder), {}, {}, {}
    for name, command in scripts.items():
        began = time.monotonic()
        out = folder / ('videos' if name.startswith('generate') else name)
        process = start(command, out)
        if judge(process, finish(process), 0) == 'failed':
            sys.exit(f'{command[0]} failed without a fault')
        wholes[name], seconds[name] = result(out), time.monotonic() - began
        sizes[name] = sum(path.stat().st_size for path in out.rglob('*') if path.is_file())

    expert, translator = folder / 'train/snapshot.pt', folder / 'train_ct/best.pt'
    imitator, root = folder / 'train_ac/snapshot.pt', folder / 'videos/play'

    def read_imitator():
        _, agent = load_imitator(imitator, translator, folder / 'videos/train', TASK)
        return plain(agent.state_dict())
    for kind, path, read in (('expert', expert, lambda: read_expert(expert)),
                             ('translator', translator, lambda: read_translator(translator)),
                             ('imitator', imitator, read_imitator)):
        yield f'{kind}: flipped bits, cuts', damage(path, read, rng, 100, 20)
        yield f'{kind}: code, bombs, other contents', malicious(path, read)
        yield f'{kind}: ended around each rename', renames(path)
    for kind, name, num in (('frames', 'episode_00001.npy', 100),
                            ('an episode', 'episode_00001.json', 300), ('meta', 'meta.json', 300)):
        yield f'videos, {kind}: flipped bits, cuts', damage(
            root / name, lambda: read_videos(root), rng, num)
    for num_episodes in (3, 12):  # before and after the ring wraps
        read, files = ring(folder / f'ring{num_episodes}', num_episodes)
        yield f'replay buffer, {num_episodes} episodes: flipped bits, cuts', sum(
            (damage(path, read, rng, 60) for path in files), Counter())
    # Processes are disturbed two at a time: one for each core.
    jobs = {}
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        for name, command in scripts.items():
            jobs[f'{command[0]}: {number.name} at three moments'] = functools.partial(
                disturbed, command, wholes[name], seconds[name],
                folder / f'{name}_{number.name}', random.Random(rng.random()), number)
    for name, command in scripts.items():
        jobs[f'{command[0]}: another process in its folder'] = functools.partial(
            intruded, command, folder / f'held_{name}')
        jobs[f'{command[0]}: full disk'] = functools.partial(
            full_disks, command, wholes[name], folder / f'full_{name}', sizes[name])
    for name in ('train', 'train_ct', 'train_ac'):
        rate = 'code.lr=1e30' if name == 'train_ct' else 'lr=1e30'
        jobs[f'{scripts[name][0]}: weights become nan'] = functools.partial(
            diverged, [*scripts[name], rate, 'precision=fp32'], folder / f'nan_{name}')
    with ThreadPoolExecutor(2) as pool:
        yield from zip(jobs, pool.map(lambda job: job(), jobs.values()), strict=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--seed', type=int, default=0)
    rng = random.Random(parser.parse_args().seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
    total = Counter()
    print(table(['fault', *COLUMNS]))
    with tempfile.TemporaryDirectory() as folder:
        for what, counts in campaign(Path(folder), rng):
            counts['tried'] = sum(counts.values())
            total += counts
            what += '' if counts['tried'] else ' (not tried: no mount)'
            print(table_row([what, *(counts[name] for name in COLUMNS)]), flush=True)
    print(table_row(['**all**', *(f'**{total[name]}**' for name in COLUMNS)]))
    sys.exit(bool(total['undetected'] + total['failed']))


if __name__ == '__main__':
    with utils.exit_on_user_error():
        main()
