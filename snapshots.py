"""What is kept on disk safely: whole files, run folders, snapshots and what made them."""
import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import re
import shlex
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import utils
from utils import Damaged, UserError

# -------------------------------------------------------------------------------------------- files

def reserve(path: Path):
    """Allocate a sparse file's blocks: a disk that fills up later would end the process that writes
    to its memory map (SIGBUS).

    Raises: OSError where the disk is full.
    """
    with open(path, 'rb+') as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno in utils.FULL:  # else this file system cannot: the file stays sparse
                raise OSError(error.errno, error.strerror, str(path)) from error


def snapshot_space(path: Path, size: int) -> int:
    """Return how many bytes have to be free for snapshots of `size` bytes: the next is written
    while the last two are still there."""
    there = sum(p.stat().st_size for p in (path, previous(path)) if p.exists())
    return max(3 * size - there, 0)


@contextlib.contextmanager
def atomic_write(path: str | Path):
    """Yield a temporary path beside `path`, which takes its place only when the block succeeds.

    Raises: UserError where the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers such as imageio go by it.
    tmp = path.with_name(f'.tmp-{path.name}')
    try:
        yield tmp
        with open(tmp, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(tmp, path)
        folder = os.open(path.parent, os.O_RDONLY)  # else a power cut could undo the renaming
        try:
            with contextlib.suppress(OSError):  # some network file systems cannot
                os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # PyTorch and ffmpeg do not tell the cause
        causes, at = [], error
        while at:
            causes.append(getattr(at, 'errno', None))
            at = at.__cause__ or at.__context__
        if (set(causes) & set(utils.FULL)
                or shutil.disk_usage(path.parent).free < utils.UNITS['MiB']):
            raise UserError(utils.disk_full(path)) from error
        raise
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def only_one_at_work(folder: Path, option: str = 'hydra.run.dir'):
    """Lock the folder for this process; remove it at the end if it is new and still empty.

    Args:
      option: the setting with which to choose another folder.

    Raises: UserError where another process holds it, or it cannot be made.
    """
    utils.check_folder(folder, option)
    # Hydra has made the run's just now.
    is_new = not folder.exists() or option == 'hydra.run.dir' and not any(folder.iterdir())
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)  # the folder is its own lock: no file is left behind
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f'another process is at work in {folder}: wait for it, or set '
                            f'{option} to another folder.') from error
        yield
    finally:
        os.close(lock)
        if is_new:
            with contextlib.suppress(OSError):  # it has files
                folder.rmdir()


def keep_config(cfg):
    """Write .hydra/config.yaml and overrides.yaml into the run's folder, as Hydra would, but only
    once the settings are checked: what is refused changes nothing."""
    if not HydraConfig.initialized():
        return
    overrides = OmegaConf.create(list(HydraConfig.get().overrides.task))
    for name, values in (('config', cfg), ('overrides', overrides)):
        with atomic_write(utils.work_dir() / f'.hydra/{name}.yaml') as tmp:
            OmegaConf.save(values, tmp)

# --------------------------------------------------------------------------------- what made a file

def sha256(path: str | Path) -> str:
    """Return the SHA-256, in hex, of a file, or of the snapshot that `newest_snapshot` finds."""
    with open(newest_snapshot(path), 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the packages that pixels, physics and weights depend on."""
    return {name: _version(name) for name in ('torch', 'mujoco', 'dm_control', 'numpy')}


_version = functools.cache(importlib.metadata.version)


