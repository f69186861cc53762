"""What is shipped does what is said of it; tools/evaluate.py looks closer."""
import evaluate
import imageio.v3 as iio
import numpy as np
import pytest
from fakes import FakeEnv, judge_args, save_expert

import dmc
import snapshots
import utils


def test_every_policy_meets_the_same_episodes():
    env = dmc.make('reacher_easy', obs='states')
    still = [evaluate.Player(env, lambda obs: [0, 0]).results(2) for _ in range(2)]
    assert still[0] == still[1] and [result['steps'] for result in still[0]] == [500, 500]


def test_official_figures_are_those_of_the_same_frames():
    at, end = evaluate.official('walker_walk', 1_000_000)
    assert int(at) > 0 and end.startswith(at) and end.endswith('1.0M')
    there, between, after = (int(evaluate.official('finger_spin', frames)[0])
                             for frames in (300_000, 350_000, 400_000))
    assert there < after and abs(between - (there + after) / 2) <= 1
    assert evaluate.official('fish_swim', 100) == ('', '')


def test_the_table_has_a_row_for_each_file():
    rows = [row.strip('| ').split(' | ')[:2]
            for row in (evaluate.ROOT / 'experts/README.md').read_text().splitlines()
            if row.startswith('| ') and not row.startswith('| task')]
    assert rows == [[path.stem,
                     snapshots.load_snapshot(path, 'expert')['made_by']['env_args']['obs']]
                    for path in evaluate.shipped()]
    assert sum(path.stat().st_size for path in evaluate.shipped()) < 60e6


def test_returns_seen_on_other_processors_stay(monkeypatch):
    monkeypatch.setattr(evaluate, 'cpu_name', lambda: 'B')
    returns = np.array([900.0, 950.0])
    assert evaluate.seen_on(returns) == 'B: **925** ± 25'
    both = evaluate.seen_on(returns, 'A with AMX: **900** ± 10; B: **1** ± 2')
    assert both == 'A with AMX: **900** ± 10; B: **925** ± 25'


@pytest.mark.parametrize('path', evaluate.shipped(), ids=lambda path: path.stem)
def test_a_shipped_expert_is_one(path):
    assert path.stat().st_size < 8e6
    snapshots.load_snapshot(path, 'expert', path.stem)
    expert, rand = evaluate.evaluate(path, num_episodes=2)
    bar = evaluate.BARS[path.stem]
    assert np.mean(expert) > 0.8 * bar > rand.mean()
    table = (evaluate.ROOT / 'experts/README.md').read_text()
    [row] = [row for row in table.splitlines() if row.startswith(f'| {path.stem} |')]
    assert snapshots.sha256(path)[:16] in row
    if evaluate.MISSED not in row:
        assert np.mean(expert) > 0.95 * bar  # which is that of 20 episodes


# ------------------------------------------------------------------------------ any snapshot

@pytest.fixture
def expert(tmp_path):
    """An untrained one of reacher_easy."""
    save_expert(tmp_path / 'run/snapshot.pt', action_repeat=4)
    return tmp_path / 'run/snapshot.pt'


def test_an_expert_is_played_beside_a_random_policy_and_filmed(expert, monkeypatch):
    monkeypatch.setitem(evaluate.MOST_FRAMES, '.mp4', 25)
    # a run's folder will do
    line, film = evaluate.judge(expert.parent, judge_args(show=1)).splitlines()
    player, rand = evaluate.open_expert(expert, 'reacher_easy')
    returns, low = ([result['return'] for result in each.results(2, seed=1)]
                    for each in (player, rand))
    assert line == (f'{expert}, expert of reacher_easy: {np.mean(returns):.1f} ± '
                    f'{np.std(returns):.1f} over 2 episodes, lowest {min(returns):.1f}; '
                    f'random {np.mean(low):.1f}')
    assert film == f"video: {expert.with_suffix('.mp4')}"
    frames = iio.imread(expert.with_suffix('.mp4'))
    assert frames.shape == (26 + 10, 280, 256, 3)  # 250 steps; the last frame stands still
    fps = iio.immeta(expert.with_suffix('.mp4'))['fps']
    assert fps == pytest.approx(1 / (4 * 0.02 * 10), abs=0.01)  # as time goes


def test_contexts_change_the_picture_and_not_the_task(expert):
    own, _ = evaluate.open_expert(expert, 'reacher_easy')
    random, _ = evaluate.open_expert(expert, 'reacher_easy', 'random')
    assert own.results(1) == random.results(1)
    pictures = []
    for player in (own, random):
        for episode in (0, 1, 0):
            next(player.play(7, episode))
            pictures.append(player.env.render(32))
    plain, one, other, again = pictures[0], *pictures[3:]
    assert (one == again).all() and (one != other).any() and (one != plain).mean() > 0.5


def test_what_does_not_act_or_does_not_go_together_is_told(expert, tmp_path):
    for kind, options, words in (
            ('translator', {}, 'is a translator, which does not act: choose a snapshot'),
            ('imitator', {'contexts': 'random'}, 'leave --contexts out'),
            ('expert', {'videos': 'x'}, 'leave --translator and --videos out'),
            ('expert', {'translator': 'x'}, 'leave --translator and --videos out')):
        snapshots.save_snapshot(tmp_path / 'a.pt', kind, 'reacher_easy', {'made_by': {}})
        with pytest.raises(utils.UserError, match=words):
            evaluate.judge(tmp_path / 'a.pt', judge_args(**options))
    for path in (tmp_path / 'none.pt', tmp_path):
        with pytest.raises(utils.UserError, match='there is no snapshot at .*: choose'):
            evaluate.judge(path, judge_args())


@pytest.mark.parametrize('options', [['--out', 'x.mp4'], ['a.pt', 'b.pt', '--out', 'x.mp4'],
                                     ['a.pt', '--out', 'x.png'], ['a.pt', '--episodes', '0'],
                                     ['a.pt', '--show', '-1']])
def test_options_without_sense_are_told(monkeypatch, capsys, options):
    monkeypatch.setattr('sys.argv', ['evaluate.py', *options])
    monkeypatch.setattr(evaluate, 'judge', None)
    with pytest.raises(SystemExit, match='2'):
        evaluate.main()
    assert 'error: ' in capsys.readouterr().err


def test_a_film_goes_from_the_worst_to_the_best_or_shows_the_median():
    values = np.array([5.0, 1.0, 4.0, 2.0, 3.0])
    assert values[evaluate.spread(values, 3)].tolist() == [1, 3, 5]
    assert values[evaluate.spread(values, 1)].tolist() == [3]
    assert values[evaluate.spread(values[:4], 1)].tolist() == [4]
    assert sorted(evaluate.spread(values, 5)) == [0, 1, 2, 3, 4]


def test_a_long_episode_is_filmed_in_steps():
    player = evaluate.Player(FakeEnv(length=10), lambda obs: [0, 0])
    [result] = player.results(1)
    assert result['steps'] == 10 and result['return'] < 0
    film = evaluate.film_episode(player, evaluate.SEED, 0, result, every=4)
    assert film[:, -1, 0, 0].tolist() == [0, 4, 8, *[8] * 10]
