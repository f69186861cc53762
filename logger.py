"""Write metrics: to a CSV for each kind, the console, and TensorBoard, which also gets films and
hyperparameters."""
import csv
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TextIO

import cv2
import imageio.v3 as iio
import numpy as np
import torch

import snapshots
import utils

KINDS = ('train', 'eval')
WIDTH = 100  # columns of a line on the console; what does not fit stands in the CSV
SCORE = '0_score/imitator'  # '0_' puts it first
# Keys that end like this have the same value in each evaluation.
CONSTANT = ('expert_return', 'random_return', 'psnr_translation', '_copy_first')
FIRST = ('task_return', 'expert_return', 'random_return', 'episode_reward', 'psnr',
         'psnr_copy_first', 'agreement', 'rank', 'probe_gross')  # on the console

SUCCESS = 0.8  # the score from which an episode counts as a success


def episode_scores(imitator: np.ndarray, expert: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Return each episode's score, 1 - (expert - imitator) / mean(expert - random): 0 is a random
    policy's, 1 the expert's.

    Their mean is (imitator - random) / (expert - random) of the mean returns. The denominator is a
    mean over episodes because in some of them even a random policy gets what the expert gets; where
    it is 0 there is no score, but nan.

    Args: returns (N,) in the same episodes.
    """
    span = float(np.mean(expert - random))
    return 1 - (expert - imitator) / (span or float('nan'))


class Progress:
    """Speed and time left of a long job: on a terminal one line that is rewritten, else lines."""

    WINDOW = 30.0  # seconds over which the speed is taken
    TERMINAL_EVERY, PLAIN_EVERY = 0.2, 10.0  # seconds from one line to the next

    def __init__(self, total: int, unit: str, done: int = 0,
                 clock: Callable[[], float] = time.monotonic, stream: TextIO | None = None):
        """Begin at `done` of `total` units.

        Args:
          total: units that make the whole job.
          unit: one of them, in the singular: 'frame', 'episode'.
          done: units that an earlier run has made; they do not count for the speed, nor does the
            time until the first unit is made.
          clock: monotonic seconds; tests hand in their own.
          stream: where to write; None is stdout.
        """
        self.total, self.unit, self.done, self.note = total, unit, done, []
        self._clock, self._stream = clock, stream or sys.stdout
        self._rewrites = self._stream.isatty()
        self._line_open = False  # the cursor stands at the end of a line that is to be rewritten
        self._shown, self._shown_at = '', clock()
        self._samples = deque()  # (time, units)

    def update(self, done: int):
        """Take note that `done` units of the total are made."""
        now, self.done = self._clock(), done
        samples = self._samples
        if len(samples) > 1 and now - samples[-2][0] < self.WINDOW / 60:
            samples.pop()  # the newest sample moves on, so that there are never many of them
        samples.append((now, done))
        while len(samples) > 2 and now - samples[1][0] >= self.WINDOW:
            samples.popleft()

    @property
    def speed(self) -> float:
        """Units a second over the window; 0 while nothing is known."""
        if not self._samples:
            return 0.0
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - start) if end > start else 0.0

    @property
    def eta(self) -> float:
        """Seconds until `total` at that speed; infinite while the speed is 0."""
        left = max(self.total - self.done, 0)
        if not left:
            return 0.0
        return left / self.speed if self.speed else float('inf')

    def __str__(self) -> str:
        parts = [f'{self.done}/{self.total} {self.unit}s']
        if self.speed:
            parts += [f'{_short(self.speed)} {self.unit}s/s',
                      f'{timedelta(seconds=round(self.eta))} left']
        return fit([*parts, *self.note])

    def show(self, done: int, note: list[str] | None = None):
        """Update, and write the line if the one before is old enough.

        Args:
          note: stands behind the figures from now on, as far as it fits; None keeps the present
            one.
        """
        self.update(done)
        self.note = self.note if note is None else note
        now = self._samples[-1][0]
        if now - self._shown_at < (self.TERMINAL_EVERY if self._rewrites else self.PLAIN_EVERY):
            return
        self._shown, self._shown_at = str(self), now
        if self._rewrites:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line cannot be rewritten
            self._write(self._shown[:width])
        else:
            self._write(f'{self._shown}\n')
        self._line_open = self._rewrites

    def say(self, line: str):
        """Write a line that stays; it takes the place of the one that is rewritten."""
        if self._line_open:
            self._shown = ''
        self._write(f'{line}\n')
        self._line_open = False

    def close(self):
        """Leave the final state standing, once."""
        if self._line_open or str(self) != self._shown:
            self.say(str(self))
            self._shown = str(self)

    def _write(self, text: str):
        self._stream.write(f'\r\x1b[K{text}' if self._line_open else text)
        self._stream.flush()


class Logger:
    """Averages what it is handed; `dump` writes the means as a row, as points and as a line."""

    def __init__(self, work_dir: str | Path, total: int, unit: str = 'frame', resume_step: int = 0,
                 use_tb: bool = True, settings: Mapping | None = None,
                 clock: Callable[[], float] = time.monotonic, stream: TextIO | None = None):
        """Open the files, and go on at `resume_step`.

        Args:
          work_dir: gets train.csv, eval.csv and tb/.
          total: steps of the whole run.
          unit: what a step is called; the first column of the CSVs.
          resume_step: where the run goes on (0: a new run). Rows and points after it come from
            steps that were lost; they are dropped, so that no curve has doubled points.
          settings: nested plain values, for TensorBoard's table of hyperparameters.
          clock, stream: as for `Progress`.
        """
        self.progress = Progress(total, unit, resume_step, clock, stream)
        self._sums = {ty: {} for ty in KINDS}  # key -> (sum, count)
        self._files = {ty: _Csv(Path(work_dir) / f'{ty}.csv', unit, resume_step) for ty in KINDS}
        self._tb = _TensorBoard(Path(work_dir) / 'tb', resume_step, settings) if use_tb else None

    def log_metrics(self, metrics: Mapping[str, float | torch.Tensor], step: int,
                    ty: str = 'train'):
        """Add values to the next dump's means, and show that the run has come to `step`.

        Args:
          metrics: numbers, or one-element tensors on any device: they are summed where they are,
            and nothing waits for the device before `dump`.
          ty: 'train' or 'eval'.
        """
        sums = self._sums[ty]
        for key, value in metrics.items():
            if isinstance(value, torch.Tensor):
                value = value.detach().float()  # a sum of ones in bf16 stops growing at 256
            total, count = sums.get(key, (0.0, 0))
            sums[key] = (total + value, count + 1)
        self.progress.show(step)

    def dump(self, step: int, ty: str = 'train') -> dict[str, float]:
        """Write the means since the last dump as the row of `step`, and return them."""
        means = {key: float(total) / count for key, (total, count) in self._sums[ty].items()}
        self._sums[ty] = {}
        if not means:
            return means
        self._files[ty].write(step, means)
        if self._tb:
            self._tb.write(step, means, ty)
        keys = sorted(means, key=lambda key: FIRST.index(key) if key in FIRST else len(FIRST))
        note = [f'{key} {_short(means[key])}' for key in keys]
        if ty == 'train':
            self.progress.show(step, note)
        else:
            self.progress.say(fit([f'{ty} at {self.progress.unit} {step}', *note]))
        return means

    def log_film(self, film: np.ndarray, step: int):
        """Show a clip, uint8 (T, H, W, 3), in TensorBoard."""
        if self._tb:
            self._tb.write_film(step, film)

    def close(self):
        self.progress.close()
        if self._tb:
            self._tb.close()


class _TensorBoard:
    """Writes for TensorBoard: the score first, then the film; constants become text."""

    NUM_IMAGES = 60  # of a film, at half its size: about 1 MB

    def __init__(self, folder: Path, resume_step: int, settings: Mapping | None):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import
        from torch.utils.tensorboard.summary import hparams
        threading.excepthook = _leave_full_disks_to_main_thread
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)
        self._told = set()
        if settings:
            values = {key: value if isinstance(value, bool | int | float | str) else str(value)
                      for key, value in utils.flat(settings).items()}
            metrics = dict.fromkeys((SCORE, 'eval/episode_reward', 'eval/psnr'))
            # `SummaryWriter.add_hparams` would open a second run for them.
            for summary in hparams(values, metrics):
                self._writer.file_writer.add_summary(summary)

    def write(self, step: int, means: Mapping[str, float], ty: str):
        constant = {key: value for key, value in means.items()
                    if ty == 'eval' and key.endswith(CONSTANT)}
        for key in means.keys() - constant.keys():
            self._writer.add_scalar(f'{ty}/{key}', means[key], step)
        if constant.keys() - self._told:
            self._told |= constant.keys()
            self._writer.add_text('constant in all evaluations', '| | |\n|---|---|\n' + '\n'.join(
                f'| {key} | {value:.4g} |' for key, value in constant.items()), step)
        returns = ('task_return', 'expert_return', 'random_return')
        if set(returns) <= means.keys() and ty == 'eval':
            score = float(episode_scores(*(np.array(means[name]) for name in returns)))
            if np.isfinite(score):
                self._writer.add_scalar(SCORE, score, step)
        self._writer.flush()

    def write_film(self, step: int, film: np.ndarray):
        """Write a clip as an animated GIF, an image to TensorBoard: `SummaryWriter.add_video` needs
        moviepy."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        height, width = film.shape[1] // 2, film.shape[2] // 2
        images = [cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
                  for image in film[::-(-len(film) // self.NUM_IMAGES)]]
        gif = iio.imwrite('<bytes>', np.stack(images), extension='.gif', duration=100, loop=0)
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(
            tag='0_film', image=Summary.Image(height=height, width=width, colorspace=3,
                                              encoded_image_string=gif))]), step)
        self._writer.flush()

    def close(self):
        self._writer.close()


def _leave_full_disks_to_main_thread(error):
    """A `threading.excepthook`: TensorBoard's own thread writes, and `Logger.dump` raises what went
    wrong there, so that a full disk is told once and without a traceback."""
    if getattr(error.exc_value, 'errno', None) not in utils.FULL:
        threading.__excepthook__(error)


class _Csv:
    """Rows of strictly growing step; columns join as they turn up, a missing value is empty."""

    def __init__(self, path: Path, step_name: str, resume_step: int):
        self._path, self._step_name = path, step_name
        self._columns, self._last_step = [step_name], -1
        if path.exists():
            self._rewrite([row for row in self._read() if int(row[step_name]) <= resume_step])

    def write(self, step: int, values: Mapping[str, float]):
        """Append a row; a new column, or a step that is there already, rewrites the file."""
        row = {self._step_name: str(step), **{key: repr(value) for key, value in values.items()}}
        if step > self._last_step and row.keys() <= set(self._columns):
            with self._path.open('a', newline='') as file:
                csv.DictWriter(file, self._columns, restval='').writerow(row)
            self._last_step = step
            return
        rows = {int(old[self._step_name]): old for old in self._read()}
        kept = [old for at, old in rows.items() if at < step]
        self._rewrite([*kept, {**rows.get(step, {}), **row}])

    def _read(self) -> list[dict[str, str]]:
        text = self._path.read_text() if self._path.exists() else ''
        whole_lines = text[:text.rfind('\n') + 1]  # a kill may leave half a line at the end
        return list(csv.DictReader(whole_lines.splitlines()))

    def _rewrite(self, rows: list[dict[str, str]]):
        self._columns = list(dict.fromkeys([*self._columns, *(key for row in rows for key in row)]))
        with snapshots.atomic_write(self._path) as tmp, open(tmp, 'w', newline='') as file:
            writer = csv.DictWriter(file, self._columns, restval='')
            writer.writeheader()
            writer.writerows(rows)
        self._last_step = int(rows[-1][self._step_name]) if rows else -1


def fit(parts: list[str]) -> str:
    """Join as many parts as a line holds."""
    while len(parts) > 1 and len(' | '.join(parts)) > WIDTH:
        parts = parts[:-1]
    return ' | '.join(parts)


def _short(value: float) -> str:
    return f'{value:.4g}' if abs(value) < 1e4 else f'{value:.0f}'
