"""Whole generations, token for token, against transformers' own `generate()` fed with the same random numbers.

transformers draws with `torch.randint` and `torch.multinomial`; both are replaced here by the engine's counter-based
numbers, so that the two loops must agree in every acceptance, every draw, every stop and every committed canvas.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DiffusionGemmaTextConfig,
)
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

import engine
from engine import CanvasDone, EngineOptions, Finished, GenerationRequest, Sampling
from engine.engine import DiffusionEngine
from engine.kernels.reference_output import inverse_cdf
from engine.rng import CanvasNoise, canvas_noise

DEMO = Path(engine.__file__).parent / "demo" / "checkpoint"
CPU = torch.device("cpu")


def transformers_reply(
    model: Any, prompt: list[int], seed: int, max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[list[int]], list[int]]:
    """The argmax canvases of `generate()` (before any cut) and the passes each took, drawn with the engine's noise."""
    noise: list[CanvasNoise] = []
    passes: list[int] = []
    canvases: list[list[int]] = []
    length, vocab = model.config.canvas_length, model.config.text_config.vocab_size
    prepare, finalize = model._prepare_denoiser_inputs, model._finalize_canvas

    def open_canvas(**inputs: Any) -> Any:
        steps = model.generation_config.max_denoising_steps
        noise.append(
            canvas_noise(
                seed,
                canvas=len(noise),
                attempt=0,
                passes=steps,
                canvas_length=length,
                vocab_size=vocab,
                device=CPU,
            )
        )
        passes.append(0)
        return prepare(**inputs)

    def random_ids(sampler: EntropyBoundSampler, batch_size: int, device: torch.device) -> torch.Tensor:
        return noise[-1].ids[passes[-1]][None]

    def multinomial(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        assert (probabilities.shape, num_samples) == ((length, vocab), 1)
        passes[-1] += 1
        return inverse_cdf(probabilities, noise[-1].uniforms[passes[-1]])[:, None]

    def close_canvas(**inputs: Any) -> Any:
        canvases.append(inputs["input_ids"][0, -length:].tolist())
        return finalize(**inputs)

    with monkeypatch.context() as patch:
        patch.setattr(model, "_prepare_denoiser_inputs", open_canvas)
        patch.setattr(model, "_finalize_canvas", close_canvas)
        patch.setattr(EntropyBoundSampler, "initialize_canvas", random_ids)
        patch.setattr(torch, "multinomial", multinomial)
        patch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)  # would import the compiler
        model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens)
    return canvases, passes


def easel_reply(
    subject: DiffusionEngine, prompt: list[int], seed: int, max_tokens: int
) -> tuple[list[CanvasDone], Finished]:
    subject.submit(
        GenerationRequest(id="r", prompt_ids=tuple(prompt), max_tokens=max_tokens, sampling=Sampling(seed=seed))
    )
    events = []
    while subject.has_work:
        events += subject.step()
    *canvases, finished = events
    assert isinstance(finished, Finished)
    assert all(isinstance(canvas, CanvasDone) for canvas in canvases)
    return canvases, finished


