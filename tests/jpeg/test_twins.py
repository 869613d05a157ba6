"""Every piece of vector code does what its twin of plain loops does."""

import numpy as np
import pytest

from fastprune.jpeg import color, idct, native, resize, stream

kernel = native.kernel
pytestmark = pytest.mark.skipif(not native.VECTORS, reason="this CPU has no AVX2")


@kernel
def _idct(blocks, block, quantizers, plane, first, second):
    idct.inverse_dct_pair_vector(blocks, block, quantizers, plane, first, second)


@kernel
def _load_word(array, offset):
    return stream.load_word_vector(array, np.uint64(offset))


@kernel
def _load_word_twin(array, offset):
    return stream.load_word_plain(array, np.uint64(offset))


@kernel
def _store_word(array, offset, word):
    stream.store_word_vector(array, np.uint64(offset), word)


@kernel
def _copy_chunk(source, start, target, target_start):
    return stream.copy_chunk_vector(source, start, target, target_start)


@kernel
def _blend(planes, start, stride, weights, first_weight, count, target):
    resize.blend_vector(planes, start, stride, weights, first_weight, count, target)


@kernel
def _transpose(planes, start, stride, target, target_stride):
    resize.transpose_vector(planes, start, stride, target, target_stride)


@kernel
def _color(planes, y, cb, cr, pixels, target):
    color.convert_vector(planes, y, cb, cr, pixels, target)


def test_inverse_dct():
    generator = np.random.default_rng(0)
    quantizers = generator.integers(1, 9, 128).astype(np.int16)
    for first_start in (7, 507):  # apart, and both at the same place
        for _ in range(100):
            blocks = generator.normal(0, 30, 300) * (generator.random(300) < 0.4)
            blocks = blocks.astype(np.int16)
            blocks[[5, 133]] = generator.integers(-200, 200, 2)
            planes = np.zeros((2, 800), np.uint8)
            first, second = (64, first_start, 20), (3, 507, 33)
            _idct(blocks.copy(), 5, quantizers, planes[0], first, second)
            idct.inverse_dct_pair_plain(blocks.copy(), 5, quantizers, planes[1], first, second)
            np.testing.assert_array_equal(*planes)


def test_inverse_dct_of_coefficients_that_only_damaged_data_has():
    generator = np.random.default_rng(2)
    for largest in (2_000, 32_767):
        for _ in range(200):
            blocks = generator.integers(-largest, largest + 1, 300).astype(np.int16)
            quantizers = generator.integers(1, 256, 128).astype(np.int16)
            planes = np.zeros((2, 800), np.uint8)
            first, second = (64, 7, 20), (3, 307, 33)
            _idct(blocks.copy(), 5, quantizers, planes[0], first, second)
            idct.inverse_dct_pair_plain(blocks.copy(), 5, quantizers, planes[1], first, second)
            np.testing.assert_array_equal(*planes)


def test_inverse_dct_is_the_transform_of_the_standard():
    generator = np.random.default_rng(1)
    block = generator.normal(0, 15, 64).astype(np.int16)
    quantizer = generator.integers(1, 9, 64).astype(np.int16)
    n, k = np.arange(8)[:, None], np.arange(8)
    basis = np.cos((2 * n + 1) * k * np.pi / 16) * np.where(k == 0, np.sqrt(1 / 8), 0.5)
    exact = np.clip(basis @ (block * quantizer).reshape(8, 8) @ basis.T + 128, 0, 255)
    plane = np.zeros(64, np.uint8)
    idct.inverse_dct_plain(block, 0, quantizer, 0, plane, 0, 8)
    assert np.abs(plane.reshape(8, 8).T - exact).max() < 1


@pytest.mark.parametrize("offset", range(9))
def test_load_word(offset):
    array = np.random.default_rng(offset).integers(0, 256, 17).astype(np.uint8)
    assert _load_word(array, offset) == _load_word_twin(array, offset)
    assert _load_word(array, offset) == int.from_bytes(array[offset : offset + 8].tobytes())


@pytest.mark.parametrize("markers", [(), (0,), (63,), (5, 40)])
def test_copy_chunk(markers):
    source = np.random.default_rng(3).integers(0, 255, 80).astype(np.uint8)
    source[[9 + place for place in markers]] = 0xFF
    first, second = np.zeros(100, np.uint8), np.zeros(100, np.uint8)
    found = _copy_chunk(source, 9, first, 11), stream.copy_chunk_plain(source, 9, second, 11)
    assert found == ((*markers, 64)[0],) * 2
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 64])
def test_blend(count):
    generator = np.random.default_rng(count)
    planes = generator.integers(0, 256, 64 * 50 + 50).astype(np.uint8)
    weights = generator.dirichlet(np.ones(count)) * 65_535
    weights = np.concatenate([[7], weights]).astype(np.uint16)
    first, second = planes.copy(), planes.copy()
    _blend(first, 5, 50, weights, 1, count, 3_205)
    resize.blend_plain(second, 5, 50, weights, 1, count, 3_205)
    np.testing.assert_array_equal(first, second)
    many = planes.copy()
    resize.blend_many(many, 5, 50, weights, 1, count, 3_205)
    assert np.abs(many.astype(int) - first).max() <= 1


def test_transpose():
    planes = np.random.default_rng(4).integers(0, 256, 2_000).astype(np.uint8)
    first, second = planes.copy(), planes.copy()
    _transpose(first, 3, 33, 1_000, 47)
    resize.transpose_plain(second, 3, 33, 1_000, 47)
    np.testing.assert_array_equal(first, second)
    assert first[1_000 + 5 * 47 + 2] == planes[3 + 2 * 33 + 5]


def test_color():
    planes = np.random.default_rng(5).integers(0, 256, 3 * 32 + 9).astype(np.uint8)
    planes[:3], planes[40:43] = (0, 255, 255), (255, 0, 255)
    first, second = np.zeros(100, np.uint8), np.zeros(100, np.uint8)
    _color(planes, 0, 40, 70, first, 2)
    for i in range(32):
        color.convert_pixel(planes, i, 40 + i, 70 + i, second, 2 + 3 * i)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("offset", range(9))
def test_store_word(offset):
    word = np.uint64(0x0123456789ABCDEF)
    first, second = np.zeros(17, np.uint8), np.zeros(17, np.uint8)
    _store_word(first, offset, word)
    stream.store_word_plain(second, np.uint64(offset), word)
    np.testing.assert_array_equal(first, second)
    assert first[offset : offset + 8].tobytes() == int(word).to_bytes(8)
