"""What all scripts share: errors, run folder, process, device, schedules, disk."""
import contextlib
import ctypes
import errno
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig

# ------------------------------------------------------------------------------------------- script

class UserError(Exception):
    """Bad input: one sentence that says what is wrong, where, and the remedy."""


class Damaged(UserError):
    """A file that is not as it was written."""


@contextlib.contextmanager
def exit_on_user_error():
    try:
        yield
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(f'error: {disk_full(error.filename)}', file=sys.stderr)
        sys.exit(2)
    except Interrupted as error:
        run = HydraConfig.get().run.dir
        where = '' if run == '.' else f" {typed_path('hydra.run.dir', work_dir())}"
        with contextlib.suppress(OSError):  # nobody may be reading
            print(f'\nto resume: python {command()}{where}', file=sys.stderr, flush=True)
        if error.launcher:
            error.launcher(error.signal, None)
        sys.exit(128 + error.signal)

# --------------------------------------------------------------------------------------- run folder

def work_dir() -> Path:
    """Return the run's folder, which Hydra made."""
    return Path(HydraConfig.get().runtime.output_dir)


def command() -> str:
    """Return the running script's command line, e.g. 'train.py task=reacher_hard obs=states'; ''
    outside a script."""
    if not HydraConfig.initialized():
        return ''
    started = HydraConfig.get()
    return shlex.join([f'{started.job.name}.py', *started.overrides.task])


def typed_path(key: str, path: str | Path) -> str:
    """Return key=path as it is typed in a shell, quoted where shell or Hydra would misread it."""
    plain = re.fullmatch(r'[\w./-]+', str(path))
    return f'{key}={path}' if plain else shlex.quote(f'{key}="{path}"')


def flat(values: dict, prefix: str = '') -> dict:
    """Return {'a.b': 1} for {'a': {'b': 1}}."""
    parts = [flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}
             for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}

# ------------------------------------------------------------------------------------------ process

STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1  # Ctrl-C, kill, sbatch --signal=USR1


class Interrupted(KeyboardInterrupt):
    """A request to stop: `signal` is its number, `launcher` a cluster launcher's own handler of it,
    or None."""

    def __init__(self, number: int, launcher: Callable | None = None):
        super().__init__()
        self.signal, self.launcher = number, launcher


def _raise_interrupt(number: int, frame):
    _end_at_once([n for n in STOP_SIGNALS if signal.getsignal(n) is _raise_interrupt])
    raise Interrupted(number)


def _end_at_once(numbers: Iterable[int]):
    """Let the next of these signals end the process, unless it comes within a second: one request
    can arrive twice (`timeout` signals its child and its group)."""
    first = time.monotonic()

    def again(number: int, frame):
        if time.monotonic() - first > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
    for number in numbers:
        signal.signal(number, again)


@contextlib.contextmanager
def raise_interrupts():
    """Make STOP_SIGNALS raise `Interrupted` within the block, so that nothing half done is left.
    Those that are ignored, or that a cluster's launcher already answers, are left alone."""
    before, in_main = {}, threading.current_thread() is threading.main_thread()
    for number in STOP_SIGNALS if in_main else ():
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            before[number] = signal.signal(number, _raise_interrupt)
    try:
        # deliver signals that were blocked while importing
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stop:
    """Context manager that holds back `Interrupted` until `raise_if_asked`: a run ends between two
    steps. It also holds back a launcher's answer to SIGUSR1 and SIGUSR2 (submitit's requeues)."""

    def __init__(self):
        self.asked = None  # the number of the signal that was held back
        self._held = {}

    def __enter__(self):
        in_main = threading.current_thread() is threading.main_thread()
        handlers = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGUSR2)
                    if in_main}
        self._held = {number: handler for number, handler in handlers.items()
                      if handler is _raise_interrupt
                      or number in (signal.SIGUSR1, signal.SIGUSR2) and callable(handler)}
        for number in self._held:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._held.items():
            if signal.getsignal(number) == self._note:  # else a signal has come
                signal.signal(number, handler)

    @contextlib.contextmanager
    def at_once(self):
        """Let signals end the block at once: for long work of which nothing half done is kept.
        `asked` stays None then.

        Raises: Interrupted where one was held back before.
        """
        self.__exit__()
        self.raise_if_asked()
        yield
        for number in self._held:
            signal.signal(number, self._note)

    def _note(self, number: int, frame):
        self.asked = number
        _end_at_once(self._held)
        with contextlib.suppress(OSError, RuntimeError):  # nobody may be reading
            print('\nstopping after this step; a second Ctrl-C or SIGTERM ends it at once',
                  file=sys.stderr)

    def raise_if_asked(self):
        if self.asked:
            handler = self._held[self.asked]
            raise Interrupted(self.asked, None if handler is _raise_interrupt else handler)


def machine() -> str:
    """Return the name of the GPU in use, or 'CPU, 2 threads' (those of one operation)."""
    if torch.cuda.is_initialized():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def pick_device(name: str) -> torch.device:
    """Return the device of a name; 'auto' is CUDA where there is one, else the CPU.

    Raises: UserError for 'cuda' where there is none.
    """
    if name == 'cuda' and not torch.cuda.is_available():
        raise UserError('device=cuda, but PyTorch sees no CUDA device here: use device=auto.')
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    return torch.device(name)


