"""Times attention by two warp groups that take turns, `seesaw_kernel`: `python -m tests.bench.attention_seesaw`.

Needs an H100 or H200; `--compile` needs none, and says what the kernel needs. Everything runs in a process of its own,
which is killed when it has been silent for --patience seconds: a kernel that waits for what never comes would hold the
GPU for good. Small cases first, against float32: splits of none to six tiles, filled up rows, windows, steep scores. If
one is wrong nothing is timed. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from engine.kernels import attention_hopper
from engine.kernels.ahead_of_time import compile_case
from engine.kernels.attention import join, parts_of
from engine.kernels.attention_hopper import BM, COLUMNS, TURNED, WIDE, splits_of
from engine.kernels.catalog import KernelCase
from engine.kernels.chips import HOPPER, chip_of
from engine.kernels.choosing import GraphTimer
from engine.kernels.launching import launch
from engine.kernels.views import AttentionView
from engine.pages import PAGE
from tests.bench.kernels import behind
from tests.bench.seesaw_kernel import QUARTER, attention_seesaw_kernel

HEADS, KV, WINDOW = 16, 2, 1024
RUNS = 8  # of a lap
STARTING = 120.0  # seconds: imports, and the driver
WRONG = 0.02  # of the largest number expected: a result's rounding is a fifth of it


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    rows: int
    prefix: int
    canvas: bool = False
    window: bool = False
    steep: float = 1.0  # scores are so many times as far apart


CHECKS = (
    *(Case(name=f"{rows} rows behind {prefix}", rows=rows, prefix=prefix, canvas=True)
      for rows, prefix in ((1, 0), (64, 0), (256, 0), (64, 64), (70, 60), (256, 64), (256, 257), (256, 512))),
    *(Case(name=f"{rows} of a prompt behind {prefix}", rows=rows, prefix=prefix)
      for rows, prefix in ((1, 0), (65, 0), (129, 300), (600, 100))),
    Case(name="100 of a prompt behind 1023, window", rows=100, prefix=1023, window=True),
    Case(name="steep, canvas behind 1500", rows=256, prefix=1500, canvas=True, steep=30.0),
    Case(name="steep, 300 of a prompt behind 700", rows=300, prefix=700, steep=30.0),
)  # fmt: skip
TIMED = (
    *(Case(name=f"canvas behind {prefix}", rows=256, prefix=prefix, canvas=True) for prefix in (0, 512, 8192, 32768)),
    Case(name="prompt of 2048 behind 4096", rows=2048, prefix=4096),
    Case(name="prompt of 100 behind 1023, window", rows=100, prefix=1023, window=True),
)


def attention_seesaw(queries: Tensor, keys: Tensor, values: Tensor, view: AttentionView, *, held: bool) -> Tensor:
    """As `attention_hopper.attention`."""
    rows, heads, columns = queries.shape
    group, splits = heads // keys.shape[2], splits_of(rows)
    out = torch.empty_like(queries)
    parts, sums = parts_of(out, splits)
    launch(attention_seesaw_kernel, (triton.cdiv(rows, BM // group), keys.shape[2], splits))(
        queries,
        attention_hopper._described(keys, TURNED.value),
        attention_hopper._described(values, QUARTER.value),
        view.low, view.high, view.segment, view.table, out, parts, sums,
        rows, view.table.shape[1], heads,
        GROUP=group, D=columns, BM=BM, SPLITS=splits, WIDE=WIDE, HELD=held, num_warps=4,
    )  # fmt: skip
    join(parts, sums, out, splits)
    return out.flatten(1)


WAYS: dict[str, Callable[..., Tensor]] = {
    "engine": attention_hopper.attention,
    "seesaw": partial(attention_seesaw, held=False),
    "seesaw, held": partial(attention_seesaw, held=True),
}


def given(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, AttentionView]:
    """Queries, keys, values in pages that lie anywhere, and the view of one slot."""
    torch.manual_seed(1)
    view = behind(case.prefix, case.rows, case.canvas, device)
    if case.window:
        view = replace(view, low=(view.high - WINDOW).clamp(min=0))
    queries = torch.randn(len(view.low), HEADS, COLUMNS, device=device) * (case.steep * COLUMNS**-0.5)
    stored = (view.table.numel(), PAGE, KV, COLUMNS)
    keys, values = (torch.randn(stored, device=device, dtype=torch.bfloat16) for _ in range(2))
    return queries.bfloat16(), keys, values, view


def expected(queries: Tensor, keys: Tensor, values: Tensor, view: AttentionView) -> Tensor:
    """In float32, of one slot."""
    turned = keys.shape[-1] // 2
    scored = values.clone()
    for at in (0, turned):
        scored[..., at : at + TURNED.value] = keys[..., at : at + TURNED.value]
    pages = view.table[0].long()
    scored, values = (
        stored[pages].flatten(0, 1).float().repeat_interleave(HEADS // KV, 1) for stored in (scored, values)
    )
    scores = torch.einsum("rhd,phd->hrp", queries.float(), scored)
    position = torch.arange(len(scored), device=queries.device)
    seen = (position >= view.low[:, None]) & (position < view.high[:, None])
    odds = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num()
    return torch.einsum("hrp,phd->rhd", odds, values).flatten(1)


def off(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, of the largest number wanted; inf where anything is not a number."""
    share = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-9)
    return float(share.nan_to_num(nan=float("inf")))


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def check(device: torch.device) -> bool:
    """Whether all small cases are right; tells each."""
    right = True
    for case in CHECKS:
        inputs = given(case, device)
        wanted = expected(*inputs)
        for name, way in WAYS.items():
            tell(begins=f"{name}: {case.name}")
            error = max(off(way(*inputs), wanted) for _ in range(3))  # a race need not show at once
            right &= error < WRONG or name == "engine"
            tell(case=case.name, way=name, off=error)
    return right


