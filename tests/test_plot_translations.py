import numpy as np
from plot_translations import picture


def test_a_picture_has_a_row_for_source_translation_and_truth_and_a_column_for_each_step():
    part = np.arange(6, dtype=np.uint8).reshape(3, 2, 1, 1, 1) * np.ones((4, 4, 3), np.uint8)
    image = picture([part, part + 100], scale=2, gap=3)
    assert image.shape == (2 * (3 * 4 + 3 + 3 * 4), 2 * 2 * 4, 3)
    assert image[::8, ::8, 0][:3].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert (image[24:30] == 255).all()
    assert (image[30:, :, 0].reshape(3, 8, 2, 8) == 100 + np.arange(6).reshape(3, 1, 2, 1)).all()