def set_seed_everywhere(seed: int):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def derive_seed(*key: int) -> int:
    """Return a 32-bit seed that is a pure function of `key`, e.g. (run seed, stream, episode)."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def get_rng_states() -> dict:
    """Return the states of the generators that agents draw from (torch's, CUDA's)."""
    states = {'torch': torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states['cuda'] = torch.cuda.get_rng_state()
    return states


def set_rng_states(states: dict):
    torch.set_rng_state(states['torch'])
    if 'cuda' in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'])


def prepare_cpu():
    """Set up this process for fast training on a CPU."""
    # Second moments of fading gradients become denormal numbers, with which a CPU is several times
    # slower (the translator's step: 2.4 times).
    torch.set_flush_denormal(True)
    # glibc returns large freed blocks to the system, and getting the next one costs page faults
    # (DrQ-v2's update: 1.3 times slower). Other C libraries ignore this.
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt:
        m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
        mallopt(m_trim_threshold, 2 ** 31 - 1)
        mallopt(m_mmap_max, 0)


PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16}


def set_precision(name: str):
    """Set how this process multiplies fp32 matrices: 'fp32' exactly; 'bf16' with factors rounded to
    bf16 (to TF32 on CUDA) and sums in fp32.

    Raises: UserError for another name.
    """
    if name not in PRECISIONS:  # a snapshot may say anything
        raise UserError(f'precision={name} is neither bf16 nor fp32: set precision=fp32.')
    fast = name == 'bf16'
    torch.backends.mkldnn.matmul.fp32_precision = 'bf16' if fast else 'ieee'
    torch.backends.cuda.matmul.fp32_precision = 'tf32' if fast else 'ieee'
    torch.backends.cudnn.conv.fp32_precision = 'tf32' if fast else 'ieee'




# ------------------------------------------------------------------------------- schedules and time

def schedule(spec: str | float, step: int) -> float:
    """Return a schedule's value at a step: it is a number, or 'linear(start,end,duration)'."""
    try:
        return float(spec)
    except (TypeError, ValueError):
        match = re.fullmatch(r'linear\((.+)\)', str(spec).replace(' ', ''))
    try:
        start, end, duration = map(float, match[1].split(','))
        if not 0 < duration < math.inf:
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(f"schedule '{spec}' is neither a number nor 'linear(start,end,duration)', "
                        'of numbers and with a duration above 0: set it to 0.1, or to '
                        "'linear(1.0,0.1,10000)'.") from None
    mix = min(max(step / duration, 0.0), 1.0)
    return (1.0 - mix) * start + mix * end


class Until:
    """True while fewer than `until` frames have passed (`action_repeat` frames a step)."""

    def __init__(self, until: int, action_repeat: int = 1):
        self._until, self._action_repeat = until, action_repeat

    def __call__(self, step: int) -> bool:
        return step < self._until // self._action_repeat


class Every:
    """True once in every `every` frames, also where checks come at uneven steps."""

    def __init__(self, every: int | None, action_repeat: int = 1, step: int = 0):
        self._every = max(1, every // action_repeat) if every else None
        self._last = step // self._every if self._every else 0

    def __call__(self, step: int) -> bool:
        if self._every is None or step // self._every == self._last:
            return False
        self._last = step // self._every
        return True


class Timer:
    """Seconds since the last reset and in all; `total` goes on over a resume."""

    def __init__(self, total: float = 0.0):
        self._start = time.monotonic() - total
        self._last = time.monotonic()

    def reset(self) -> float:
        elapsed, self._last = time.monotonic() - self._last, time.monotonic()
        return elapsed

    def total(self) -> float:
        return time.monotonic() - self._start

# --------------------------------------------------------------------------------------------- disk

UNITS = {'GiB': 2 ** 30, 'MiB': 2 ** 20, 'KiB': 2 ** 10}
FULL = errno.ENOSPC, errno.EDQUOT


def check_disk(folder: str | Path, size: int, what: str, remedy: str):
    """Refuse to go on (UserError) where the disk of `folder`, which may not exist yet, lacks `size`
    bytes."""
    free = shutil.disk_usage(_existing(folder)).free
    if size > free:
        raise UserError(f'{what} in {folder} needs {_in_units(size)} and {_in_units(free)} are '
                        f'free: {remedy}.')


def check_folder(folder: str | Path, option: str):
    """Refuse a folder that cannot be made or written in (UserError); `option` chooses it."""
    there = _existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = 'may not be written in' if there.is_dir() else 'is a file'
        raise UserError(f'{there} {what}: set {option} to another folder.')


def not_readable(path: Path) -> UserError:
    return UserError(f'{path} may not be read by this user: change its permissions.')


def exists(path: Path) -> bool:
    """Tell whether a file or folder is there.

    Raises: UserError where this user may not look.
    """
    try:
        return path.exists()
    except PermissionError as error:
        raise not_readable(path) from error


def _existing(path: str | Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    # unlike Path.exists, os.path's takes what may not be looked into as not there
    return next(p for p in (Path(path), *Path(path).absolute().parents) if os.path.exists(p))


def _in_units(size: int) -> str:
    unit = next((unit for unit in ('GiB', 'MiB') if size >= UNITS[unit]), 'KiB')
    return f'{size / UNITS[unit]:.1f} {unit}'


def disk_full(path: str | Path | None) -> str:
    return (f"the disk{f' of {path}' if path else ''} is full: make room and start the same "
            'command in the same folder (hydra.run.dir, out_dir); it resumes from the last '
            'complete snapshot or episode.')
