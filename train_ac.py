"""Train the imitator on translated videos: python train_ac.py task=reacher_hard [recipe=liu2017]

The loop is train.py's `Workspace`; here stands what it is given, all of it from ac_agent.py:
demonstrations with the translator at work on them, the imitation environment and the `ACAgent`.
"""
import ctypes
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

import dmc
import utils
import video
from ac_agent import (
    ACAgent,
    Demonstrations,
    Reward,
    encode_play,
    load_translator,
    make_env,
)
from train import Workspace, check_action_repeat, check_settings
from utils import UserError

# Scores of a translator with which imitation has worked, and 1 where more is better, -1 where less.
WORKED = {'agreement': (0.01, -1), 'agreement_play': (0.015, -1), 'rank': (0.3, 1),
          'rank_play': (0.35, 1), 'probe_gross': (0.01, -1), 'probe_gross_play': (0.05, -1)}


def check_all_settings(cfg):
    """Raises: UserError for settings with which there is no run."""
    check_settings(cfg)
    agent = cfg.agent
    utils.require_at_least(cfg, 1, 'num_demos', 'num_eval_demos')
    utils.require_at_least(agent, 1, 'num_frames')
    utils.require_at_least(agent, 0, 'num_actions', 'max_shift', 'num_pretrain_updates')
    utils.require_at_least(cfg, 1 if agent.w_clone else 0, 'num_play')
    for one, other, weights in (('w_feature', 'w_img', (agent.w_feature, cfg.w_img)),
                                ('w_critic', 'w_clone', (agent.w_critic, agent.w_clone))):
        if min(weights) < 0 or not any(weights):
            raise UserError(f'{one} and {other} must not be negative, nor both 0: set {one}=1.')
    if agent.w_clone and cfg.recipe == 'liu2017':
        raise UserError(f'w_clone={agent.w_clone} takes a pose code, which recipe=liu2017 has not: '
                        'set w_clone=0.')
    utils.schedule(agent.stddev_schedule, 0)
    if not isinstance(agent.lr, (int, float)) or agent.lr <= 0:
        raise UserError(f'lr={agent.lr} must be a number above 0: set lr=1e-3.')
    if agent.reward_scale is not None and not agent.reward_scale > 0:
        raise UserError(f'reward_scale={agent.reward_scale} must be above 0, or null for a reward '
                        'that does not saturate: set reward_scale=0.1.')
    if min(agent.relabel, agent.hindsight) < 0 or agent.relabel + agent.hindsight > 1:
        raise UserError(f'relabel={agent.relabel} and hindsight={agent.hindsight} are shares of '
                        'one batch: set them to 0 or more, and no more than 1 together.')
    if any(step < 1 for step in agent.lookahead):
        raise UserError(f'lookahead={list(agent.lookahead)} is no list of steps ahead: set '
                        'lookahead=[1,3,6,12].')
    if not agent.w_critic:
        return
    if not agent.lookahead:
        if cfg.recipe == 'liu2017' or not agent.w_clone:
            raise UserError('lookahead=[] leaves the critic nothing to track, and a discriminator '
                            'in its place takes cloning: set lookahead=[1,3,6,12].')
        if cfg.nstep != 1 or cfg.w_img:
            raise UserError('without targets (lookahead=[]) the critic takes nstep=1 w_img=0: set '
                            'these.')
    elif agent.relabel + agent.hindsight:
        if cfg.nstep != 1:
            raise UserError(f'nstep={cfg.nstep} goes with the targets that were there: set '
                            'nstep=1, or relabel=0 hindsight=0.')
        if cfg.w_img or agent.lookahead[0] != 1:
            raise UserError(f'relabel={agent.relabel} and hindsight={agent.hindsight} work out '
                            'rewards from observations, which takes w_img=0 and 1 as the first '
                            'lookahead: set relabel=0 hindsight=0.')


def adopt_action_repeat(cfg, source: str | Path, action_repeat: int):
    """Set action_repeat to that of the expert behind `source`.

    Raises: UserError where the settings say otherwise, or are for less than one action.
    """
    if cfg.action_repeat not in (None, action_repeat):
        raise UserError(f'the expert behind {source} repeats its actions {action_repeat} times, '
                        f'not {cfg.action_repeat}: leave action_repeat out.')
    cfg.action_repeat = action_repeat
    check_action_repeat(cfg)


def film_demonstrations(cfg, im_size: int):
    """Let the expert film what is to be imitated; it goes on where it was interrupted."""
    expert = utils.load_snapshot(cfg.expert, 'expert', cfg.task_name,
                                 remedy=f'python train.py task={cfg.task_name}')
    adopt_action_repeat(cfg, cfg.expert, expert['made_by']['env_args']['action_repeat'])
    command = [sys.executable, str(Path(__file__).parent / 'generate_expert_video.py'),
               f'task={cfg.task_name}', f'snapshot={cfg.expert}', f'out_dir={cfg.data_dir}',
               f'num_train={cfg.num_demos}', f'num_valid={cfg.num_eval_demos}',
               f'num_play={cfg.num_play if cfg.agent.w_clone else 0}', 'num_play_valid=0',
               f'im_size={im_size}', f'seed={cfg.seed}']
    print(f'{cfg.data_dir} lacks videos: {cfg.num_demos} demonstrations and more are filmed there '
          'first', flush=True)

    def end_with_parent():
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if code := subprocess.run(command, check=False, preexec_fn=end_with_parent).returncode:
        sys.exit(code)


