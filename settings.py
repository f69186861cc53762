"""What each setting of the scripts may be, and --help.

Values stand in cfgs/. Type, range and a line of help stand here, in one model for each script.
"""
import difflib
import functools
import itertools
import json
import operator
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field
from pydantic.fields import FieldInfo

import utils
from utils import UserError

CFGS = Path(__file__).parent / 'cfgs'

# ------------------------------------------------------------------------------- types of settings

STRICT = pydantic.ConfigDict(strict=True, extra='forbid', frozen=True, allow_inf_nan=False)


def kind(base: Any, words: str, example: Any, **limits) -> Any:
    """Return a type that `words` describe; an error recommends `example`. `limits` are pydantic's,
    and ge, gt and le are added to the words."""
    words += ''.join(f' {said} {limits[name]}' for name, said in (
        ('ge', 'from'), ('gt', 'above'), ('le', 'to')) if name in limits)
    return Annotated[base, Field(title=words, examples=[example], **limits)]


def whole(least: int, example: int | None = None, **limits) -> Any:
    return kind(int, 'a whole number', least if example is None else example, ge=least, **limits)


def one_of(*names: str) -> Any:
    return kind(Literal[names], f"one of {', '.join(names)}", names[0])


def or_null(base: Any) -> Any:
    field = base.__metadata__[0]
    return kind(base | None, f'{field.title} or null', field.examples[0])


def schedule(example: Any, **limits) -> Any:
    """Return the type of what `utils.schedule` takes, a number or linear(...) of numbers. They are
    above 0, or from 0, as `limits` say."""
    number = kind(float, 'a number', example, **limits)
    above_0 = r' *(\d*[1-9]\d*\.?\d*|\d*\.\d*[1-9]\d*)(e[+-]?\d{1,2})? *'
    value = above_0 if 'gt' in limits else rf'({above_0}| *0\.?0* *)'
    linear = Annotated[str, Field(pattern=rf'^linear\({value},{value},{above_0}\)$')]
    words = f'{number.__metadata__[0].title} or linear(start,end,duration)'
    return kind(number | linear, words, example)


def span(low: float, high: float) -> Any:
    """Return the type of a list [low, high] within these limits."""
    def check(ends: list[float]) -> list[float]:
        if ends != sorted(ends):
            raise ValueError
        return ends
    ends = Annotated[list[Annotated[float, Field(ge=low, le=high)]], pydantic.AfterValidator(check)]
    return kind(ends, f'a range within [{low}, {high}]', '[low,high]', min_length=2, max_length=2)


def about(help_line: str) -> Any:
    return Field(description=help_line)


class Settings(pydantic.BaseModel):
    """Settings of a script, or of a section: unknown keys, nan and inf are refused."""

    model_config = STRICT


def section(**types) -> type[Settings]:
    return pydantic.create_model('Section', __base__=Settings, **types)


YesNo = kind(bool, 'true or false', False)
Name = kind(str, 'a name', 'reacher_hard', min_length=1)
File = kind(str, 'a path', './file.pt', min_length=1)
Folder = kind(str, 'a path', './folder', min_length=1)
Seed = whole(0, 1, le=2 ** 32 - 1)
Recipe = one_of('pose_code', 'liu2017')
Channels = kind(list[whole(1)], 'a list of 4 whole numbers from 1', '[32,64,128,256]',
                min_length=4, max_length=4)
Share = kind(float, 'a number', 0.5, ge=0, le=1)
Weight = kind(float, 'a number', 1, ge=0)
Rate = kind(float, 'a number', '1e-3', gt=0)
RateSchedule, Noise = schedule('1e-3', ge=0), schedule(0.2, gt=0)
Unit, Angle = span(0, 1), span(-180, 180)

# ------------------------------------------------------------------------------ models of settings


class Trainer(Settings):
    task_name: Name = about('follows from task=')
    seed: Seed = about('runs with the same seed and options are alike')
    device: one_of('auto', 'cpu', 'cuda') = about('device that computes the networks')
    precision: one_of('fp32', 'bf16') = about('precision of matrix products')
    use_tb: YesNo = about('write curves and videos for TensorBoard')
    local_dir: Folder = about('folder of all runs')


class Loop(Trainer):
    num_train_frames: whole(1) = about('simulator steps of the run')
    batch_size: whole(1) = about('transitions in a batch')
    lr: Rate = about('learning rate')
    hidden_dim: whole(1) = about('width of each network')
    eval_every_frames: whole(0) = about('0: evaluate at start and end only')
    num_eval_episodes: whole(1) = about('episodes in an evaluation')
    save_video: YesNo = about('film the first episode of each evaluation')
    log_every_frames: whole(0) = about('least frames from one line of the log to the next')
    snapshot_every_frames: whole(1) = about('frames from one snapshot to the next')


