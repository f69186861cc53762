"""What all scripts share: entry, settings, run folder, process, schedules, files, snapshots."""
import contextlib
import ctypes
import difflib
import errno
import fcntl
import functools
import gc
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

CFGS = Path(__file__).parent / 'cfgs'

# ------------------------------------------------------------------------------------------- script

class UserError(Exception):
    """Bad input: one sentence that says what is wrong, where, and the remedy."""


class Damaged(UserError):
    """A file that is not as it was written."""


def main(config_name: str, task_names: Sequence[str], check: Callable):
    """Decorate a script's main: `hydra.main` with any of these tasks, and errors in one sentence.

    `check` is called with the settings of each run before Hydra makes a folder. A `UserError` is
    printed without a traceback and ends the script with exit code 2. Ctrl-C and SIGTERM end it with
    exit codes 130 and 143, and the command to resume is printed.
    """
    def decorate(script):
        @functools.wraps(script)
        def guarded(cfg):
            with exit_on_user_error(), raise_interrupts():
                script(cfg)

        def run():
            gc.freeze()  # modules stay: looking through them again takes 0.3 s at exit
            gc.enable()
            with exit_on_user_error():
                sys.argv[1:] = with_own_options(sys.argv[1:])
                args = read_arguments(sys.argv[1:])
                groups = register_tasks(task_names)
                for cfg in compose_runs(config_name, args, groups):
                    if args.help:
                        print(help_text(cfg, config_name, groups['task']))
                        return
                    check(cfg)
            hydra.main(version_base='1.3', config_path=str(CFGS), config_name=config_name)(
                guarded)()
        return run
    return decorate


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
        print(f'error: {_disk_full(error.filename)}', file=sys.stderr)
        sys.exit(2)
    except Interrupted as error:
        run = HydraConfig.get().run.dir
        where = '' if run == '.' else f" {typed_path('hydra.run.dir', work_dir())}"
        with contextlib.suppress(OSError):  # nobody may be reading
            print(f'\nto resume: python {command()}{where}', file=sys.stderr, flush=True)
        if error.launcher:
            error.launcher(error.signal, None)
        sys.exit(128 + error.signal)


# ------------------------------------------------------------------------ command line and settings

def with_own_options(arguments: list[str]) -> list[str]:
    """Return the arguments; if `hydra.run.dir=RUN` is the only one, followed by the options that
    RUN was started with.

    Raises: Damaged where these cannot be read.
    """
    key, _, folder = arguments[0].partition('=') if len(arguments) == 1 else ('', '', '')
    path = Path(folder) / '.hydra/overrides.yaml'
    if key != 'hydra.run.dir' or not path.exists():
        return arguments
    try:
        return [*arguments, *map(str.strip, OmegaConf.load(path)[:])]
    except (OSError, OmegaConfBaseException, TypeError, ValueError, yaml.YAMLError) as error:
        raise Damaged(f"{path} is damaged: write the run's options behind "
                      f'{arguments[0]}.') from error


def read_arguments(arguments: list[str]):
    """Return Hydra's flags, and `overrides`.

    Raises: UserError for a flag that Hydra does not know.
    """
    def refuse(message: str):
        raise UserError(f'{message}: options are key=value, see --help; flags such as -m stand '
                        'before or after all of them.')
    parser = get_args_parser()
    parser.error = refuse
    return parser.parse_args(arguments)


def register_tasks(task_names: Sequence[str]) -> dict[str, list[str]]:
    """Make `task=<domain_task>` work for tasks that have no file in cfgs/task.

    Returns: for each folder in cfgs/, such as `task`, the names that it takes on a command line.
    """
    groups = {folder.name: sorted(path.stem for path in folder.glob('*.yaml'))
              for folder in CFGS.iterdir() if folder.is_dir()}
    tasks, files = set(task_names), set(groups['task'])
    for name in tasks - files:
        ConfigStore.instance().store(group='task', name=name, package='_global_',
                                     node={'defaults': ['medium'], 'task_name': name})
    return groups | {'task': sorted(tasks | files - {'easy', 'medium', 'hard'})}


def nearest(name: str, names: Iterable[str]) -> str:
    """Return how an error ends: 'the nearest are lr, code.lr; --help lists them all.'

    These are the three of `names` that are spelt most like `name`; if none is like it, they are
    left out, unless there are no more than three.
    """
    # An option may be meant without the section it is in.
    near = {full: max(difflib.SequenceMatcher(None, name, part).ratio()
                      for part in (full, full.rpartition('.')[2]))
            for full in sorted(names, key=len)}
    best = [full for full in sorted(near, key=near.get, reverse=True)
            if near[full] > 0.5 or len(near) <= 3]
    return (f"the nearest are {', '.join(best[:3])}; " if best else '') + '--help lists them all.'