def time(device: torch.device) -> None:
    for case in TIMED:
        inputs = given(case, device)
        wanted = WAYS["engine"](*inputs)
        for name, way in WAYS.items():
            tell(begins=f"{name}: {case.name}")
            us, found = GraphTimer()([partial(way, *inputs)] * RUNS)
            tell(case=case.name, way=name, us=round(us, 2), off=off(found, wanted))


def work() -> int:
    """What the process with the GPU does. 1 if a small case is wrong."""
    device = torch.device("cuda", torch.cuda.current_device())
    tell(begins=torch.cuda.get_device_name(device))
    with torch.inference_mode():
        right = check(device)
        if right:
            time(device)
    torch.cuda.synchronize()
    return 0 if right else 1


def lines(process: subprocess.Popen[str], patience: float) -> Iterator[str | None]:
    """What a process prints, and None, once, when it has been silent for too long; before its first line STARTING."""
    told: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            told.put(line)
        told.put("")

    threading.Thread(target=listen, daemon=True).start()
    bound = STARTING
    while True:
        try:
            line = told.get(timeout=bound)
        except queue.Empty:
            yield None
            return
        if not line:
            return
        yield line
        bound = patience


def watch(patience: float) -> int:
    """Run `work` in a process of its own. 0 if all is right and timed, 1 if something is wrong or hangs."""
    command = [sys.executable, "-m", "tests.bench.attention_seesaw", "--work"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    found: list[dict[str, Any]] = []
    begun, hung = "nothing", False
    for line in lines(process, patience):
        if line is None:
            hung = True
            process.kill()
            print(f"silent for {patience:.0f} s, killed: {begun}", file=sys.stderr)
        elif line.startswith("{"):
            what = json.loads(line)
            begun = what.get("begins", begun)
            if "case" in what:
                found.append(what)
                took = f"{what['us']:>9.2f} us" if "us" in what else " " * 12
                print(f"{what['case']:<40} {what['way']:<14} {took}  off by {what['off']:.5f}", flush=True)
        else:
            print(line, end="", flush=True)
    try:
        code = process.wait(timeout=30)
    except subprocess.TimeoutExpired:  # the driver does not let it go
        code = -1
    print(json.dumps({"hung": begun if hung else None, "exit": code, "results": found}))
    return 1 if hung or code else 0


def cases() -> list[KernelCase]:
    """The kernel in all its configurations."""
    boxes = {"keys": TURNED.value, "values": QUARTER.value}
    return [
        KernelCase(
            name=f"attention_seesaw[{splits}{',held' if held else ''}]",
            kernel=attention_seesaw_kernel,
            signature=dict.fromkeys(("low", "high", "segment", "table"), "*i32:16")
            | {"queries": "*bf16:16", "out": "*bf16:16", "parts": "*fp32:16", "sums": "*fp32:16"}
            | {name: f"tensordesc<bf16[{PAGE}, {columns}],{WIDE}>" for name, columns in boxes.items()}
            | {"rows": "i32:16", "width": "i32", "heads": "i32:16"},
            constants={"GROUP": HEADS // KV, "D": COLUMNS, "BM": BM, "SPLITS": splits, "WIDE": WIDE, "HELD": held},
            num_warps=4,
            chips=(HOPPER,),
        )
        for splits in (1, 2)
        for held in (False, True)
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--compile", action="store_true", help="only say what the kernel needs; needs no GPU")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds of silence after which it is killed")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.compile:
        for case in cases():
            needs = compile_case(case, HOPPER)
            # registers: at the launch, of each of 384 threads; then a warp group has 240, the loader 24
            print(f"{case.name:<28} {needs.registers} registers, {needs.spilled} spilled, {needs.shared} bytes shared")
        return 0
    if not torch.cuda.is_available() or chip_of(torch.device("cuda")) != HOPPER:
        print("tests.bench.attention_seesaw: needs an H100 or H200, and torch sees none", file=sys.stderr)
        return 2
    return work() if chosen.work else watch(chosen.patience)


if __name__ == "__main__":
    sys.exit(main())