class Expert(Loop):
    obs: one_of('pixels', 'states') = about('what the agent sees')
    action_repeat: whole(1) = about('simulator steps that an action lasts')
    num_seed_frames: whole(0) = about('simulator steps before the first update')
    frame_stack: whole(1) = about('frames in an observation of pixels')
    im_size: whole(16, 84) = about('pixels along an edge')
    nstep: whole(1) = about("steps of the critic's return")
    discount: kind(float, 'a number', 0.99, ge=0, le=1) = about('discount of the return per step')
    replay_buffer_size: whole(2) = about('transitions to keep')
    feature_dim: or_null(whole(1)) = about('features between encoder and networks; null: all')
    stddev_schedule: Noise = about('exploration noise over agent steps')
    num_expl_steps: whole(0) = about('agent steps of uniform actions')


class Imitator(Loop):
    recipe: Recipe = about("this project's recipe or the paper's")
    translator: File = about("a translator's snapshot")
    data_dir: Folder = about("generate_expert_video.py's out_dir")
    num_demos: whole(1) = about('demonstrated episodes to learn from, at most')
    num_eval_demos: whole(1) = about('held-out demonstrated episodes, at most')


class CodeImitator(Imitator):
    num_play: whole(0) = about('episodes of play to learn from, at most')
    num_pretrain_updates: whole(0) = about("updates before the agent's first step")
    w_clone: Weight = about("weight of cloning in the actor's loss")
    w_value: Weight = about("weight of the critic's value in the actor's loss")


class Paper(Settings):
    w_img: Weight = about("weight of the images' distance in the reward")
    num_seed_frames: whole(0) = about('simulator steps before the first update')
    stddev_schedule: Noise = about('exploration noise over agent steps')


class PaperImitator(Imitator):
    liu2017: Paper


class ImageWeights(Settings):
    trans: Weight = about('weight of translated images in the loss')
    rec: Weight = about('weight of reconstructed images in the loss')
    align: Weight = about("weight of z3's distance from the target's z1; in the paper's code 1/346")
    foreground: Share = about("moving pixels' share of the weight in image losses")


class Networks(Settings):
    channels: Channels = about('in the paper [64,128,256,512]')
    z_dim: whole(1) = about('in the paper 1024')
    hidden: whole(1) = about('in the paper 1024')
    kernel: whole(1) = about('in the paper 5')
    code_dim: or_null(whole(1)) = about('numbers in the pose code; null: no code')


class Code(Settings):
    num_steps: whole(1) = about("steps of the pose code, after the translator's")
    lr: RateSchedule = about('learning rate of the pose code')
    weights: section(trans=Weight, rec=Weight, agree=Weight, forward=Weight, inverse=Weight,
                     noise=Weight)


class Translator(Trainer):
    recipe: Recipe = about("this project's recipe or the paper's")
    data_dir: Folder = about("generate_expert_video.py's out_dir")
    num_train_steps: whole(1) = about('steps of the translator')
    lr: RateSchedule = about('learning rate of the translator')
    batch_size: whole(1) = about('pairs of clips')
    frames_per_clip: whole(1) = about('frames in a clip, drawn anew for each pair')
    play_share: Share = about('share of play in a batch')
    augment_mirror: YesNo = about('mirror half of the pairs')
    eval_every: whole(1) = about('steps of the translator from one evaluation to the next')
    snapshot_every: whole(1) = about('steps from one snapshot, to resume from, to the next')
    weights: ImageWeights
    model: Networks
    code: Code


Factor = functools.partial(section, enabled=YesNo)
Scenery = section(
    body=Factor(saturation=Unit, value=Unit),
    target=Factor(saturation=Unit, value=Unit),
    floor=Factor(saturation=Unit, value=Unit, contrast=Unit),
    sky=Factor(saturation=Unit, value=Unit),
    light=Factor(brightness=span(0, 10), tint=Unit, tilt=Angle),
    camera=Factor(orbit=Angle, roll=Angle, zoom=span(0.1, 10)),
    distractors=Factor(count=span(0, 4), size=Unit, saturation=Unit, value=Unit))