def compose_runs(config_name: str, args, groups: dict[str, list[str]]) -> list:
    """Return the settings of each run that the arguments ask for: of one, or with -m of several.

    Args:
      groups: the names that each folder of cfgs/ takes.

    Raises: UserError for an override that cannot be read, or does not name a setting, and where the
      run's folder cannot be made.
    """
    if (args.hydra_help or args.shell_completion or args.experimental_rerun or args.config_name
            or args.config_path or args.config_dir):
        return []  # Hydra's own business
    several = args.multirun or 'hydra.mode=MULTIRUN' in args.overrides
    choices, cfgs = [], []
    try:
        for argument in args.overrides:
            override = parse_override(argument)
            swept = override.is_sweep_override()
            if swept and not several:
                raise UserError(f'{argument} gives several values: add -m to run with each of '
                                'them, or put them in [ and ] for a list.')
            if swept and (not override.is_discrete_sweep() or isinstance(override.value(), Glob)):
                raise UserError(f'{argument} does not say which values to run with: list them, as '
                                'in seed=1,2 or task=reacher_hard,finger_spin.')
            choices.append([parse_override(f'{override.get_key_element()}={value}') for value in
                            override.sweep_string_iterator()] if swept else [override])
        for run in itertools.product(*choices):
            chosen = [override for override in run if override.is_hydra_override()
                      or override.key_or_group in groups]
            for override in chosen:
                group, name = override.key_or_group, str(override.value())
                if group in groups and not override.is_delete() and name not in groups[group]:
                    raise UserError(f'there is no {group}={name}; {nearest(name, groups[group])}')
            cfgs.append(_compose(config_name, *(override.input_line for override in chosen)).copy())
            for override in run:
                if override not in chosen:
                    _set(cfgs[-1], override)
            folders = {override.key_or_group: override.value() for override in chosen
                       if override.key_or_group in ('hydra.run.dir', 'hydra.sweep.dir')}
            folders = folders or {option: cfgs[-1][option] for option in ('local_dir', 'out_dir')
                                  if option in cfgs[-1]}
            for option, folder in folders.items():
                if not (args.help or args.cfg or args.info):
                    check_folder(str(folder), option)
    except (HydraException, OmegaConfBaseException) as error:
        message = re.split('Config search path|See http', str(error))[0]
        raise UserError(' '.join(message.split()).rstrip('.') + '.') from error
    return cfgs


def parse_override(argument: str):
    """Return Hydra's reading of key=value; refuse what it cannot read (UserError)."""
    with contextlib.suppress(HydraException):
        override = OverridesParser.create().parse_override(argument)
        if override.key_or_group:
            return override
    raise UserError(f'{argument} cannot be read as key=value: quote a value that holds brackets, '
                    'commas or =, as in \'lr="linear(1e-3,1e-4,6000)"\'.')


@functools.cache
def _compose(config_name: str, *overrides: str):
    with hydra.initialize_config_dir(str(CFGS), version_base='1.3'):
        return hydra.compose(config_name, list(overrides))


def _set(cfg, override):
    """Apply an override as Hydra will; refuse one that is no option's new value (UserError)."""
    key, known = override.key_or_group, flat(OmegaConf.to_container(cfg))
    if key == 'task_name':  # alone it would go with another task's settings
        raise UserError(f'task_name={typed(override.value())} follows from task: write task=<name> '
                        'instead, see --help.')
    if not any(f'{name}.'.startswith(f'{key}.') for name in known):
        raise UserError(f'there is no option {key}; {nearest(key, known)}')
    if override.is_add() or override.is_delete():
        raise UserError(f'{override.input_line}: each option has a value, which can neither be '
                        f'added nor removed; write {key}=value.')
    OmegaConf.update(cfg, key, override.value())
    if known.keys() != flat(OmegaConf.to_container(cfg)).keys():
        raise UserError(f'{override.input_line} does not fit: the options there are '
                        f"{', '.join(name for name in known if f'{name}.'.startswith(f'{key}.'))}.")


