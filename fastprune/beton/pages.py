"""Where the next image goes: aligned, in file order, never across a page boundary."""

from dataclasses import dataclass

from fastprune.beton import layout
from fastprune.errors import ConversionError


@dataclass(slots=True)
class PageCursor:
    """The end of what has been placed, and the page size so far.

    Places depend on the sizes and their order alone. When an image is larger than the page, the
    page doubles until it fits: what was placed before crosses no boundary of the larger pages
    either, because these are boundaries of the smaller ones too.
    """

    offset: int
    page_bytes: int

    def place(self, num_bytes: int) -> int:
        """Return the file offset for the next allocation and move behind it.

        Raises:
            ConversionError: no page can hold so much.
        """
        while num_bytes > self.page_bytes:
            self.page_bytes *= 2
        if self.page_bytes > layout.MAX_PAGE_BYTES:
            raise ConversionError(
                f"an image of {num_bytes:,} bytes is too large: a beton's page holds at most "
                f"{layout.MAX_PAGE_BYTES:,} bytes. Shrink it with --max-side"
            )
        start = layout.align_up(self.offset, layout.ALIGNMENT)
        if start // self.page_bytes != (start + num_bytes - 1) // self.page_bytes:
            start = layout.align_up(start, self.page_bytes)
        self.offset = start + num_bytes
        return start
