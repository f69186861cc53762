"""One file-backed ring of single frames, from which n-step transitions are sampled."""
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from dm_env import specs

import snapshots
import utils
from utils import UserError


class ReplayBuffer:
    """Stores each frame once; stacks and n-step returns are put together when sampled.

    Row i holds what arrived at time i: the newest frame, and the action, reward and discount that
    led to it (zeros for an episode's first). Only transitions of whole episodes are sampled,
    uniformly. One that begins less than `nstep` steps before the end gets the return up to the end,
    so that returns never cross episodes and the last steps of a short horizon are learned as well.

    The rows are memory-mapped files: the page cache decides how much stays in memory, and snapshots
    need not copy them. After a kill, a run goes back to its last snapshot or the one before:
    `slack` rows beyond `capacity` keep what it could sample then from being overwritten.
    """

    def __init__(self, root: Path, obs_spec: specs.Array, action_spec: specs.Array, capacity: int,
                 nstep: int, discount: float, frame_stack: int = 1, slack: int = 0, seed: int = 0,
                 device: torch.device | str = 'cpu', resume: bool = False, spare: int = 0):
        """Open the ring's files, or make them.

        Args:
          obs_spec: of the stacked observation; its first axis is `frame_stack` frames.
          capacity: rows to sample from; an episode takes one more than it has steps.
          slack: rows, at least those of one episode and of the steps between a snapshot and the
            second one after it.
          resume: go on with the files that are there; otherwise they are made anew.
          spare: bytes to be left on the disk, for a run's snapshots.

        Raises:
          UserError: the disk is too small for the files, or those to go on with are gone or of
            other sizes. Nothing is changed then.
        """
        self._nstep, self._discount, self._stack = nstep, discount, frame_stack
        self._capacity, self._device = capacity, torch.device(device)
        self._rng = np.random.default_rng(seed)
        self._size = capacity + slack + frame_stack
        frame = (obs_spec.shape[0] // frame_stack, *obs_spec.shape[1:])
        layout = {'obs': (frame, obs_spec.dtype), 'action': (action_spec.shape, np.float32),
                  'reward': ((), np.float32), 'discount': ((), np.float32),
                  'first': ((), np.int64), 'last': ((), np.int64), 'checksum': ((), np.int64)}
        self._root = Path(root)
        row_bytes = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize
                        for shape, dtype in layout.values())
        # In blocks: the files are sparse, and what was never written is not there yet.
        there = sum(path.stat().st_blocks * 512 for path in self._root.glob('*.npy'))
        utils.check_disk(self._root, self._size * row_bytes - there + spare,
                         f"the replay buffer{' with snapshots' if spare else ''}",
                         'set replay_buffer_size lower')
        self._rows = {}
        for name, (shape, dtype) in layout.items():
            path, shape = self._root / f'{name}.npy', (self._size, *shape)
            if not resume:
                self._root.mkdir(parents=True, exist_ok=True)
                self._rows[name] = np.lib.format.open_memmap(path, 'w+', dtype, shape)
                snapshots.reserve(path)
                continue
            try:
                rows = np.lib.format.open_memmap(path, 'r')  # 'r+' would lengthen a short file
                if rows.shape != shape or rows.dtype != dtype:
                    raise ValueError
                rows = np.lib.format.open_memmap(path, 'r+')
            except PermissionError as error:
                raise UserError(f'{path} may not be written by this user: change its '
                                'permissions.') from error
            except Exception as error:
                raise UserError(f'the replay buffer that belongs in {self._root} is gone, as after '
                                'a finished run, damaged, or of other sizes: start a new run.'
                                ) from error
            self._rows[name] = rows
        self._end = 0     # rows of whole episodes ever written
        self._cursor = 0  # rows ever written

    def __len__(self) -> int:
        """Rows that can be sampled from."""
        return min(self._end, self._capacity)

    def add(self, time_step, action: np.ndarray | None = None):
        """Append a dm_env.TimeStep and the action that led to it (None for the first)."""
        if time_step.first():
            self._cursor = self._end  # drops an episode that was broken off
        row = self._cursor % self._size
        frame = self._rows['obs'].shape[1]
        self._rows['obs'][row] = time_step.observation[-frame:]
        self._rows['action'][row] = 0.0 if time_step.first() else action
        self._rows['reward'][row] = 0.0 if time_step.first() else time_step.reward
        self._rows['discount'][row] = 1.0 if time_step.first() else time_step.discount
        self._cursor += 1
        if time_step.last():
            rows = np.arange(self._end, self._cursor) % self._size
            self._rows['first'][rows] = self._end
            self._rows['last'][rows] = self._cursor - 1
            self._rows['checksum'][rows] = self._checksum(rows)
            self._end = self._cursor

    def _checksum(self, rows: np.ndarray) -> int:
        """Return the CRC-32 of these rows, without the checksum column."""
        value = 0
        for name, column in self._rows.items():
            if name != 'checksum':
                value = zlib.crc32(column[rows], value)
        return value

    def _is_whole(self, first: int, end: int) -> bool:
        """Tell whether rows [first, end) are one episode, as it was written."""
        rows = np.arange(first, end) % self._size
        return bool((self._rows['first'][rows] == first).all()
                    and (self._rows['last'][rows] == end - 1).all()
                    and (self._rows['checksum'][rows] == self._checksum(rows)).all())

    def sample(self, batch_size: int, ahead: tuple[int, ...] = ()) -> tuple[torch.Tensor, ...]:
        """Return obs (B, *obs), action (B, A), reward (B, 1), discount (B, 1), next_obs (B, *obs),
        and for each number k in `ahead` the observation k steps after obs (B, *obs), or its
        episode's last, if that ends before. Observations are of their spec's dtype, the rest
        float32.

        reward is the discounted n-step sum; discount multiplies the value of next_obs. Sampled
        with a generator of the buffer's own, whose state is part of `state_dict`.
        """
        start = self._sample_starts(batch_size)
        last = self._rows['last'][start % self._size]
        reward = np.zeros(batch_size, np.float32)
        discount = np.ones(batch_size, np.float32)
        for step in range(1, self._nstep + 1):
            inside = start + step <= last
            row = (start + step) % self._size
            reward += np.where(inside, discount * self._rows['reward'][row], 0.0)
            discount *= np.where(inside, self._discount * self._rows['discount'][row], 1.0)
        obs = self._stacked(start)
        next_obs = self._stacked(np.minimum(start + self._nstep, last))
        action = self._rows['action'][(start + 1) % self._size]
        later = [self._stacked(np.minimum(start + steps, last)) for steps in ahead]
        return tuple(torch.from_numpy(part).to(self._device) for part in
                     (obs, action, reward[:, None], discount[:, None], next_obs, *later))

    def _sample_starts(self, batch_size: int) -> np.ndarray:
        """Times, uniformly among those that have a successor in their episode."""
        start = np.empty(0, np.int64)
        while len(start) < batch_size:
            time = self._rng.integers(self._end - len(self), self._end, batch_size - len(start))
            start = np.concatenate([start, time[self._rows['last'][time % self._size] != time]])
        return start

    def _stacked(self, time: np.ndarray) -> np.ndarray:
        """Return frames up to `time` (B, *obs), an episode's first standing in for earlier ones."""
        first = self._rows['first'][time % self._size]
        back = np.arange(-self._stack + 1, 1)
        rows = np.maximum(time[:, None] + back, first[:, None]) % self._size
        frames = self._rows['obs'][rows]  # (B, stack, *frame)
        return frames.reshape(len(time), -1, *frames.shape[3:])

    def state_dict(self) -> dict:
        """Return the ring's position and its generator's state, once the rows are on disk."""
        for rows in self._rows.values():
            rows.flush()
        return {'end': self._end, 'rng': self._rng.bit_generator.state}

    def load_state_dict(self, state: dict):
        """Go back to a state; rows written since are not seen, and written again.

        Raises: UserError where an episode that can be sampled is not as it was written.
        """
        self._end = self._cursor = state['end']
        self._rng.bit_generator.state = state['rng']
        oldest, end = self._end - len(self), self._end
        while end > oldest:
            first = int(self._rows['first'][(end - 1) % self._size])
            if not 0 <= first < end <= first + self._size or not self._is_whole(first, end):
                raise UserError(f'the replay buffer in {self._root} is damaged (the episode that '
                                f'ends in row {(end - 1) % self._size}): bring its files back, or '
                                'start a new run.')
            end = first

    def remove(self):
        """Delete the files: a finished run has no more use for them."""
        self._rows.clear()
        shutil.rmtree(self._root)
