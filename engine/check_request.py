"""What no engine could serve is refused here, before it takes a slot.

Knows requests and the size of the vocabulary; no tensors. Invariant: every EngineError names the field at fault.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from engine.config import VisionConfig
from engine.interface import (
    MAX_DENOISING_STEPS,
    MAX_LOGPROBS,
    CanvasRequest,
    EngineError,
    GenerationRequest,
    Request,
    Sampling,
    Schedule,
)


def check_request(request: Request, vocab_size: int, canvas_length: int) -> None:
    """Raise EngineError, naming the field, for a request that no engine could serve."""
    own = _canvas(request, vocab_size, canvas_length) if isinstance(request, CanvasRequest) else _reply(request)
    problems = {
        "prompt_ids is empty": not request.prompt_ids,
        f"prompt_ids has an id outside 0..{vocab_size - 1}": _outside(request.prompt_ids, vocab_size),
        **own,
        **_sampling(request.sampling, vocab_size),
        **_schedule(request.schedule),
    }
    for problem, found in problems.items():
        if found:
            raise EngineError(problem)


def check_images_of(request: Request, vision: VisionConfig | None) -> None:
    """Raise EngineError for an image that the model's vision tower could not take, or that stands elsewhere than the
    prompt says."""
    if not request.images:
        return
    if vision is None:
        raise EngineError("images has an image, but this model takes none")
    free, square, patch = 0, vision.pooling**2, 3 * vision.patch_size**2 * 4  # first position no image has; bytes
    for index, image in enumerate(request.images):
        patches, begin = image.rows * image.columns, max(0, image.at)
        held = request.prompt_ids[begin : begin + image.tokens]
        sides = (image.rows, image.columns)
        problems = {
            f"has {image.columns} x {image.rows} patches; both must be a multiple of {vision.pooling}, up to "
            f"{vision.positions}": any(side < 1 or side % vision.pooling or side > vision.positions for side in sides),
            f"has {image.tokens} tokens for {patches} patches": image.tokens * square != patches,
            f"has {image.tokens} tokens; at most {vision.most_tokens} are possible": image.tokens > vision.most_tokens,
            f"has {len(image.pixels)} bytes of pixels": len(image.pixels) != patches * patch,
            f"stands at {image.at}, where the prompt does not have its {image.tokens} tokens {vision.image_id}": held
            != (vision.image_id,) * image.tokens,
            f"stands at {image.at}, before or against the one before it": image.at < free,
        }
        for problem, found in problems.items():
            if found:
                raise EngineError(f"images[{index}] {problem}")
        free = image.at + image.tokens + 1


def _reply(request: GenerationRequest) -> dict[str, bool]:
    top = request.logprobs or 0
    return {
        f"max_tokens must be at least 1, not {request.max_tokens}": request.max_tokens < 1,
        f"logprobs must be in 0..{MAX_LOGPROBS}, not {request.logprobs}": not 0 <= top <= MAX_LOGPROBS,
    }


def _canvas(request: CanvasRequest, vocab_size: int, canvas_length: int) -> dict[str, bool]:
    allowed, held = request.allowed, [token_id for token_id in request.canvas if token_id is not None]
    return {
        f"canvas must have 1..{canvas_length} positions, not {len(request.canvas)}": not 1
        <= len(request.canvas)
        <= canvas_length,
        f"canvas has an id outside 0..{vocab_size - 1}": _outside(held, vocab_size),
        "canvas has no free position": request.free == 0,
        f"allowed must be for each of the {request.free} free positions": allowed is not None
        and len(allowed) != request.free,
        f"allowed must have ids, all in 0..{vocab_size - 1}, and not all of these": any(
            not ids or _outside(ids, vocab_size) or len(set(ids)) >= vocab_size for ids in allowed or ()
        ),
    }


def _sampling(sampling: Sampling, vocab_size: int) -> dict[str, bool]:
    penalties = sampling.presence_penalty, sampling.frequency_penalty
    biases = [value for _, value in sampling.logit_bias]
    return {
        f"seed must be in 0..2**64-1, not {sampling.seed}": not 0 <= sampling.seed < 2**64,
        f"temperature must be 0 or more and finite, not {sampling.temperature}": not (
            math.isfinite(sampling.temperature) and sampling.temperature >= 0
        ),
        f"top_k must be 0 or more, not {sampling.top_k}": sampling.top_k < 0,
        f"top_p must be in 0..1, not {sampling.top_p}": not 0 <= sampling.top_p <= 1,
        f"min_p must be in 0..1, not {sampling.min_p}": not 0 <= sampling.min_p <= 1,
        f"penalties must be finite, not {penalties}": not all(map(math.isfinite, penalties)),
        f"logit_bias has an id outside 0..{vocab_size - 1}": _outside(
            [token_id for token_id, _ in sampling.logit_bias], vocab_size
        ),
        "logit_bias must be in -100..100": not all(-100 <= value <= 100 for value in biases),
    }


def _schedule(schedule: Schedule) -> dict[str, bool]:
    steps, stability = schedule.max_denoising_steps, schedule.stability_threshold
    bounds = schedule.entropy_bound, schedule.confidence_threshold
    return {
        f"max_denoising_steps must be in 1..{MAX_DENOISING_STEPS}, not {steps}": steps is not None
        and not 1 <= steps <= MAX_DENOISING_STEPS,
        f"stability_threshold must be 0 or more, not {stability}": stability is not None and stability < 0,
        f"entropy_bound and confidence_threshold must be 0 or more and finite, not {bounds}": any(
            bound is not None and not (math.isfinite(bound) and bound >= 0) for bound in bounds
        ),
    }


def _outside(ids: Sequence[int], vocab_size: int) -> bool:
    return any(not 0 <= token_id < vocab_size for token_id in ids)
