"""The small betons of these tests."""

from tests.small_betons import bare_beton, beton_copy, damage_row, stock_beton  # noqa: F401
