"""Train the imitator on translated videos: python train_ac.py task=reacher_hard [recipe=liu2017]

The loop is train.py's `Workspace`; here stands what it is given, all of it from ac_agent.py:
demonstrations with the translator at work on them, the imitation environment and the `ACAgent`.
"""
import gc
import signal

if __name__ == '__main__':  # the imports below take seconds; utils.main turns both on again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    gc.disable()

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np

import dmc
import utils
import video
from ac_agent import (
    ACAgent,
    Demonstrations,
    Reward,
    complete,
    encode_play,
    load_translator,
    make_env,
)
from ct_model import Dynamics
from logger import SUCCESS, episode_scores
from train import Workspace, agent_args, check_settings
from utils import UserError

# The worst scores of the shipped translators whose imitators reach 0.8 on average (README,
# "Results"), rounded, and 1 where more is better, -1 where less.
WORKED = {'agreement': (0.021, -1), 'agreement_play': (0.032, -1), 'rank': (0.47, 1),
          'rank_play': (0.42, 1), 'probe_gross': (0.054, -1), 'probe_gross_play': (0.25, -1)}


def check_all_settings(cfg):
    """Raise UserError for settings with which there is no run."""
    check_settings(cfg, 'train_ac')
    is_paper = cfg.recipe == 'liu2017'
    tracks, discriminates = (cfg.w_critic and cfg.lookahead,
                             cfg.w_critic and not cfg.lookahead)
    relabels = tracks and cfg.relabel + cfg.hindsight
    for wrong, sentence in (
            (cfg.w_feature == cfg.w_img == 0, 'w_feature and w_img are both 0: set w_feature=1.'),
            (cfg.w_critic == cfg.w_clone == 0, 'w_critic and w_clone are both 0: set '
             'w_critic=1.'),
            (cfg.w_clone and is_paper, f'w_clone={cfg.w_clone} takes a pose code, which '
             'recipe=liu2017 has not: set w_clone=0.'),
            (cfg.w_imagine and not (cfg.w_clone and cfg.lookahead and cfg.lookahead[0] == 1
                                    and cfg.num_frames >= Dynamics.HISTORY and not cfg.w_img),
             f'w_imagine={cfg.w_imagine} takes cloning, 1 as the first lookahead, '
             f'num_frames={Dynamics.HISTORY} or more and w_img=0: set w_imagine=0.'),
            (cfg.w_clone and not cfg.num_play, 'num_play=0 leaves cloning no play to learn '
             'actions from: set num_play=1 or more.'),
            (cfg.relabel + cfg.hindsight > 1, f'relabel={cfg.relabel} and hindsight='
             f'{cfg.hindsight} are shares of one batch: set them to no more than 1 together.'),
            (cfg.timing == 'nearest' and not cfg.lookahead, 'timing=nearest times targets, and '
             'lookahead=[] leaves none: set timing=clock.'),
            (discriminates and (is_paper or not cfg.w_clone), 'lookahead=[] leaves the critic '
             'nothing to track, and a discriminator in its place takes cloning: set '
             'lookahead=[1,3,6,12].'),
            (discriminates and (cfg.nstep != 1 or cfg.w_img), 'without targets (lookahead=[]) the '
             'critic takes nstep=1 w_img=0: set these.'),
            (relabels and cfg.nstep != 1, f'nstep={cfg.nstep} goes with the targets that were '
             'there: set nstep=1, or relabel=0 hindsight=0.'),
            (relabels and (cfg.w_img or cfg.lookahead[0] != 1), f'relabel={cfg.relabel} and '
             f'hindsight={cfg.hindsight} work out rewards from observations, which takes w_img=0 '
             'and 1 as the first lookahead: set relabel=0 hindsight=0.')):
        if wrong:
            raise UserError(sentence)


def adopt_action_repeat(cfg, source: str | Path, action_repeat: int):
    """Set action_repeat to that of the expert behind `source`.

    Raises: UserError where the settings say otherwise, or num_train_frames is less than one action.
    """
    if cfg.action_repeat not in (None, action_repeat):
        raise UserError(f'the expert behind {source} repeats its actions {action_repeat} times, '
                        f'not {cfg.action_repeat}: leave action_repeat out.')
    if cfg.action_repeat is None:
        cfg.action_repeat = action_repeat
        check_all_settings(cfg)


