"""What is shipped does what is said of it; benchmarks/evaluate_experts.py looks closer."""
import evaluate_experts
import pytest

import dmc
import utils


def test_every_policy_meets_the_same_episodes():
    env = dmc.make('reacher_easy', obs='states')
    still = [evaluate_experts.play(env, lambda obs: [0, 0], 2) for _ in range(2)]
    assert (still[0] == still[1]).all() and len(still[0]) == 2


def test_official_figures_are_those_of_the_nearest_frames():
    at, end = evaluate_experts.official('walker_walk', 996_000)
    assert int(at) > 0 and end.startswith(at) and end.endswith('1.0M')
    assert evaluate_experts.official('walker_walk', 104_000)[0] == evaluate_experts.official(
        'walker_walk', 100_000)[0] < at
    assert evaluate_experts.official('fish_swim', 100) == ('', '')


@pytest.mark.parametrize('path', evaluate_experts.shipped(), ids=lambda path: path.stem)
def test_a_shipped_expert_is_one(path):
    assert path.stat().st_size < 8e6
    made = utils.load_snapshot(path, 'expert', path.stem)
    expert, rand = evaluate_experts.evaluate(path, num_episodes=2)
    bar = evaluate_experts.BARS[path.stem]
    assert expert.mean() > 0.8 * bar > rand.mean()
    table = (evaluate_experts.ROOT / 'experts/README.md').read_text()
    [row] = [row for row in table.splitlines()
             if row.startswith(f"| {path.stem} | {made['made_by']['env_args']['obs']} |")]
    if evaluate_experts.MISSED not in row:
        assert expert.mean() > 0.95 * bar  # which is that of 20 episodes
