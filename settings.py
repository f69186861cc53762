"""What a setting may be, the command line that gives it a value, and the sentences about both."""
import contextlib
import difflib
import functools
import gc
import itertools
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import utils
from utils import Damaged, UserError

CFGS = Path(__file__).parent / 'cfgs'


def main(config_name: str, task_names: Sequence[str], check: Callable):
    """Decorate a script's main: `hydra.main` with any of these tasks, and errors in one sentence.

    `check` is called with the settings of each run before Hydra makes a folder. A `UserError` is
    printed without a traceback and ends the script with exit code 2. Ctrl-C and SIGTERM end it with
    exit codes 130 and 143, and the command to resume is printed.
    """
    def decorate(script):
        @functools.wraps(script)
        def guarded(cfg):
            with utils.exit_on_user_error(), utils.raise_interrupts():
                script(cfg)

        def run():
            gc.freeze()  # modules stay: looking through them again takes 0.3 s at exit
            gc.enable()
            with utils.exit_on_user_error():
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




# ------------------------------------------------------------------------------------- command line

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
                    utils.check_folder(str(folder), option)
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
    key, known = override.key_or_group, utils.flat(OmegaConf.to_container(cfg))
    if key == 'task_name':  # alone it would go with another task's settings
        raise UserError(f'task_name={typed(override.value())} follows from task: write task=<name> '
                        'instead, see --help.')
    if not any(f'{name}.'.startswith(f'{key}.') for name in known):
        raise UserError(f'there is no option {key}; {nearest(key, known)}')
    if override.is_add() or override.is_delete():
        raise UserError(f'{override.input_line}: each option has a value, which can neither be '
                        f'added nor removed; write {key}=value.')
    OmegaConf.update(cfg, key, override.value())
    if known.keys() != utils.flat(OmegaConf.to_container(cfg)).keys():
        raise UserError(f'{override.input_line} does not fit: the options there are '
                        f"{', '.join(name for name in known if f'{name}.'.startswith(f'{key}.'))}.")

# ---------------------------------------------------------------------------- what a setting may be

def check_settings(cfg, script: str):
    """Check each setting by cfgs/allowed.yaml.

    Raises: UserError for the first that is not what it may be.
    """
    try:
        values = utils.flat(OmegaConf.to_container(OmegaConf.create(cfg), resolve=True))
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
                ends = [utils.schedule(value, step) for step in (0, sys.maxsize)]
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

# ------------------------------------------------------------------------------------------- --help

def help_text(cfg, config_name: str, tasks: list[str]) -> str:
    """Return what --help prints: what heads the script's file in cfgs/, the options that have a
    comment there, then the others."""
    files = [CFGS / f'{config_name}.yaml', *CFGS.glob(f"*/{cfg.get('recipe')}.yaml"),
             *CFGS.glob(f"*/{cfg.get('obs')}.yaml"), CFGS / 'loop.yaml', CFGS / 'base.yaml']
    head = itertools.takewhile(lambda line: line.startswith('#'), files[0].read_text().splitlines())
    values = utils.flat(OmegaConf.to_container(cfg, resolve=True))
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