def require_same(source: str | Path, before: dict, now: dict, remedy: str):
    """Refuse `source` where it was made with other values than those of `now`, and name them
    (UserError).

    Dicts within are compared value by value, as in `scenery.camera.zoom`.
    """
    before, now = utils.flat(before), utils.flat(now)
    differs = [f'{key}={_short(before.get(key))}, not {_short(now.get(key))}'
               for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if differs:
        raise UserError(f"{source} was made with {'; '.join(differs)}: {remedy}.")


def require_same_run(work_dir: Path, last: dict, now: dict):
    """Refuse to go on from a snapshot made with other arguments or inputs (UserError)."""
    before = last.get('agent_args', {}) | last.get('model_args', {}) | last['made_by']
    again = (f"python {last['command']} hydra.run.dir={shlex.quote(str(work_dir))} and the same "
             'inputs' if last.get('command') else 'the same options and inputs')
    require_same(f'the run in {work_dir}', before, now, f'go on with {again}, or start a new run')


def require_same_pictures(source: str | Path, there: dict, quality: list | None, here: list,
                          remedy: str):
    """Refuse `source` where it comes from pictures that are drawn otherwise than here (UserError).

    Args:
      there: `versions()` as they were there.
      quality: `dmc.QUALITY` or `dmc.CONTEXT_QUALITY` as it was there; `here`: as it is here.
    """
    require_same(source, {'mujoco': there['mujoco'], 'quality': quality},
                 {'mujoco': versions()['mujoco'], 'quality': here}, remedy)


def _short(value) -> str:
    """Return the beginning of a hash, anything else whole."""
    return f'{value[:12]}...' if re.fullmatch('[0-9a-f]{64}', str(value)) else str(value)

# ---------------------------------------------------------------------------------------- snapshots

# A snapshot is a dict of tensors and plain values:
#   every kind          format, kind, task, versions, command, machine, see `save_snapshot`;
#                       made_by: settings and inputs, which a resumed run must share
#   expert, imitator    agent_args, agent: to make the agent again (train.Workspace); global_step,
#                       elapsed; to resume: replay_buffer, global_episode, evaluations, rng
#   translator          model_args, model, scores, elapsed (train_ct.py);
#                       to resume: optimizers, samplers, step, best, rng
# `slim` keeps these, beside the weights that act or translate:
SLIM = ('format', 'kind', 'task', 'versions', 'command', 'machine', 'made_by', 'agent_args',
        'model_args', 'scores', 'global_step', 'elapsed')

FORMAT = 1  # of snapshots and datasets; raised when an older reader would misread them


def save_snapshot(path: str | Path, kind: str, task: str, payload: dict):
    """Write tensors and plain values; the snapshot before stays as `<stem>.prev.pt`.

    Args:
      kind: what it is a snapshot of: 'expert', 'translator' or 'imitator'.
      payload: state dicts, constructor arguments, counters, RNG states.

    Raises: UserError where a weight is nan or infinite; nothing is written then.
    """
    path = Path(path)
    if not all(tensor.isfinite().all() for tensor in
               _tensors([payload.get('agent'), payload.get('model')])):
        raise diverged(path)
    with atomic_write(path) as tmp:
        torch.save({'format': FORMAT, 'kind': kind, 'task': task, 'versions': versions(),
                    'command': utils.command(), 'machine': utils.machine(), **payload}, tmp)
        if path.exists():
            os.replace(path, previous(path))


def diverged(path: str | Path) -> UserError:
    """Return the error for a run whose weights are not finite; `path` is its snapshot's."""
    last = newest_snapshot(path)
    return UserError(f'weights became nan or infinite, so they were not saved to {path}'
                     f"{f' ({last} is from before)' if last else ''}: start a new run with a "
                     'lower learning rate.')


def _tensors(values) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested dicts and lists."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict | list | tuple):
        for part in values.values() if isinstance(values, dict) else values:
            yield from _tensors(part)


def num_bytes(values) -> int:
    """Return how many bytes the tensors in nested dicts and lists take. Count each tensor once,
    views at full size."""
    return sum({id(tensor): tensor.numel() * tensor.element_size()
                for tensor in _tensors(values)}.values())


def previous(path: Path) -> Path:
    return path.with_name(f'{path.stem}.prev{path.suffix}')


def newest_snapshot(path: str | Path) -> Path | None:
    """Return `path`, or what a kill between the two renames of `save_snapshot` leaves, or None."""
    return next(filter(utils.exists, (Path(path), previous(Path(path)))), None)


def load_snapshot(path: str | Path, kind: str | None, task: str | None = None,
                  remedy: str = 'train it again') -> dict:
    """Read a snapshot back onto the CPU, without running any code that it may hold.

    Raises: UserError where it is missing, truncated, pickled code, of another format, kind or
      task; `remedy` is the command that the sentence recommends.
    """
    found = newest_snapshot(path)
    if found is None:
        raise UserError(f"there is no {kind or 'snapshot'} at {path}: {remedy}.")
    if found.is_dir():
        raise UserError(f'{found} is a folder: name the snapshot in it, such as '
                        f"{found / 'snapshot.pt'}.")
    try:
        with zipfile.ZipFile(found) as archive:  # torch.load does not compare the checksums
            if any(part.compress_type for part in archive.infolist()):
                raise zipfile.BadZipFile('compressed')  # torch.save never does; a bomb has no end
            if changed := archive.testzip():
                raise zipfile.BadZipFile(changed)
        payload = torch.load(found, map_location='cpu', weights_only=True)
        if num_bytes(payload) > found.stat().st_size:  # copied, an expanded one would take memory
            raise ValueError('tensors that are larger than the file')
    except MemoryError:
        raise
    except PermissionError as error:
        raise utils.not_readable(found) from error
    except Exception as error:  # a damaged file can raise anything
        raise Damaged(f'{found} is damaged, or holds code instead of tensors and plain values '
                        f'({type(error).__name__}): remove it and {remedy}.') from error
    if (not isinstance(payload, dict) or payload.get('format') != FORMAT
            or not {'kind', 'task', 'made_by'} <= payload.keys()):
        raise UserError(f'{found} is not a snapshot of format {FORMAT}: {remedy}.')
    if kind is not None and payload['kind'] != kind:
        raise UserError(f"{found} is a snapshot of kind {payload['kind']}, not {kind}: {remedy}.")
    if task is not None and payload['task'] != task:
        raise UserError(f"{found} is for task {payload['task']}, not {task}: {remedy}.")
    return payload


def rebuild(make: Callable, args: dict, weights: dict):
    """Return `make(**args)`, an agent or a model, on the CPU and with the weights of a snapshot.

    A damaged snapshot's arguments may ask for more memory than there is. So it is first made on
    PyTorch's device 'meta', which allocates nothing, and refused if it is far larger than the
    weights.

    Raises: RuntimeError and others where they do not go together, see `must_fit`.
    """
    for device in ('meta', 'cpu'):
        with torch.device(device), warnings.catch_warnings(action='ignore'):
            made = make(**args)
            made.load_state_dict(weights)  # on 'meta' it compares, copies nothing, and says so
        # Ten times is usual: a slim snapshot has only the weights that act, in half precision.
        if num_bytes(made.state_dict()) > 100 * num_bytes(weights):
            raise ValueError('sizes that are not those of the weights')
    return made


@contextlib.contextmanager
def must_fit(path: str | Path, remedy: str = 'train it again'):
    """Context manager around the use of a snapshot's contents.

    Raises: UserError where something is missing, or sizes are not what they should be.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        what = str(error).strip().splitlines()[0][:100] if str(error).strip() else ''
        raise UserError(f'{path} does not hold what it should ({type(error).__name__}: {what}): '
                        f'{remedy}.') from error


def load_last(work_dir: Path, kind: str, task: str) -> dict | None:
    """Return the newest snapshot of the run in this folder, if it has one.

    Where that is damaged, it is set aside, and the one before is returned.

    Raises: UserError where none can be read, or it is of another kind or task.
    """
    path = work_dir / 'snapshot.pt'
    if not newest_snapshot(path):
        return None

    def load(path: Path) -> dict:
        last = load_snapshot(path, kind, remedy='start a new run')
        if last['task'] != task:
            raise UserError(f"the run in {work_dir} is of {last['task']}, not {task}: go on with "
                            f'hydra.run.dir={work_dir} alone, or set task={last["task"]} as well.')
        return last
    try:
        return load(path)
    except Damaged:
        if not (path.exists() and previous(path).exists()):
            raise
    last = load(previous(path))
    damaged = path.with_name('snapshot.damaged.pt')
    os.replace(path, damaged)  # else the next snapshot would push out the one that is whole
    print(f'warning: {path} was damaged and is now {damaged.name}; the run goes on from the '
          'snapshot before it.', file=sys.stderr)
    return last


def slim(source: str | Path, target: str | Path):
    """Copy a snapshot with only the weights that act or translate.

    Tensors of 4096 numbers or more are stored in half precision. This makes `experts/<task>.pt` and
    `ct/<task>.pt`: python snapshots.py slim IN OUT
    """
    if Path(target).suffix != '.pt' or Path(target).is_dir():
        raise UserError(f'{target} is a folder, or does not end in .pt: write to a file such as '
                        'experts/<task>.pt.')
    payload = load_snapshot(source, None, remedy='choose another')
    slimmed = {key: payload[key] for key in SLIM if key in payload}

    def halved(weights: dict) -> dict:
        return {key: value.half() if value.numel() >= 2 ** 12 else value
                for key, value in weights.items()}
    if 'agent' in payload:
        agent = payload['agent']
        with must_fit(source, 'choose another'):
            if 'mean' in agent['actor']:  # an `ac_agent.Learner`, whose mean acts
                slimmed['agent'] = {'actor': {'mean': halved(agent['actor']['mean'])}}
            else:
                slimmed['agent'] = {key: halved(agent[key]) for key in ('encoder', 'actor')}
    if 'model' in payload:
        slimmed['model'] = halved(payload['model'])
    with atomic_write(target) as tmp:
        torch.save(slimmed, tmp)


if __name__ == '__main__':
    with utils.exit_on_user_error():
        if len(sys.argv) != 4 or sys.argv[1] != 'slim':
            raise UserError('usage: python snapshots.py slim run/snapshot.pt experts/task.pt')
        slim(*sys.argv[2:])