def check_settings(cfg, script: str):
    """Check each setting by cfgs/allowed.yaml.

    Raises: UserError for the first that is not what it may be.
    """
    try:
        values = flat(OmegaConf.to_container(OmegaConf.create(cfg), resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f'{error.full_key} cannot be worked out ({str(error).splitlines()[0]}): '
                        'set a plain value.') from error
    for key in values:
        words, _, example = rule_of(key, script).partition(', such as ')
        if not allows(words, values[key]):
            example = example or words.removesuffix(' or null').split()[-1]
            if isinstance(values[key], float) and values[key].is_integer() and allows(
                    words, int(values[key])):  # 1e6 was meant as a whole number
                example = int(values[key])
            raise UserError(f'{key}={typed(values[key])} must be {words}: set {key}={example}.')


def rule_of(key: str, script: str) -> str:
    """Return what cfgs/allowed.yaml says of a setting; refuse one that it does not have
    (UserError)."""
    parts = [script, *key.split('.')]
    rules = _rules()
    for i in range(len(parts)):
        if rule := rules.get('.'.join(parts[i:])):
            return rule
    raise UserError(f'{script}.py has no setting {key}: leave it out.')


@functools.cache
def _rules() -> dict[str, str]:
    table = OmegaConf.load(CFGS / 'allowed.yaml')
    return {key: rule for rule, keys in table.items() for key in keys}


def allows(words: str, value: Any) -> bool:
    """Tell whether a setting may have this value; `words` are those of cfgs/allowed.yaml."""
    match words.split():
        case [*others, 'or', 'null']:
            return value is None or allows(' '.join(others), value)
        case ['true', 'or', 'false']:
            return isinstance(value, bool)
        case ['one', 'of', *names]:
            return value in ' '.join(names).split(', ')
        case ['a', 'name' | 'path']:
            return isinstance(value, str) and value != ''
        case ['a', 'multiple', 'of', step]:
            return type(value) is int and value > 0 and value % int(step) == 0
        case ['a', 'whole', 'number', *limits]:
            return type(value) is int and _within(limits, value)
        case ['a', 'number', *limits, 'or', 'linear(start,end,duration)']:
            try:
                ends = [schedule(value, step) for step in (0, sys.maxsize)]
            except UserError:
                return False
            return not isinstance(value, bool) and all(_within(limits, end) for end in ends)
        case ['a', 'number', *limits]:
            return type(value) in (int, float) and _within(limits, value)
        case ['a', 'list', 'of', *count, 'whole', 'numbers', 'from', least]:
            return (isinstance(value, list) and count in ([], [str(len(value))])
                    and all(allows(f'a whole number from {least}', item) for item in value))
        case ['a', 'range', 'within', low, high]:
            limits = ['from', low.strip('[,'), 'to', high.strip(']')]
            return (isinstance(value, list) and len(value) == 2
                    and all(type(end) in (int, float) and _within(limits, end) for end in value)
                    and value[0] <= value[1])
    raise ValueError(words)


def _within(limits: list[str], value: float) -> bool:
    """Tell whether a value is finite and within limits such as ['from', '0', 'to', '1']."""
    ends = dict(zip(limits[::2], map(float, limits[1::2]), strict=True))
    return (math.isfinite(value) and value > ends.get('above', -math.inf)
            and ends.get('from', -math.inf) <= value <= ends.get('to', math.inf))


def typed(value: Any) -> str:
    """Return a value as it is typed on the command line, e.g. 'null'."""
    return str(value) if isinstance(value, str | float) else json.dumps(value)


def help_text(cfg, config_name: str, tasks: list[str]) -> str:
    """Return what --help prints: what heads the script's file in cfgs/, the options that have a
    comment there, then the others."""
    files = [CFGS / f'{config_name}.yaml', *CFGS.glob(f"*/{cfg.get('recipe')}.yaml"),
             *CFGS.glob(f"*/{cfg.get('obs')}.yaml"), CFGS / 'loop.yaml', CFGS / 'base.yaml']
    head = itertools.takewhile(lambda line: line.startswith('#'), files[0].read_text().splitlines())
    values = flat(OmegaConf.to_container(cfg, resolve=True))
    said = {}
    for file in files:
        for key, comment in comments(file).items():
            if key in values:
                said.setdefault(key, comment)
    def fill(text: str, indent: int) -> str:
        return textwrap.fill(text, 100, subsequent_indent=' ' * indent, break_long_words=False,
                             break_on_hyphens=False)
    lines = [fill(f"  {f'{key}={typed(values[key])}':38} {comment}", 41)
             for key, comment in said.items()]
    others = [f'{key}={typed(value)}'.replace(' ', '') for key, value in values.items()
              if key not in said and key != 'task_name'
              and not key.startswith('drqv2.')]  # of task files
    return '\n'.join([*(line.removeprefix('#').removeprefix(' ') for line in head), '',
                      'Options, with their values here:',
                      *lines, '', 'Others:', fill('  ' + '  '.join(others), 2), '',
                      'Tasks:', fill('  ' + ' '.join(tasks), 2)])


def comments(file: Path) -> dict[str, str]:
    """Return what a YAML file says behind its keys, e.g. {'code.window': 'successive frames'}."""
    said, parents = {}, []
    for line in file.read_text().splitlines():
        if match := re.match(r'( *)(- )?(\w+):[^#]*(?:# (.*))?$', line):
            indent, item, key, comment = match.groups()
            parents = [key] if item else [*parents[:len(indent) // 2], key]
            if comment:
                said['.'.join(parents)] = comment
    return said


# --------------------------------------------------------------------------------------- run folder

def work_dir() -> Path:
    """Return the run's folder, which Hydra made."""
    return Path(HydraConfig.get().runtime.output_dir)


def keep_config(cfg):
    """Write .hydra/config.yaml and overrides.yaml into the run's folder, as Hydra would, but only
    once the settings are checked: what is refused changes nothing."""
    if not HydraConfig.initialized():
        return
    overrides = OmegaConf.create(list(HydraConfig.get().overrides.task))
    for name, values in (('config', cfg), ('overrides', overrides)):
        with atomic_write(work_dir() / f'.hydra/{name}.yaml') as tmp:
            OmegaConf.save(values, tmp)


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


def require_same(source: str | Path, before: dict, now: dict, remedy: str):
    """Refuse `source` where it was made with other values than those of `now`, and name them
    (UserError).

    Dicts within are compared value by value, as in `scenery.camera.zoom`.
    """
    before, now = flat(before), flat(now)
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


def flat(values: dict, prefix: str = '') -> dict:
    """Return {'a.b': 1} for {'a': {'b': 1}}."""
    parts = [flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}
             for key, value in values.items()]
    return {key: value for part in parts for key, value in part.items()}


def _short(value) -> str:
    """Return the beginning of a hash, anything else whole."""
    return f'{value[:12]}...' if re.fullmatch('[0-9a-f]{64}', str(value)) else str(value)


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


# -------------------------------------------------------------------------------------------- files

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


def reserve(path: Path):
    """Allocate a sparse file's blocks: a disk that fills up later would end the process that writes
    to its memory map (SIGBUS).

    Raises: OSError where the disk is full.
    """
    with open(path, 'rb+') as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno in FULL:  # else this file system cannot: the file stays sparse
                raise OSError(error.errno, error.strerror, str(path)) from error


def snapshot_space(path: Path, size: int) -> int:
    """Return how many bytes have to be free for snapshots of `size` bytes: the next is written
    while the last two are still there."""
    there = sum(p.stat().st_size for p in (path, previous(path)) if p.exists())
    return max(3 * size - there, 0)


def _in_units(size: int) -> str:
    unit = next((unit for unit in ('GiB', 'MiB') if size >= UNITS[unit]), 'KiB')
    return f'{size / UNITS[unit]:.1f} {unit}'


def _disk_full(path: str | Path | None) -> str:
    return (f"the disk{f' of {path}' if path else ''} is full: make room and start the same "
            'command in the same folder (hydra.run.dir, out_dir); it resumes from the last '
            'complete snapshot or episode.')


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
        if set(causes) & set(FULL) or shutil.disk_usage(path.parent).free < UNITS['MiB']:
            raise UserError(_disk_full(path)) from error
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
    check_folder(folder, option)
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


def sha256(path: str | Path) -> str:
    """Return the SHA-256, in hex, of a file, or of the snapshot that `newest_snapshot` finds."""
    with open(newest_snapshot(path), 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the packages that pixels, physics and weights depend on."""
    return {name: _version(name) for name in ('torch', 'mujoco', 'dm_control', 'numpy')}


_version = functools.cache(importlib.metadata.version)


def require_same_pictures(source: str | Path, there: dict, quality: list | None, here: list,
                          remedy: str):
    """Refuse `source` where it comes from pictures that are drawn otherwise than here (UserError).

    Args:
      there: `versions()` as they were there.
      quality: `dmc.QUALITY` or `dmc.CONTEXT_QUALITY` as it was there; `here`: as it is here.
    """
    require_same(source, {'mujoco': there['mujoco'], 'quality': quality},
                 {'mujoco': versions()['mujoco'], 'quality': here}, remedy)


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
                    'command': command(), 'machine': machine(), **payload}, tmp)
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
    return next(filter(exists, (Path(path), previous(Path(path)))), None)


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
        raise not_readable(found) from error
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
    `ct/<task>.pt`: python utils.py slim IN OUT
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
    with exit_on_user_error():
        if len(sys.argv) != 4 or sys.argv[1] != 'slim':
            raise UserError('usage: python utils.py slim run/snapshot.pt experts/task.pt')
        slim(*sys.argv[2:])
