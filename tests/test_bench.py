import bench
import pytest
import torch


class PlainSide:
    """At the other end of the pipe: answers each 'run' with the next of its times."""

    def __init__(self, seconds):
        self.seconds, self.asked = iter(seconds), []

    def send(self, what):
        self.asked.append(what)

    def recv(self):
        return next(self.seconds)


def test_a_row_is_of_medians_without_the_first_call(monkeypatch):
    ours = iter([50.0, 1.0, 2.0, 9.0])
    monkeypatch.setattr(bench, 'timed', lambda call, device: next(ours))
    pipe = PlainSide([70.0, 8.0, 4.0, 2.0])
    row = bench.Row('render', 'frames', 20, None, None, 3, flops=5.0, plain_amount=2,
                    difference=lambda: 0.25)
    assert bench.measure(row, torch.device('cpu'), pipe, peak=100.0) == {
        'part': 'render', 'unit': 'frames/s', 'difference': 0.25,
        'ours': 10.0,         # 20 frames in the median of 1, 2 and 9 seconds
        'plain': 0.5,         # 2 frames in that of 8, 4 and 2
        'ratio': 20.0,
        'share_of_peak': 0.5}  # 10 frames a second of 5 operations each
    assert pipe.asked == ['run'] * 4 + ['next']


def test_an_unknown_part_is_told_before_anything_is_timed(monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['bench.py', 'learning', 'rendring'])
    monkeypatch.setattr(bench, 'measured', None)
    with pytest.raises(SystemExit):
        bench.main()
    assert 'rendring' in capsys.readouterr().err
