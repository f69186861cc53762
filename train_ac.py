"""Train the imitator on translated videos: python train_ac.py task=reacher_hard [recipe=liu2017]

settings -> translator -> demonstrations -> train.py's `Workspace` -> report. What is learned, and
how, stands in ac_agent.py; what the agent sees, in imitation.py.
"""
import gc
import signal

if __name__ == '__main__':  # imports take seconds; command_line.main turns both on again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    gc.disable()

from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

import command_line
import dmc
import imitation
import settings
import snapshots
import utils
import video
from ac_agent import ACAgent, refuse_earlier
from drqv2 import DrQV2Agent
from imitation import Demonstrations, load_translator
from logger import SUCCESS, Progress, episode_scores
from train import Loop, Workspace, agent_args, check_length
from utils import UserError

FIXED = {'discount': 0.98, 'stddev': 0.3}  # arguments of `ACAgent`: no settings
# The worst scores, rounded, of the shipped translators with which imitators before the one recipe
# (commit b30d46b) reached 0.8 on average; 1: more is better, -1: less.
WORKED = {'agreement': (0.021, -1), 'agreement_play': (0.032, -1), 'rank': (0.47, 1),
          'rank_play': (0.42, 1), 'probe_gross': (0.054, -1), 'probe_gross_play': (0.25, -1)}


def check_settings(cfg):
    """Refuse settings with which there is no run (UserError)."""
    settings.check_settings(cfg, 'train_ac')
    if cfg.recipe == 'pose_code':
        if not cfg.num_play:
            raise UserError('num_play=0 leaves nothing to learn actions from: set num_play=1 or '
                            'more.')
        if cfg.w_clone == cfg.w_value == 0:
            raise UserError('w_clone and w_value are both 0, so that nothing is learned: set '
                            'w_clone=1.')


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
        table += [(name, f'{result[key]:.3f}') for name, key in (
            ('squared distance from its video', 'distance'),
            ('the same from another video', 'distance_other')) if key in result]
        note = ("\nWhat the videos' expert returned is not known, so there is no score. The agent "
                "starts from resets of its own. Distances are of codes, a mean over a video's "
                'moments: how far the nearest moment of the episode is.\n')
    table += [('agent steps (frames)', f'{workspace.global_step:,} ({workspace.global_frame:,})'),
              ('minutes', f'{workspace.timer.total() / 60:.0f}'), ('seed', cfg.seed),
              ('command', f'`python {utils.command()}`')]
    text = f'| {cfg.task_name}, held-out episodes and contexts | |\n|---|---|\n' + ''.join(
        f'| {name} | {value} |\n' for name, value in table) + note
    with snapshots.atomic_write(workspace.work_dir / 'report.md') as tmp:
        tmp.write_text(text)
    with snapshots.atomic_write(workspace.work_dir / 'episodes.csv') as tmp:
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
    """Return the splits 'train', 'valid' and, with a pose code, 'play'.

    Raises: UserError if one is missing, of another task, or drawn otherwise than pictures are here.
    """
    limits = {'train': cfg.num_demos, 'valid': cfg.num_eval_demos}
    if cfg.recipe == 'pose_code':
        limits['play'] = cfg.num_play
    splits = {name: video.Clips(Path(cfg.data_dir) / name, cfg.task_name, im_size,
                                dmc.CONTEXT_QUALITY, max_episodes=limit)
              for name, limit in limits.items()}
    for name, clips in splits.items():
        if name != 'play' and clips.meta['num_contexts'] < clips.min_contexts:
            raise UserError(f'{clips.root} shows each episode in one context only; one more is '
                            'needed for the agent: python generate_expert_video.py '
                            f'task={cfg.task_name} num_contexts=4 out_dir=<another folder>.')
        snapshots.require_same(clips.root, {'action_repeat': clips.meta['action_repeat']},
                               {'action_repeat': splits['train'].meta['action_repeat']},
                               'film the splits with one expert')
    return splits


def make_workspace(cfg, work_dir: Path) -> Workspace:
    """Return the run, ready to be trained.

    Raises: UserError for bad settings, translator or videos, before anything is written.
    """
    check_settings(cfg)
    utils.set_precision(cfg.precision)
    device = utils.pick_device(cfg.device)
    model, scores = load_translator(cfg.translator, cfg.task_name, cfg.recipe, device,
                                    cfg.precision)
    if model.code:
        print(judge_translator(scores))
    splits = open_videos(cfg, model.im_size)
    action_repeat = splits['train'].meta['action_repeat']
    check_length(cfg.num_train_frames, action_repeat)
    last = snapshots.load_last(work_dir, 'imitator', cfg.task_name)
    with snapshots.must_fit(work_dir / 'snapshot.pt', 'start a new run'):
        if last:  # else all that differs would be listed
            refuse_earlier(f'the run in {work_dir}', last['agent_args'], 'start a new run')
        # A resumed run keeps its scale: worked out anew, it could differ in the last digits.
        scale = last and last['made_by'].get('scale')
    demos = Demonstrations(model, splits['train'], scale)
    eval_demos = Demonstrations(model, splits['valid'], demos.scale)
    made_by = {'translator_sha256': snapshots.sha256(cfg.translator), 'recipe': cfg.recipe,
               'expert_sha256': splits['train'].meta['expert_sha256'], 'num_demos': len(demos),
               'num_play': len(splits.get('play', ())), 'scale': demos.scale}
    if splits['train'].imported:
        made_by['mp4_sha256'] = splits['train'].meta['mp4_sha256']

    if cfg.recipe == 'liu2017':
        paper = OmegaConf.to_container(cfg.liu2017)
        made_by['w_img'] = paper.pop('w_img')
        loop = Loop(action_repeat, paper.pop('num_seed_frames'), discount=FIXED['discount'])
        make_agent, fixed = DrQV2Agent, {**paper, 'feature_dim': None, 'update_every_steps': 1}
    else:
        loop, fixed = Loop(action_repeat, discount=FIXED['discount']), FIXED

        def make_agent(**args) -> ACAgent:  # called once all else is checked: it encodes the videos
            return ACAgent(**args, demos=demos.features(),
                           play=imitation.encode_play(model, splits['play']))
    train_env = imitation.make_env(demos, made_by.get('w_img'))
    eval_env = imitation.make_env(eval_demos, made_by.get('w_img'), evaluate=True)
    agent_class = ACAgent if cfg.recipe == 'pose_code' else DrQV2Agent
    return Workspace(cfg, work_dir, 'imitator', train_env, eval_env, make_agent,
                     agent_args(cfg, agent_class, train_env) | fixed, loop, made_by, last,
                     overlap=device.type == 'cpu')


def pretrain(workspace: Workspace):
    """Train the agent before its first step. A signal ends this at once; the run then begins
    anew."""
    cfg = workspace.cfg
    snapshots.keep_config(cfg)  # from here on the folder alone stands for the run
    progress = Progress(cfg.num_pretrain_updates, 'update')
    for done in workspace.agent.pretrain(cfg.num_pretrain_updates, cfg.batch_size):
        progress.show(done)
    progress.close()


@command_line.main('train_ac', dmc.task_names(), check_settings)
def main(cfg):
    with snapshots.only_one_at_work(utils.work_dir()):
        workspace = make_workspace(cfg, utils.work_dir())
        if cfg.recipe == 'pose_code' and not workspace.global_step:
            pretrain(workspace)
        workspace.train()
        print(f'snapshot: {workspace.snapshot_path}\n{report(workspace)}')


if __name__ == '__main__':
    main()