class Filming(Settings):
    task_name: Name = about('follows from task=')
    expert: File = about("an expert's snapshot")
    from_mp4: or_null(Folder) = about(
        'a folder of own videos in place of an expert, *.mp4 or <context>/*.mp4')
    action_repeat: or_null(whole(1)) = about('simulator steps to a frame of own videos; null: 2')
    out_dir: Folder = about('a folder for each split; the same command resumes it')
    num_train: whole(1) = about('demonstrations in seen contexts')
    num_valid: whole(1) = about('demonstrations in held-out contexts; of own videos at most 1 in 5')
    num_play: whole(0) = about('episodes of random actions in seen contexts')
    num_play_valid: whole(0) = about('episodes of random actions in held-out contexts')
    player: or_null(File) = about("an imitator's snapshot: it plays, with noise")
    translator: File = about("the player's translator")
    num_contexts: whole(1) = about('contexts in which each episode is filmed')
    episode_len: whole(2) = about('agent steps from the start of an episode')
    im_size: kind(int, 'a multiple of 16', 64, multiple_of=16, gt=0) = about('pixels along an edge')
    seed: Seed = about('seed of the episodes and their contexts')
    num_workers: or_null(whole(1)) = about('processes; null: one for each core, at most 8')
    scenery: Scenery


def model_of(script: str, recipe: str | None) -> type[Settings]:
    """Return the model of a script's settings."""
    return {'train': Expert, 'train_ct': Translator, 'generate_expert_video': Filming,
            'train_ac': PaperImitator if recipe == 'liu2017' else CodeImitator}[script]


def fields_of(model: type[Settings], prefix: str = '') -> dict[str, FieldInfo]:
    """Return all fields of a model, those of its sections as 'code.lr'."""
    fields = {}
    for name, field in model.model_fields.items():
        part = field.annotation
        is_section = isinstance(part, type) and issubclass(part, Settings)
        fields |= fields_of(part, f'{prefix}{name}.') if is_section else {prefix + name: field}
    return fields


def check_settings(cfg, script: str):
    """Refuse the first setting that is not what it may be (UserError)."""
    try:
        values = OmegaConf.to_container(OmegaConf.create(cfg), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f'{error.full_key} cannot be worked out ({str(error).splitlines()[0]}): '
                        'set a plain value.') from error
    model = model_of(script, values.get('recipe'))
    try:
        model.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError(sentence(error.errors()[0], values, fields_of(model))) from None


def sentence(error: dict, values: dict, fields: dict[str, FieldInfo]) -> str:
    """Return which setting is wrong, what it may be, and what to set it to."""
    places = ['.'.join(map(str, error['loc'][:end])) for end in range(len(error['loc']), 0, -1)]
    key = next((place for place in places if place in fields), places[0])
    if error['type'] == 'extra_forbidden':
        return f'there is no option {key}; {nearest(key, fields)}'
    if key not in fields:
        parts = ', '.join(name for name in fields if name.startswith(f'{key}.'))
        return f'{key} is a section of options: set one of {parts}.'
    words, [example] = fields[key].title, fields[key].examples
    if error['type'] == 'missing':
        return f'{key} is missing and must be {words}: set {key}={typed(example)}.'
    value = functools.reduce(operator.getitem, key.split('.'), values)
    if error['type'] == 'int_type' and isinstance(value, float) and value.is_integer():
        example = int(value)  # 1e6 was meant as a whole number
    return f'{key}={typed(value)} must be {words}: set {key}={typed(example)}.'


def typed(value: Any) -> str:
    """Return a value as it is typed on the command line, e.g. 'null'."""
    return str(value) if isinstance(value, str | float) else json.dumps(value)


def nearest(name: str, names: Collection[str]) -> str:
    """Return how an error ends: 'the nearest are lr, code.lr; --help lists them all.'"""
    near = difflib.get_close_matches(name, names, cutoff=0.5) or (names if len(names) < 4 else ())
    return (f"the nearest are {', '.join(near)}; " if near else '') + '--help lists them all.'


def help_text(cfg, script: str, tasks: Collection[str]) -> str:
    """Return what --help prints: what heads the script's file in cfgs/, the options, the tasks."""
    head = itertools.takewhile(lambda line: line.startswith('#'),
                               (CFGS / f'{script}.yaml').read_text().splitlines())
    values = utils.flat(OmegaConf.to_container(cfg, resolve=True))
    fill = functools.partial(textwrap.fill, width=100, break_long_words=False,
                             break_on_hyphens=False)
    options = []
    for key, field in fields_of(model_of(script, cfg.get('recipe'))).items():
        if key in values and key != 'task_name':
            said = '; '.join(filter(None, (field.description, field.title)))
            options.append(fill(f"  {f'{key}={typed(values[key])}':38} {said}",
                                subsequent_indent=' ' * 41))
    return '\n'.join([*(line[2:] for line in head), '', 'Options, with their values here:',
                      *options, '', 'Tasks:',
                      fill('  ' + ' '.join(sorted(tasks)), subsequent_indent='  ')])
