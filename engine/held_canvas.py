"""Canvases that a caller has filled in but for some positions: opened, and read when they are done.

Knows the denoiser and one request; no slots, no other canvases. Invariant: where a canvas is read after one pass, its
noise at a free position is none of the ids allowed there. What the model finds is then what it thinks of them; an
allowed id on the canvas would be evidence for itself.
"""

from __future__ import annotations

from itertools import groupby

from engine.canvas import Canvas
from engine.denoise import Denoiser
from engine.interface import CanvasRead, CanvasRequest, Request


def open_held(denoiser: Denoiser, slot: int, request: CanvasRequest) -> Canvas:
    """The request's canvas, its positions held and the others noise."""
    single = request.allowed is not None
    canvas = denoiser.open(slot, request.sampling, 0, schedule=request.schedule, logprobs=0, guided=single)
    ids = [*request.canvas, *[denoiser.pad_id] * (denoiser.canvas_length - len(request.canvas))]
    for held, run in groupby(enumerate(ids), key=lambda place: place[1] is not None):
        places = list(run)
        if held:
            denoiser.pin(canvas, places[0][0], [token_id for _, token_id in places if token_id is not None])
    for position, allowed in zip(_free(request), request.allowed or (), strict=False):
        denoiser.renoise(canvas, position, allowed)
    return canvas


def ends(request: Request, canvas: Canvas) -> bool:
    """Whether an open canvas is read now: after its one pass, if that is all that was asked for."""
    return isinstance(request, CanvasRequest) and request.allowed is not None and canvas.passes > 0


def read_held(denoiser: Denoiser, canvas: Canvas, request: CanvasRequest) -> CanvasRead:
    """What the last pass found."""
    if canvas.state == "open":
        denoiser.finish(canvas)
    found = denoiser.logprobs(canvas)
    positions = _free(request)
    length = len(request.canvas)
    return CanvasRead(
        request_id=request.id,
        token_ids=canvas.result[:length],
        logprobs=tuple(each.logprob for each in found[:length]),
        allowed=denoiser.logprobs_of(canvas, list(zip(positions, request.allowed or (), strict=False))),
        steps=canvas.steps,
    )


def _free(request: CanvasRequest) -> list[int]:
    return [position for position, token_id in enumerate(request.canvas) if token_id is None]
