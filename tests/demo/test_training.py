"""Training: the model is the engine's, rows keep their examples apart, steps learn, checkpoints lose nothing."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.checkpoint import load_checkpoint
from engine.demo import objective, train
from engine.demo.dataset import CANVASES, EOS, Batch, Chats
from engine.demo.evaluate import HERE
from engine.demo.training_model import Shape, TrainingModel, restore
from engine.kernels.reference import REFERENCE
from engine.kv_cache import KVPool
from engine.model.gemma4 import DiffusionGemma

CPU = torch.device("cpu")
SMALL = Shape(hidden=32, layers=2, pattern=2, heads=2, head_dim=16, kv_heads=1, full_head_dim=16, mlp=32, experts=2,
              expert_width=16)  # fmt: skip


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    data = iter(Chats(HERE, 2, Shape().canvas, seed=3))
    return [Batch.over(next(data)) for _ in range(4)]


@pytest.fixture(autouse=True)
def same_noise() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def test_rows_hold_whole_examples(batches: list[Batch]) -> None:
    for batch in batches:
        for row in range(2):
            for place in range(CANVASES):
                owner, inside = int(batch.canvas_owner[row, place]), int(batch.inside[row, place])
                if owner < 0:
                    assert inside == 0
                    continue
                example = batch.clean[row][batch.owner[row] == owner]
                start = int(batch.start[row, place])
                canvas = batch.canvas[row, place]
                assert torch.equal(canvas[:inside], example[start : start + inside])
                assert (canvas[inside:] == EOS).all()
                assert inside == len(canvas) or start + inside == len(example), "only the last canvas is filled up"


def test_the_model_trained_is_the_engines(batches: list[Batch]) -> None:
    """Logits of a canvas among others in a row equal the engine's over that example alone."""
    batch = batches[0]
    model = TrainingModel(Shape())
    restore(model, HERE)
    checkpoint = load_checkpoint(HERE, CPU, torch.float32, progress=False)
    pool = KVPool(checkpoint.config, 1, 512, CPU, torch.float32)
    engine = DiffusionGemma(checkpoint.config, checkpoint.tensors, REFERENCE, pool)
    with torch.no_grad():
        noisy, _ = objective.with_noise(batch.canvas.long(), batch.inside, model.shape.vocab)
        _, hidden, _ = model(batch.clean.long(), noisy, model.geometry(batch), None)
        logits = model.logits(hidden).unflatten(1, (CANVASES, -1))
    for row in range(2):
        for place in range(CANVASES):
            if (owner := int(batch.canvas_owner[row, place])) < 0:
                continue
            example = batch.clean[row][batch.owner[row] == owner].long()
            cache = pool.slots[0]
            cache.reset()
            engine.commit(example[: int(batch.start[row, place])], cache)
            raw = engine.denoise(noisy[row, place][None], None, [cache])[0]
            assert torch.allclose(30 * (raw / 30).tanh(), logits[row, place], atol=1e-3)


def test_the_second_canvas_holds_what_the_sampler_would_accept() -> None:
    """Where the model is sure the reply stands, also at one of the unsure positions; the others are noise."""
    canvas = torch.randint(200, 2048, (8, CANVASES, 64))
    sure = torch.zeros(canvas.shape, dtype=torch.bool)
    sure[..., ::2] = True
    model = TrainingModel(SMALL)

    def logits(_: Tensor) -> Tensor:
        peaked = torch.nn.functional.one_hot(canvas, 2048) * 30.0
        return torch.where(sure[..., None], peaked, 0.0).flatten(1, 2)

    model.logits = logits  # type: ignore[method-assign]
    free = torch.zeros(canvas.shape, dtype=torch.bool)
    second, soft = objective.after_first_pass(model, torch.zeros(1), canvas, torch.zeros_like(canvas), free)
    assert soft.shape == (8, CANVASES * 64, SMALL.hidden)
    sampled = (second != 0).any(-1)
    assert 0.6 < sampled.float().mean() < 0.95
    kept = (second == canvas)[sampled]
    assert kept[:, ::2].all()
    assert 1 <= kept[:, 1::2].sum(-1).min() <= kept[:, 1::2].sum(-1).max() < 8


