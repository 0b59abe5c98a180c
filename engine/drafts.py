"""What a request that wants to watch is shown of its canvas after a pass.

Knows the denoiser and one request; no slots, no queue. Invariant: a request that did not ask costs nothing here.
"""

from __future__ import annotations

from engine.canvas import Canvas
from engine.denoise import Denoiser
from engine.interface import CanvasDraft, GenerationRequest, Request


def read_draft(denoiser: Denoiser, canvas: Canvas, request: Request) -> CanvasDraft | None:
    """The canvas after its last pass; None if nobody asked, or if there is nothing to see: new noise, or no number."""
    if not isinstance(request, GenerationRequest) or not request.drafts:
        return None
    if canvas.just_redrawn or canvas.state == "non-finite":
        return None
    best, entropy, accepted = denoiser.accepted(canvas)
    return CanvasDraft(
        request_id=request.id,
        index=canvas.index,
        step=canvas.steps,
        token_ids=tuple(best),
        entropy=tuple(entropy),
        accepted=tuple(accepted),
    )