def film_what_is_missing(cfg, im_size: int, limits: dict[str, int]):
    """Film what the splits lack, in a process of its own.

    Args:
      limits: split -> how many episodes, where there are none yet. What is there already goes on as
        it was ordered, with the options in its meta.json.

    Raises: UserError where the expert is missing, or what is missing is an imitator's play.
    """
    expert = utils.load_snapshot(cfg.expert, 'expert', cfg.task_name,
                                 remedy=f'python train.py task={cfg.task_name}')
    adopt_action_repeat(cfg, cfg.expert, expert['made_by']['env_args']['action_repeat'])
    numbers, options = {'play': 0, **limits, 'play_valid': 0}, {'seed': cfg.seed}
    for split in limits:
        path = Path(cfg.data_dir) / split / 'meta.json'
        if utils.exists(path):
            there = video.read_json(path)
            numbers[split] = there['num_episodes']
            options = utils.flat({key: there[key] for key in (
                'seed', 'num_contexts', 'episode_len', 'scenery')})
            if not video.is_whole(path.parent) and any(
                    'player_sha256' in video.read_json(episode)
                    for episode in path.parent.glob('episode_*.json')):
                raise UserError(f'{path.parent} lacks episodes of an imitator: python '
                                f'generate_expert_video.py task={cfg.task_name} out_dir='
                                f'{cfg.data_dir} num_{split}={numbers[split]} player=<its snapshot>'
                                ', with the options as before.')
    options |= {'im_size': im_size} | {f'num_{split}': num for split, num in numbers.items()}
    command = [sys.executable, str(Path(__file__).parent / 'generate_expert_video.py'),
               f'task={cfg.task_name}', f'snapshot={cfg.expert}', f'out_dir={cfg.data_dir}',
               *(f'{key}={value}' for key, value in options.items())]
    print(f'{cfg.data_dir} lacks videos; they are filmed first', flush=True)

    def end_with_parent():
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if code := subprocess.run(command, check=False, preexec_fn=end_with_parent).returncode:
        sys.exit(code)
    print(f'{cfg.data_dir} has all videos: the imitator is trained now', flush=True)


def report(workspace: Workspace, num_videos: int = 5) -> str:
    """Write report.md, episodes.csv and demo.mp4 into the run's folder: what came of it, to read
    and to see."""
    cfg, result, films = workspace.cfg, workspace.last_eval, []
    for episode in range(num_videos):
        panels = [workspace.eval_env.panels(64) for _ in workspace.play(episode)]
        info = workspace.eval_env.episode_info
        films.append(video.episode_clip(panels, info['task_return'], info.get('expert_return')))
    path = workspace.work_dir / 'demo.mp4'
    video.save(path, np.concatenate(films))
    columns = [name for name in ('task_return', 'expert_return', 'random_return') if name in result]
    rows = np.array([[episode[name] for name in columns]
                     for episode in workspace.last_eval_episodes])
    returns = dict(zip(columns, rows.T, strict=True))
    table = [(f'return, {who}', f'{returns[name].mean():.1f} ± {returns[name].std():.1f}')
             for who, name in (('random', 'random_return'), ('imitator', 'task_return'),
                               ('expert', 'expert_return')) if name in returns]
    note = ''
    if 'expert_return' in returns:
        scores = episode_scores(*rows.T)
        table += [('(imitator - random) / (expert - random)', f'{scores.mean():.2f}'),
                  (f'episodes that score {SUCCESS} or more',
                   f'{np.sum(scores >= SUCCESS)} of {len(scores)}'),
                  ('PSNR of the translation', f"{result['psnr_translation']:.1f} dB"),
                  ('PSNR of copying the first frame', f"{result['psnr_copy_first']:.1f} dB")]
    else:
        table.append(('squared distance of features', f"{result['distance']:.3f}"))
        note = ("\nWhat the videos' expert returned is not known, so there is no score. Each "
                "episode starts from the reset that looks most like its video's first frame.\n")
    table += [('agent steps (frames)', f'{workspace.global_step:,} ({workspace.global_frame:,})'),
              ('minutes', f'{workspace.timer.total() / 60:.0f}'), ('seed', cfg.seed),
              ('command', f'`python {utils.command()}`')]
    text = f'| {cfg.task_name}, held-out episodes and contexts | |\n|---|---|\n' + ''.join(
        f'| {name} | {value} |\n' for name, value in table) + note
    with utils.atomic_write(workspace.work_dir / 'report.md') as tmp:
        tmp.write_text(text)
    with utils.atomic_write(workspace.work_dir / 'episodes.csv') as tmp:
        np.savetxt(tmp, rows, fmt='%.4f', delimiter=',', header=','.join(columns), comments='')
    return f'\n{text}\nvideo: {path}\ntable: {workspace.work_dir / "report.md"}'


