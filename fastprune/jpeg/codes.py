"""What became of a decode, as numbers that compiled code can return."""

OK = 0
UNSUPPORTED = 1
DAMAGED = 2
TRUNCATED = 3
LACKS_ROOM = 4
BAD_BOX = 5

MEANINGS = {
    UNSUPPORTED: "the view decoder does not know its kind of JPEG",
    DAMAGED: "its entropy-coded data is damaged",
    TRUNCATED: "its entropy-coded data ends too early",
    LACKS_ROOM: "it is larger than the decoder's workspace",
    BAD_BOX: "the box does not lie inside it",
}
