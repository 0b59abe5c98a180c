"""Images in messages: from what a client sent to the patches that the engine takes.

In the messages an image is a part of type "image" with its file in base64 (as it is or in a data: URL) and the place in
the request it came from; templates see no more of it than its type. Files are untrusted: only common formats are
opened, and decoded only once their size is known. How they are cut up is the checkpoint's own image processor's to say.
Knows no wire format, no ids and no template.

Invariant: nothing is fetched, and what cannot be read is a 400 that names the part at fault.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image, ImageOps, UnidentifiedImageError

from engine import CheckpointError, EngineInfo
from server.errors import ApiError, invalid

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_IMAGES = 64
MAX_PIXELS = 50_000_000  # of one image
MAX_PIXELS_TOGETHER = 200_000_000  # of a request's images
MAX_ASPECT = 200  # the longer side over the shorter
_DATA_URL = re.compile(
    r"data:(?:[\w.+-]{1,40}/[\w.+-]{1,40})?(?:;[\w.+-]{1,40}=[\w.+-]{0,40})*;base64,", re.ASCII | re.I
)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,20}:", re.I)
_EXAMPLE = "data:image/png;base64,..."
# What Pillow raises for files that are damaged or not what they seem.
_FAULTS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where warnings are made errors
)


class Processor(Protocol):
    """What is needed of transformers' image processor."""

    def __call__(self, images: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Patches:
    """One image cut up; as `engine.ImagePatches`, but for where it stands."""

    tokens: int
    columns: int
    rows: int
    pixels: bytes


def image_part(data: str, param: str) -> dict[str, Any]:
    """An image as a part of a message; `data`: its file in base64, or an address; `param`: where it stands."""
    return {"type": "image", "data": data, "param": param}


def image_parts(messages: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The images of messages, in their order."""
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str):
            yield from (part for part in content or () if part["type"] == "image")


def without_data(messages: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages as templates see them: of an image no more than that it is there."""

    def bare(message: Mapping[str, Any]) -> Mapping[str, Any]:
        if isinstance(message.get("content"), str):
            return message
        parts = [{"type": "image"} if part["type"] == "image" else part for part in message.get("content") or ()]
        return {**message, "content": parts}

    return [bare(message) for message in messages]


def misplaced(parts: Sequence[Mapping[str, Any]]) -> ApiError:
    """400: an image among `parts` stands in a message whose author has none to show."""
    first = next(part for part in parts if part["type"] == "image")
    return invalid(
        "Images are read in messages of the user and in results of tools only",
        param=first["param"],
        code="unsupported_value",
    )


class ImageReader:
    """Cuts images up as one checkpoint wants them. Safe to use from several threads."""

    def __init__(self, processor: Processor) -> None:
        self._processor = processor

    @classmethod
    def for_engine(cls, info: EngineInfo) -> ImageReader | None:
        """That of the engine's checkpoint; None if it takes no images. Raises CheckpointError."""
        if not info.image_tokens:
            return None
        from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil  # deferred: slow

        try:
            return cls(Gemma4ImageProcessorPil.from_pretrained(info.model_path))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"the image processor of {info.model_path} cannot be loaded: {error}") from error

    def read(self, messages: Iterable[Mapping[str, Any]], most: int) -> list[Patches]:
        """The images of messages, until they take more than `most` tokens. Raises ApiError (400) for one that cannot be
        read, or too many."""
        parts = list(image_parts(messages))
        if len(parts) > MAX_IMAGES:
            raise invalid(f"At most {MAX_IMAGES} images are read in a request", param=parts[MAX_IMAGES]["param"])
        found, pixels = list[Patches](), 0
        for part in parts:
            if sum(each.tokens for each in found) > most:
                break
            try:
                with _opened(part["data"]) as image:
                    pixels += image.width * image.height
                    _bound(image.width, image.height, pixels)
                    found.append(self._cut(ImageOps.exif_transpose(image).convert("RGB")))
            except ApiError as error:
                raise invalid(error.message, param=part["param"]) from error
            except _FAULTS as error:
                raise invalid(f"The image cannot be read: {error}"[:300], param=part["param"]) from error
        return found

    def _cut(self, image: Image.Image) -> Patches:
        made = self._processor(images=[image], return_tensors=None)
        places = made["image_position_ids"][0]
        real = int((places[:, 0] >= 0).sum())  # the rest fills up
        pixels = made["pixel_values"][0][:real].astype("float32")
        columns, rows = int(places[:, 0].max()) + 1, int(places[:, 1].max()) + 1
        tokens = int(made["num_soft_tokens_per_image"][0])
        return Patches(tokens=tokens, columns=columns, rows=rows, pixels=pixels.tobytes())


def _opened(data: str) -> Image.Image:
    begin = _DATA_URL.match(data)
    if begin is None and (scheme := _SCHEME.match(data)):
        raise invalid(f"Images are not fetched from {scheme[0]} addresses here: send a data: URL ({_EXAMPLE})")
    try:
        file = base64.b64decode(data[begin.end() if begin else 0 :], validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"The image's data is not base64: send a data: URL ({_EXAMPLE})") from None
    try:
        return Image.open(io.BytesIO(file), formats=FORMATS)
    except UnidentifiedImageError:
        raise invalid(f"The image is none of {', '.join(FORMATS)}") from None


def _bound(width: int, height: int, together: int) -> None:
    if width * height > MAX_PIXELS:
        raise invalid(f"The image has {width} x {height} pixels; at most {MAX_PIXELS // 10**6} million are read")
    if together > MAX_PIXELS_TOGETHER:
        raise invalid(f"The images have more than {MAX_PIXELS_TOGETHER // 10**6} million pixels together")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise invalid(f"The image is {width} x {height}; one side may be at most {MAX_ASPECT} times the other")


def shown(parts: Sequence[Mapping[str, Any]]) -> str | list[Mapping[str, Any]]:
    """The content of a message from text and images in their order; a string where there is no image. Parts of text
    next to each other are paragraphs of one."""
    joined: list[Mapping[str, Any]] = []
    for part in parts:
        if part["type"] == "text" and joined and joined[-1]["type"] == "text":
            joined[-1] = {"type": "text", "text": f"{joined[-1]['text']}\n{part['text']}"}
        else:
            joined.append(part)
    if any(part["type"] == "image" for part in joined):
        return joined
    return str(joined[0]["text"]) if joined else ""


def read_images(reader: ImageReader | None, messages: Sequence[Mapping[str, Any]], most: int) -> list[Patches]:
    """What `reader` makes of the images of messages; None for a model that takes none. Raises ApiError (400)."""
    if reader is not None:
        return reader.read(messages, most)
    for part in image_parts(messages):
        message = "This model reads text only: it takes no images"
        raise invalid(message, param=part["param"], code="unsupported_value")
    return []
