"""What stands before each script: Hydra's command line, its checks, and errors in one sentence."""
import contextlib
import functools
import gc
import os
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import hydra
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import settings
import utils
from utils import Damaged, UserError


def main(script: str, task_names: Collection[str], check: Callable):
    """Decorate a script's main: `hydra.main` with any of these tasks, and errors in one sentence.

    `check` is called with the settings of each run before Hydra makes a folder. A `UserError` is
    printed without a traceback and ends the script with exit code 2. Ctrl-C and SIGTERM end it with
    exit codes 130 and 143, and the command to resume is printed.
    """
    register_tasks(task_names)

    def decorate(function):
        @functools.wraps(function)
        def guarded(cfg):
            with utils.exit_on_user_error(), utils.raise_interrupts():
                function(cfg)

        def run():
            gc.freeze()  # modules stay: looking through them again takes 0.3 s at exit
            gc.enable()
            os.environ['HYDRA_FULL_ERROR'] = '1'  # Hydra raises its errors and prints none
            with one_sentence(script):
                sys.argv[1:] = with_own_options(sys.argv[1:])
                BeforeRuns.wants_help = read_flags(sys.argv[1:]).help
                BeforeRuns.check = staticmethod(check)
                sys.argv = [argument for argument in sys.argv if argument not in ('--help', '-h')]
                hydra.main(str(settings.CFGS), script, version_base='1.3')(guarded)()
        return run
    return decorate


def register_tasks(names: Collection[str]):
    """Make `task=<name>` work: all scripts take the name; train.py also takes cfgs/drqv2/<name>."""
    files = {file.stem for file in (settings.CFGS / 'drqv2').glob('*.yaml')}
    for name in {*names, *files} - {'easy', 'hard'}:
        store = functools.partial(ConfigStore.instance().store, name, package='_global_')
        store({'task_name': name}, group='task')
        if name not in files:
            store({}, group='drqv2')


def with_own_options(arguments: list[str]) -> list[str]:
    """Return the arguments; if `hydra.run.dir=RUN` is the only one, followed by the options that
    RUN was started with.

    Raises: Damaged if these cannot be read.
    """
    key, _, folder = arguments[0].partition('=') if len(arguments) == 1 else ('', '', '')
    file = Path(folder) / '.hydra/overrides.yaml'
    if key != 'hydra.run.dir' or not file.exists():
        return arguments
    try:
        return [*arguments, *map(str.strip, OmegaConf.load(file)[:])]
    except (OSError, OmegaConfBaseException, TypeError, ValueError, yaml.YAMLError) as error:
        raise Damaged(f"{file} is damaged: write the run's options behind "
                      f'{arguments[0]}.') from error


def read_flags(arguments: list[str]):
    """Return Hydra's flags; refuse one that it does not know (UserError)."""
    def refuse(message: str):
        raise UserError(f'{message}: options are key=value, see --help; flags such as -m stand '
                        'before or after all of them.')
    parser = get_args_parser()
    parser.error = refuse
    return parser.parse_args(arguments)


@contextlib.contextmanager
def one_sentence(script: str):
    """End the script with a sentence and exit code 2 if Hydra cannot compose its settings."""
    with utils.exit_on_user_error():
        try:
            yield
        except OverrideParseException as error:
            raise UserError(f'{error.override} cannot be read as key=value: quote a value that '
                            "holds brackets, commas or =, as in 'lr=\"linear(1e-3,1e-4,6000)\"'."
                            ) from error
        except MissingConfigException as error:
            group, _, name = str(error.missing_cfg_file).rpartition('/')
            raise UserError(f'there is no {group}={name}; '
                            f'{settings.nearest(name, error.options or ())}') from error
        except (HydraException, ValueError) as error:
            message = ' '.join(str(error).split())
            if unknown := re.match("Could not override '(.+?)'", message):
                recipe = 'liu2017' if 'recipe=liu2017' in sys.argv else 'pose_code'
                known = settings.fields_of(settings.model_of(script, recipe))
                message = f'there is no option {unknown[1]}; {settings.nearest(unknown[1], known)}'
            elif several := re.match("Ambiguous value for argument '(.+?)' 1", message):
                message = (f'{several[1]} gives several values: add -m to run with each of them, '
                           'or put them in [ and ] for a list')
            elif message.startswith('Config group override'):  # such as task=3
                message = f"{' '.join(sys.argv[1:])}: {message}"
            elif isinstance(error, ValueError):  # no bad input, but a bug
                raise
            raise UserError(f"{message.rstrip('.')}.") from error


class BeforeRuns(Callback):
    """Hydra's callback before it makes a folder: checks the settings of all runs, or prints help.

    `main` sets its attributes; the callback is named in cfgs/. Hydra swallows the exceptions of
    callbacks but not `SystemExit`, so `one_sentence` ends the script here.
    """

    check: Callable
    wants_help: bool

    def on_run_start(self, config, **_):
        with one_sentence(config.hydra.job.config_name):
            self.begin([config], config.hydra.run)

    def on_multirun_start(self, config, **_):
        with one_sentence(config.hydra.job.config_name):
            loader = GlobalHydra.instance().config_loader()
            overrides = OverridesParser.create(loader).parse_overrides(
                list(config.hydra.overrides.task))
            for override in overrides:
                if override.is_sweep_override() and not (
                        override.is_discrete_sweep() and any(override.sweep_string_iterator())):
                    raise UserError(f'{override.input_line} does not say which values to run with: '
                                    'list them, as in seed=1,2.')
            [runs] = BasicSweeper.split_arguments(overrides, None)
            self.begin([loader.load_sweep_config(config, run) for run in runs], config.hydra.sweep)

    def begin(self, configs: list, folder):
        for config in configs:
            cfg = OmegaConf.masked_copy(config, [key for key in config if key != 'hydra'])
            if self.wants_help:
                tasks = (name.removesuffix('.yaml') for name in ConfigStore.instance().list('task'))
                print(settings.help_text(cfg, config.hydra.job.config_name, tasks))
                sys.exit()
            name = cfg.get('task_name')
            if name != config.hydra.runtime.choices.task:  # its values would be another task's
                raise UserError(f'task_name={settings.typed(name)} follows from task: write '
                                'task=<name> instead, see --help.')
            self.check(cfg)
            option = 'out_dir' if 'out_dir' in cfg else 'local_dir or hydra.run.dir'
            utils.check_folder(cfg.get('out_dir', folder.dir), option)