def report(workspace: Workspace, num_videos: int = 5) -> str:
    """Write report.md, episodes.csv and demo.mp4 into the run's folder: what came of it, to read
    and to see."""
    result = workspace.last_eval
    clips = [[workspace.eval_env.panels(64) for _ in workspace.play(episode)]
             for episode in range(num_videos)]
    frames = [panels for clip in clips for panels in [*clip, *[clip[-1]] * 10]]
    path = workspace.work_dir / 'demo.mp4'
    video.save(path, video.panels_side_by_side(frames))
    text = (f"| {workspace.cfg.task_name}, held-out episodes and contexts | |\n|---|---|\n"
            f"| return, random | {result['random_return']:.1f} |\n"
            f"| return, imitator | {result['task_return']:.1f} |\n")
    if 'expert_return' in result:
        span = result['expert_return'] - result['random_return']
        score = (result['task_return'] - result['random_return']) / span if span else float('nan')
        text += (f"| return, expert | {result['expert_return']:.1f} |\n"
                 f"| (imitator - random) / (expert - random) | {score:.2f} |\n"
                 f"| PSNR of the translation | {result['psnr_translation']:.1f} dB |\n"
                 f"| PSNR of copying the first frame | {result['psnr_copy_first']:.1f} dB |\n")
    else:
        text += (f"| squared distance of codes | {result['distance']:.3f} |\n\nWhat the videos' "
                 'expert returned is not known, so there is no score. Each episode starts where '
                 "it looks most like its video; what does not move in a video, such as reacher's "
                 'target, is elsewhere there.\n')
    with utils.atomic_write(workspace.work_dir / 'report.md') as tmp:
        tmp.write_text(text)
    columns = [name for name in ('task_return', 'expert_return', 'random_return')
               if name in result]
    rows = [[episode[name] for name in columns] for episode in workspace.last_eval_episodes]
    with utils.atomic_write(workspace.work_dir / 'episodes.csv') as tmp:
        np.savetxt(tmp, rows, fmt='%.4f', delimiter=',', header=','.join(columns), comments='')
    return f'\n{text}\nvideo: {path}\ntable: {workspace.work_dir / "report.md"}'


def judge_translator(scores: dict[str, float]) -> str:
    """A line of the code's scores, and a warning where one is worse than what has worked."""
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
    """The splits 'train' and 'valid', and 'play' where cloning needs it, filmed if missing.

    Raises: UserError where they are not of this task, or drawn otherwise than pictures are here.
    """
    root = Path(cfg.data_dir)
    limits = {'train': cfg.num_demos, 'valid': cfg.num_eval_demos}
    if cfg.agent.w_clone:
        limits['play'] = cfg.num_play
    if lacking := [split for split in limits if not video.is_whole(root / split)]:
        if video.is_whole(root / 'train') and video.Clips(root / 'train').imported:
            raise UserError(f'{root / lacking[0]} lacks episodes beside your own videos: python '
                            f'generate_expert_video.py task={cfg.task_name} out_dir={root} '
                            'from_mp4=<folder>, with the options as before.')
        film_demonstrations(cfg, im_size)
    splits = {}
    for split, limit in limits.items():
        splits[split] = clips = video.Clips(root / split, cfg.task_name, im_size,
                                            dmc.CONTEXT_QUALITY, max_episodes=limit)
        if split != 'play' and clips.meta['num_contexts'] < 2 - clips.imported:
            raise UserError(f'{clips.root} shows each episode in one context only; one more is '
                            'needed for the agent: python generate_expert_video.py '
                            f'task={cfg.task_name} num_contexts=4 out_dir=<another folder>.')
        adopt_action_repeat(cfg, clips.root, clips.meta['action_repeat'])
    return splits


def make_workspace(cfg, work_dir: Path) -> Workspace:
    """The run, ready to be trained; its expert films demonstrations if there are none.

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
        # A resumed run keeps its scale: worked out anew, it could differ in the last digits.
        scale = last and last['made_by'].get('scale')
    demos = Demonstrations(model, splits['train'], scale)
    eval_demos = Demonstrations(model, splits['valid'], demos.scale)
    agent = cfg.agent
    options = (agent.num_frames, agent.lookahead, agent.num_actions,
               Reward(agent.reward_scale, agent.time_power, agent.w_feature), cfg.w_img)
    train_env = make_env(demos, *options)
    eval_env = make_env(eval_demos, *options, evaluate=True)
    agent_args = dict(OmegaConf.to_container(agent, resolve=True),
                      obs_shape=list(train_env.observation_spec().shape),
                      action_dim=train_env.action_spec().shape[0],
                      feature_dim_of_frame=model.feature_dim)

    def make_agent(**args) -> ACAgent:  # called once all else is checked: it encodes the videos
        if cfg.agent.w_clone:
            args |= dict(demos=demos.features(),
                         play=encode_play(model, splits['play'], demos.scale))
        return ACAgent(**args)
    made_by = {'translator_sha256': utils.sha256(cfg.snapshot), 'recipe': cfg.recipe,
               'expert_sha256': splits['train'].meta['expert_sha256'], 'num_demos': len(demos),
               'num_play': len(splits.get('play', ())), 'w_img': cfg.w_img, 'scale': demos.scale}
    if splits['train'].imported:
        made_by['mp4_sha256'] = splits['train'].meta['mp4_sha256']
    return Workspace(cfg, work_dir, 'imitator', train_env, eval_env, make_agent, agent_args,
                     made_by, last, overlap=utils.pick_device(cfg.device).type == 'cpu')


@utils.main('train_ac', dmc.task_names())
def main(cfg):
    with utils.only_one_at_work(utils.work_dir()):
        workspace = make_workspace(cfg, utils.work_dir())
        workspace.train()
        print(f'snapshot: {workspace.snapshot_path}\n{report(workspace)}')


if __name__ == '__main__':
    main()