def judge_translator(scores: dict[str, float]) -> str:
    """Return a line of the code's scores, and a warning where one is worse than what has worked."""
    shown = {name: scores[name] for name in (*WORKED, 'probe', 'probe_play', 'open_loop',
                                             'open_loop_still') if name in scores}
    bad = [f'{name} {scores[name]:.3g} (has worked with {worked:g})'
           for name, (worked, sign) in WORKED.items()
           if name in scores and not sign * scores[name] >= sign * worked]  # nan is bad as well
    line = 'translator: ' + ', '.join(f'{name} {value:.3g}' for name, value in shown.items())
    if bad:
        line += (f"\nwarning: the translator may be too weak to imitate with: {', '.join(bad)}; "
                 'film more, or train it longer.')
    return line


def open_videos(cfg, im_size: int) -> dict[str, video.Clips]:
    """Return the splits 'train', 'valid' and, where cloning needs it, 'play'; film what is missing.

    Raises: UserError where they are not of this task, or drawn otherwise than pictures are here.
    """
    root = Path(cfg.data_dir)
    limits = {'train': cfg.num_demos, 'valid': cfg.num_eval_demos}
    if cfg.w_clone:
        limits['play'] = cfg.num_play
    if lacking := [split for split in limits if not video.is_whole(root / split)]:
        meta = root / 'train/meta.json'
        if utils.exists(meta) and video.is_imported(video.read_json(meta)):
            raise UserError(f'{root / lacking[0]} lacks episodes beside your own videos: python '
                            f'generate_expert_video.py task={cfg.task_name} out_dir={root} '
                            'from_mp4=<folder>, with the options as before.')
        film_what_is_missing(cfg, im_size, limits)
    splits = {}
    for split, limit in limits.items():
        splits[split] = clips = video.Clips(root / split, cfg.task_name, im_size,
                                            dmc.CONTEXT_QUALITY, max_episodes=limit)
        if split != 'play' and clips.meta['num_contexts'] < clips.min_contexts:
            raise UserError(f'{clips.root} shows each episode in one context only; one more is '
                            'needed for the agent: python generate_expert_video.py '
                            f'task={cfg.task_name} num_contexts=4 out_dir=<another folder>.')
        adopt_action_repeat(cfg, clips.root, clips.meta['action_repeat'])
    return splits


def make_workspace(cfg, work_dir: Path) -> Workspace:
    """Return the run, ready to be trained; videos that are missing are filmed first.

    Raises: UserError for bad settings, translator or videos, before anything is trained.
    """
    check_all_settings(cfg)
    utils.set_precision(cfg.precision)
    model, scores = load_translator(cfg.snapshot, cfg.task_name, cfg.recipe,
                                    utils.pick_device(cfg.device), cfg.precision)
    if model.code:
        print(judge_translator(scores))
    splits = open_videos(cfg, model.im_size)

    last = utils.load_last(work_dir, 'imitator', cfg.task_name)
    with utils.must_fit(work_dir / 'snapshot.pt', 'start a new run'):
        if last:
            complete(last)
        # A resumed run keeps its scale: worked out anew, it could differ in the last digits.
        scale = last and last['made_by'].get('scale')
    demos = Demonstrations(model, splits['train'], scale)
    eval_demos = Demonstrations(model, splits['valid'], demos.scale)
    options = (cfg.num_frames, cfg.lookahead, cfg.num_actions,
               Reward(cfg.reward_scale, cfg.time_power, cfg.w_feature), cfg.w_img, cfg.timing)
    train_env = make_env(demos, *options)
    eval_env = make_env(eval_demos, *options, evaluate=True)
    args = {**agent_args(cfg, ACAgent, train_env), 'feature_dim_of_frame': demos.feature_dim}

    def make_agent(**args) -> ACAgent:  # called once all else is checked: it encodes the videos
        if cfg.w_clone:
            args |= dict(demos=demos.features(), dynamics=demos.dynamics,
                         play=encode_play(model, splits['play'], demos.scale))
        return ACAgent(**args)
    made_by = {'translator_sha256': utils.sha256(cfg.snapshot), 'recipe': cfg.recipe,
               'expert_sha256': splits['train'].meta['expert_sha256'], 'num_demos': len(demos),
               'num_play': len(splits.get('play', ())), 'w_img': cfg.w_img, 'timing': cfg.timing,
               'scale': demos.scale}
    if splits['train'].imported:
        made_by['mp4_sha256'] = splits['train'].meta['mp4_sha256']
    return Workspace(cfg, work_dir, 'imitator', train_env, eval_env, make_agent, args,
                     made_by, last, overlap=utils.pick_device(cfg.device).type == 'cpu')


@utils.main('train_ac', dmc.task_names(), check_all_settings)
def main(cfg):
    with utils.only_one_at_work(utils.work_dir()):
        workspace = make_workspace(cfg, utils.work_dir())
        workspace.train()
        print(f'snapshot: {workspace.snapshot_path}\n{report(workspace)}')


if __name__ == '__main__':
    main()
