"""Columns of a view: the box in an image, then what is done with the resized box.

Views are (n, 7) int32 arrays, a line for each row: top, left, height and width of the box in the
image's pixels; how far the resized box is shifted down and right, in the output's pixels, with
black coming in; and 1 for a flip from left to right, which comes last.
"""

TOP, LEFT, HEIGHT, WIDTH, SHIFT_DOWN, SHIFT_RIGHT, FLIP = range(7)
