import random
import zlib

import faults
import torch

import utils


def test_damage_is_counted_by_what_came_of_it_and_mended(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(bytes(100) + zlib.crc32(bytes(100)).to_bytes(4, 'big'))

    def checked():
        content = path.read_bytes()
        if int.from_bytes(content[-4:], 'big') != zlib.crc32(content[:-4]):
            raise utils.UserError('damaged')
        return content

    def failing():
        if len(content := path.read_bytes()) < 104 or any(content[:100]):
            raise IndexError
        return content[:100]
    before = path.read_bytes()
    for read, kind in ((checked, 'refused'), (path.read_bytes, 'undetected'),
                       (lambda: 'the same', 'survived')):
        assert faults.damage(path, read, random.Random(0), 20, 4) == {kind: 24}
    counts = faults.damage(path, failing, random.Random(0), 20, 4)
    assert counts['failed'] >= 20 and counts['failed'] + counts['survived'] == 24
    assert path.read_bytes() == before


def test_equal_weights_are_equal_and_others_are_not(tmp_path):
    one = {'b': [torch.ones(3)], 'a': 1}
    assert faults.plain(one) == faults.plain({'a': 1, 'b': [torch.ones(3)]})
    assert faults.plain(one) != faults.plain({'a': 1, 'b': [torch.ones(3) + 1e-7]})