def assert_same_reply(
    subject: DiffusionEngine, model: Any, prompt: list[int], seed: int, canvases: int, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Both loops, up to `canvases` canvases; returns the passes of each canvas that was compared.

    The comparison ends before a canvas that reaches the step limit: transformers goes on with it as it is, the
    engine by design draws it again or ends the reply.
    """
    max_tokens = canvases * subject.info.canvas_length
    limit = model.generation_config.max_denoising_steps
    expected, passes = transformers_reply(model, prompt, seed, max_tokens, monkeypatch)
    ours, finished = easel_reply(subject, prompt, seed, max_tokens)
    settled = next((number for number, steps in enumerate(passes) if steps == limit), len(passes))
    assert [canvas.steps for canvas in ours[:settled]] == passes[:settled]
    for canvas, ids in zip(ours, expected[:settled], strict=False):
        eos = [position for position, token_id in enumerate(ids) if token_id in subject.info.eos_ids]
        assert list(canvas.token_ids) == (ids[: eos[0]] if eos else ids)
        if eos:
            assert (finished.reason, finished.stop_id) == ("stop", ids[eos[0]])
    if settled == len(passes):
        assert len(ours) == settled
        assert finished.error is None
    else:
        assert finished.usage.denoise_steps >= sum(passes[:settled]) + limit
    return passes[:settled]


# Random small checkpoints: full and sliding layers, K=V layers, unequal layer scalars, prefixes past the window.

SHAPES: list[dict[str, Any]] = [
    {"kv": 2, "global_kv": 1, "layers": "ssf", "window": 16, "experts": (4, 2), "canvas": 8, "prompt": 5},
    {"kv": 1, "global_kv": 2, "layers": "sf", "window": 6, "experts": (6, 3), "canvas": 12, "prompt": 40},
    {"kv": 4, "global_kv": 4, "layers": "fsf", "window": 24, "experts": (3, 1), "canvas": 16, "prompt": 24},
]


def random_model(shape: dict[str, Any], seed: int) -> Any:
    """A small float32 model whose logits are sharp enough for canvases to settle at different passes."""
    torch.manual_seed(seed)
    experts, active = shape["experts"]
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    text = DiffusionGemmaTextConfig(
        vocab_size=301,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=len(shape["layers"]),
        num_attention_heads=4,
        num_key_value_heads=shape["kv"],
        head_dim=8,
        global_head_dim=16,
        num_global_key_value_heads=shape["global_kv"],
        num_experts=experts,
        top_k_experts=active,
        sliding_window=shape["window"],
        max_position_embeddings=256,
        use_bidirectional_attention="vision",
        layer_types=[kinds[letter] for letter in shape["layers"]],
    )
    vision = Gemma4VisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        global_head_dim=16,
        patch_size=4,
        position_embedding_size=8,
        pooling_kernel_size=1,
        default_output_length=4,
        standardize=True,
    )
    config = DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        boi_token_id=90,
        eoi_token_id=91,
        image_token_id=92,
        canvas_length=shape["canvas"],
    )
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("layer_scalar"):
                tensor.uniform_(0.7, 1.3)
            elif "vision" in name:
                continue
            elif name.endswith(".norm.weight"):
                tensor.fill_(6.0)
            elif tensor.ndim == 1 and name.endswith("weight"):
                tensor.uniform_(0.2, 0.5) if "post_" in name else tensor.uniform_(0.5, 0.9)
            elif tensor.ndim >= 2:
                # Weak self-conditioning: with random weights it is a feedback that blows rounding errors up.
                tensor.normal_(0, tensor.shape[-1] ** -0.5 * (0.2 if "self_conditioning" in name else 1))
    model.generation_config = DiffusionGemmaGenerationConfig(
        max_new_tokens=256,
        max_denoising_steps=16,
        t_min=0.05,
        t_max=2.0,
        stability_threshold=1,
        confidence_threshold=0.2,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=2.0),
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=[1],
    )
    return model


def random_prompt(shape: dict[str, Any], seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(2, 90, (shape["prompt"] + seed,), generator=generator).tolist()
    return ids


def load(folder: Path, **options: Any) -> DiffusionEngine:
    return DiffusionEngine.from_options(
        EngineOptions(model=str(folder), device="cpu", dtype="float32", progress=False, **options)
    )


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_random_checkpoints(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[number]
    # with these weights a relative change of 3e-6 changes no reply, so no other order of summation does
    model = random_model(shape, seed=20)
    model.save_pretrained(tmp_path)
    subject = load(tmp_path, commit_chunk=7)
    passes = []
    for seed in range(6):
        passes.append(assert_same_reply(subject, model, random_prompt(shape, seed), seed, 4, monkeypatch))
    subject.close()
    assert sum(len(reply) >= 3 for reply in passes) >= 3, "most replies must run over several canvases"
    assert len({steps for reply in passes for steps in reply}) >= 3, "canvases must stop at different passes"


def test_a_reply_is_the_same_alone_and_behind_others(tmp_path: Path) -> None:
    random_model(SHAPES[0], seed=0).save_pretrained(tmp_path)
    subject = load(tmp_path)
    requests = [
        GenerationRequest(
            id=str(seed),
            prompt_ids=tuple(random_prompt(SHAPES[0], seed)),
            max_tokens=20,
            sampling=Sampling(seed=seed, temperature=0.9, top_k=50, top_p=0.95),
        )
        for seed in range(4)
    ]

    def run(batch: list[GenerationRequest]) -> dict[str, list[CanvasDone | Finished]]:
        replies: dict[str, list[CanvasDone | Finished]] = {request.id: [] for request in batch}
        for request in batch:
            subject.submit(request)
        while subject.has_work:
            for event in subject.step():
                replies[event.request_id].append(event)
        return replies

    def bare(reply: list[CanvasDone | Finished]) -> list[CanvasDone | Finished]:
        """Without what later runs find cached."""
        *canvases, last = reply
        assert isinstance(last, Finished)
        return [*canvases, replace(last, usage=replace(last.usage, cached_tokens=0))]

    together = run(requests)
    for request in reversed(requests):
        assert bare(run([request])[request.id]) == bare(together[request.id])
    assert len({str(reply[0]) for reply in together.values()}) == len(requests)


def test_the_last_canvas_may_reach_beyond_the_context(tmp_path: Path) -> None:
    """Context 20, prompt 10, canvas 8: two ids of the second canvas fit, and nothing beyond is stored."""
    random_model(SHAPES[0], seed=0).save_pretrained(tmp_path)
    prompt = random_prompt(SHAPES[0], 5)
    roomy, _ = easel_reply(load(tmp_path), prompt, seed=1, max_tokens=16)
    tight, finished = easel_reply(load(tmp_path, context_length=20), prompt, seed=1, max_tokens=100)
    assert [canvas.token_ids for canvas in tight] == [roomy[0].token_ids, roomy[1].token_ids[:2]]
    assert (finished.reason, finished.usage.completion_tokens, finished.error) == ("length", 10, None)


def test_what_from_options_reports(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(SHAPES[0], seed=0)
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="engine"):
        info = DiffusionEngine.from_options(
            EngineOptions(model=str(tmp_path), device="cpu", dtype="bfloat16", context_length=100, progress=False)
        ).info
    assert (info.canvas_length, info.context_length, info.vocab_size) == (8, 100, 301)
    assert (info.device, info.dtype, info.format, info.kernels) == ("cpu", "bfloat16", "fp32", "reference")
    assert info.eos_ids == {1}
    assert info.weight_bytes == 2 * info.parameters
    assert info.kv_bytes > 100 * 2 * 16 * 2
    assert info.load_seconds > 0
    assert len(caplog.messages) == 1, "one line says what was chosen"
    assert all(word in caplog.messages[0] for word in (str(tmp_path), "bfloat16", "cpu", "reference", "100"))


# The bundled demo checkpoint: prompts of every kind it knows, and some it does not.

HEROES = ["Mia and a fox", "Ben and an owl", "Ida and a horse", "Tom and a cat", "Zoe and a bear", "Leo and a wolf"]
HEROES += ["Nina and a rabbit", "Oscar and a dog", "Anna and a duck", "Paul and a mouse", "Eva and a goat"]
STORIES = [f"Write a story about {heroes}." for heroes in HEROES]
OTHERS = [
    "What is 17 + 25?",
    "What is 51 - 8?",
    "What is the capital of France?",
    "What is the capital of Japan?",
    "Sort these words alphabetically: pear, apple, fig.",
    "Sort these words alphabetically: stone, river, cloud, tree.",
    "Reverse the order of these words: red, green, blue.",
    "Extract the name and age as JSON: Ana is 31 years old.",
    "Who are you?",
    "What can you do?",
    "How do I bake bread?",
    "Thank you",
]
CANVASES = 3
REPLIES_OF_ALL_CANVASES = 20


@pytest.mark.timeout(900)  # 60 canvases through both, of 24 passes each
def test_demo_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(DEMO, dtype=torch.float32).eval()
    subject = load(DEMO, commit_chunk=48)
    stories = [(text, seed) for seed in range(1, 5) for text in STORIES]
    passes: list[list[int]] = []
    for text, seed in [(text, 100) for text in OTHERS] + stories:
        if sum(len(reply) == CANVASES for reply in passes) == REPLIES_OF_ALL_CANVASES:
            break
        message = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        passes.append(assert_same_reply(subject, model, prompt, seed, CANVASES, monkeypatch))
    subject.close()
    assert sum(len(reply) == CANVASES for reply in passes) == REPLIES_OF_ALL_CANVASES