def test_gaps_are_noise_and_what_is_held_is_the_reply() -> None:
    canvas = torch.full((2000, CANVASES, 64), 700)
    inside = torch.randint(1, 65, (2000, CANVASES))
    canvas[torch.arange(64) >= inside[..., None]] = EOS
    noisy, held = objective.with_noise(canvas, inside, 2048)
    gap = held.any(-1)
    assert 0.1 < gap.float().mean() < 0.2
    assert torch.equal(noisy[held], canvas[held])
    assert not held[gap].all(-1).any(), "something is free"
    in_gap = (noisy != canvas)[gap].sum(-1).float() / (~held[gap]).sum(-1)
    assert 0.35 < (in_gap > 0.9).float().mean() < 0.75, "half of the gaps are noise throughout"
    at_start = ~held[gap][:, 0]
    assert 0.4 < at_start.float().mean() < 0.8
    behind = ~held[gap][:, -1] & (inside[gap] < 64)
    assert 0.08 < behind.float().mean() < 0.2, "some reach the canvas's end"
    raw = canvas.clone()
    raw.scatter_(-1, inside[..., None] - 1, EOS)
    assert 0.6 < objective.with_noise(raw, inside, 2048)[1].any(-1).float().mean() < 0.8


def test_what_is_held_stays_in_the_second_canvas_and_is_conditioned_on_itself() -> None:
    canvas = torch.randint(200, 2048, (8, CANVASES, 64))
    held = torch.rand(canvas.shape) < 0.8
    noisy = torch.where(held, canvas, 0)
    model = TrainingModel(SMALL)
    hidden = torch.zeros(8, CANVASES * 64, SMALL.hidden)  # no id is likelier than another
    with torch.no_grad():
        second, soft = objective.after_first_pass(model, hidden, canvas, noisy, held)
        own = model.embed(canvas) * SMALL.hidden**0.5
    soft = soft.view_as(own)
    assert torch.equal(second[held], canvas[held])
    assert torch.equal(soft[held], own[held])
    assert not torch.isclose(soft[~held], own[~held]).all(-1).any()
    assert (second == canvas)[~held].float().mean() < 0.15, "the surest alone is kept"


def test_steps_learn_and_the_average_follows(batches: list[Batch]) -> None:
    stepper = train.Stepper(TrainingModel(SMALL), rows=2, lr=1e-2)
    stepper.load(batches[0].flat)
    seen = []
    for number in range(24):
        stepper.run(number % 2 == 1)
        seen.append(float(stepper.facts[0]))
    assert sum(seen[-4:]) < 0.8 * sum(seen[:4])
    trained = [p.detach().clone() for p in stepper.parameters]
    with stepper.averaged():
        assert all(torch.equal(p, a) for p, a in zip(stepper.parameters, stepper.average, strict=True))
        assert not torch.equal(stepper.parameters[0], trained[0])
    assert all(torch.equal(p, t) for p, t in zip(stepper.parameters, trained, strict=True))


def test_a_run_that_resumes_and_ends_writes_the_same_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "checkpoint"
    options = argparse.Namespace(
        out=out, tokenizer=HERE, resume=[HERE], minutes=0.0, rows=1, lr=1e-3, warmup=1, decay_from=0.5, workers=0,
        write_every=1.0, evaluate=0, evaluators=1, no_compile=False, no_graphs=False, seed=0, average=0.002,
    )  # fmt: skip
    random.seed(0)
    train.Trainer(options).run()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[-1]["done"]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in HERE.iterdir())
    for shard in HERE.glob("*.safetensors"):
        before, after = load_file(shard), load_file(out / shard.name)
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(tmp_path.glob("checkpoint.*"))


def test_the_rate_set_is_the_rate_trained_with(batches: list[Batch]) -> None:
    stepper = train.Stepper(TrainingModel(SMALL), rows=2, lr=1e-2)
    stepper.load(batches[0].flat)
    before = [p.detach().clone() for p in stepper.parameters]
    stepper.set_rate(0.0)
    stepper.run(False)
    assert all(torch.equal(p, b) for p, b in zip(stepper.parameters, before, strict=True))
    stepper.set_rate(1e-3)
    stepper.run(False)
    assert not all(torch.equal(p, b) for p, b in zip(stepper.parameters, before, strict=True))


def test_several_folders_are_averaged(tmp_path: Path) -> None:
    ours = TrainingModel(Shape())
    restore(ours, HERE)
    other = TrainingModel(Shape())
    train.export(other, tmp_path)
    mean = TrainingModel(Shape())
    restore(mean, HERE, tmp_path)
    written = other.norm.weight.bfloat16().float()
    assert torch.allclose(mean.norm.weight, (ours.norm.weight + written) / 2)
