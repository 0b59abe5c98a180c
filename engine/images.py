"""Images among the ids of a prompt: which ids stand for them in the books.

An image's soft tokens all have the same id, so what is committed could not tell two images apart. In the books (the
scheduler's ids, the prefix cache's) each of them is therefore a negative number made of the image's content and of the
token's place in it: prefixes are compared by content, and a run of these numbers says by itself which part of which
image it is. Knows requests and numbers; no torch.

Invariant: a number stands for one place in one content; the ids that the model embeds are never negative.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.interface import ImagePatches, Request

MOST_TOKENS = 4096  # of one image, in these numbers


@dataclass(frozen=True)
class ImageRun:
    """Places `begin` to `end` of some ids hold the soft tokens of one image from its token `offset` on."""

    begin: int
    end: int
    number: int  # of the image
    offset: int


def book_ids(request: Request) -> list[int]:
    """A request's prompt for the books."""
    ids = list(request.prompt_ids)
    for image in request.images:
        ids[image.at : image.at + image.tokens] = _numbers(image)
    return ids


def runs(ids: Sequence[int]) -> Iterator[ImageRun]:
    """The images, or parts of images, among ids of the books."""
    begin = 0 if min(ids, default=0) < 0 else len(ids)
    while begin < len(ids):
        if ids[begin] >= 0:
            begin += 1
            continue
        end = begin + 1
        while end < len(ids) and ids[end] == ids[end - 1] - 1:
            end += 1
        number, offset = divmod(-1 - ids[begin], MOST_TOKENS)
        yield ImageRun(begin, end, number, offset)
        begin = end


def begin_of_image(ids: Sequence[int], place: int) -> int:
    """`place`, or if an image lies across it (its tokens are on both sides), where that begins."""
    while 0 < place < len(ids) and ids[place] < 0 and ids[place] == ids[place - 1] - 1:
        place -= 1
    return place


def end_of_image(ids: Sequence[int], place: int) -> int:
    """`place`, or if an image lies across it, where that ends."""
    while 0 < place < len(ids) and ids[place] < 0 and ids[place] == ids[place - 1] - 1:
        place += 1
    return place


def _numbers(image: ImagePatches) -> range:
    first = -1 - image.number * MOST_TOKENS
    return range(first, first - image.tokens, -1)
