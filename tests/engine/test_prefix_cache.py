"""Shared pages against a plain model of them: every position of every slot holds what its ids say, and nothing is lost.

CACHE_OPERATIONS=10000 makes the long walk longer.
"""

from __future__ import annotations

import os
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.kv_cache import KVCache
from engine.pages import PAGE, PagePool, pages_of_a_slot
from engine.prefix_cache import PrefixCache

CANVAS, CHUNK, CAPACITY = 5, 90, 420


class Memory:
    """What lies in each page: for a position, the ids up to it."""

    def __init__(self) -> None:
        self.pages: dict[tuple[str, int], list[object]] = {}

    def write(self, kind: str, page: int, offset: int, value: object) -> None:
        self.pages.setdefault((kind, page), [None] * PAGE)[offset] = value

    def read(self, kind: str, page: int, offset: int) -> object:
        return self.pages[kind, page][offset]

    def copy_page(self, kind: str, source: int, target: int) -> None:
        self.pages[kind, target] = list(self.pages[kind, source])

    def wipe_page(self, kind: str, page: int) -> None:
        self.pages[kind, page] = [None] * PAGE


class World:
    """Some slots, what each is to commit, and everything that was ever committed."""

    def __init__(self, *, slots: int = 3, window: int = 100, full: int = 22, more_sliding: int = 5) -> None:
        own = pages_of_a_slot(capacity=CAPACITY, window=window, ahead=CHUNK + CANVAS)
        self.pools = {"sliding": PagePool(slots * own["sliding"] + more_sliding), "full": PagePool(full)}
        self.window = window
        self.memory = Memory()
        self.prefixes = PrefixCache(self.pools, window)
        self.slots = [KVCache(self.prefixes, self.memory, CAPACITY) for _ in range(slots)]
        self.wanted: list[list[int] | None] = [None] * slots
        self.ended: list[tuple[int, ...]] = []
        self.forgotten = False

    @property
    def untouched(self) -> bool:
        """Whether everything that was committed must still be there."""
        return not self.forgotten and not any(pool.evictions for pool in self.pools.values())

    def known(self, ids: list[int], but: KVCache) -> int:
        """The longest prefix of `ids` that was committed: by slots at work, in whole pages."""
        others = [slot.ids[: len(slot.ids) // PAGE * PAGE] for slot in self.slots if slot is not but]
        return max((shared(ids, known) for known in (*self.ended, *others)), default=0)

    def ids_like(self, past: int, cut: int, more: int, letter: int) -> list[int]:
        """A conversation: some earlier one up to a point, then something else."""
        pasts = [list(ids) for ids in (*self.ended, *(slot.ids for slot in self.slots)) if ids]
        base = pasts[past % len(pasts)] if pasts else []
        kept = base[: cut % (len(base) + 1)]
        return (kept + [letter] + [letter + n % 3 for n in range(more)])[: CAPACITY - CANVAS]

    def start(self, index: int, ids: list[int]) -> None:
        """A request takes a slot, if there are pages for it."""
        slot = self.slots[index]
        needed = -(-(len(ids) + CANVAS) // PAGE)
        if self.wanted[index] is not None or needed > self.pools["full"].available:
            return
        expected = self.known(ids, slot)
        assert slot.resume(ids) == slot.length == len(slot.ids)
        assert list(slot.ids) == ids[: slot.length]
        if self.untouched:
            assert slot.length == expected, "something that is there was not found"
        assert slot.length <= expected
        self.wanted[index] = ids

    def commit(self, index: int, count: int) -> None:
        """A pass: commit part of what is wanted and write a canvas behind it."""
        slot, ids = self.slots[index], self.wanted[index]
        if ids is None:
            return
        coming = ids[slot.length : slot.length + count]
        if slot.missing(len(coming) + CANVAS) > self.pools["full"].available:
            self.leave(index)
            return
        slot.reserve(len(coming) + CANVAS)
        begin = slot.length
        for position in range(begin, begin + len(coming) + CANVAS):
            new = position < begin + len(coming)
            value = tuple(ids[: position + 1]) if new else f"canvas of {index}"
            for kind, pages in slot.pages.items():
                page = pages.at(position // PAGE)
                assert page is not None
                assert self.pools[kind].holders(page) == 1, "somebody else's page is written"
                assert page not in self.pools[kind].kept, "a page that others may go on from is written"
                self.memory.write(kind, page, position % PAGE, value)
        if coming:
            slot.advance(len(coming))
            slot.record(coming)

    def follow(self, index: int) -> None:
        """Others may have committed meanwhile what a slot still has to."""
        ids = self.wanted[index]
        if ids is not None:
            before = self.slots[index].length
            assert self.slots[index].resume(ids) >= before

    def leave(self, index: int, *, suspect: bool = False) -> None:
        slot = self.slots[index]
        if suspect:
            self.forgotten = True
            slot.forget()
        else:
            self.ended.append(tuple(slot.ids))
            slot.reset()
        self.wanted[index] = None
        assert slot.length == 0 and not any(pages.pages for pages in slot.pages.values())

    def check(self) -> None:
        self.prefixes.check_integrity([slot.pages for slot in self.slots])
        for slot in self.slots:
            ids = tuple(slot.ids)
            for kind, pages in slot.pages.items():
                low = 0 if kind == "full" else max(0, slot.length - (self.window - 1))
                for position in range(low, slot.length):
                    page = pages.at(position // PAGE)
                    assert page is not None, f"position {position} of {slot.length} is not held"
                    assert self.memory.read(kind, page, position % PAGE) == ids[: position + 1]


def shared(one: list[int], other: object) -> int:
    assert isinstance(other, list | tuple)
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


class AnyOrder(RuleBasedStateMachine):
    """Requests that come, go on, are cancelled or fail, in any order, on pools of several sizes."""

    @initialize(
        window=st.sampled_from([2, 64, 65, 100, 200]),
        full=st.sampled_from([8, 22, 400]),
        more=st.sampled_from([0, 5, 400]),
    )
    def build(self, window: int, full: int, more: int) -> None:
        self.world = World(window=window, full=full, more_sliding=more)

    @rule(
        index=st.integers(0, 2),
        past=st.integers(0, 50),
        cut=st.integers(0, 420),
        more=st.integers(0, 200),
        letter=st.integers(0, 3),
    )
    def start(self, index: int, past: int, cut: int, more: int, letter: int) -> None:
        self.world.start(index, self.world.ids_like(past, cut, more, letter))

    @rule(index=st.integers(0, 2), count=st.integers(0, CHUNK))
    def commit(self, index: int, count: int) -> None:
        self.world.commit(index, count)

    @rule(index=st.integers(0, 2))
    def mark(self, index: int) -> None:
        self.world.slots[index].mark()

    @rule(index=st.integers(0, 2))
    def follow(self, index: int) -> None:
        self.world.follow(index)

    @rule(index=st.integers(0, 2), suspect=st.sampled_from([False, False, False, True]))
    def leave(self, index: int, suspect: bool) -> None:
        self.world.leave(index, suspect=suspect)

    @invariant()
    def nothing_is_lost_or_mixed_up(self) -> None:
        if hasattr(self, "world"):
            self.world.check()


AnyOrder.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase


@pytest.mark.parametrize(("full", "more"), [(22, 5), (30, 12)])
def test_a_long_walk(full: int, more: int) -> None:
    """Many more operations than hypothesis would do in a row: evictions of evictions."""
    random = Random(full)
    world = World(full=full, more_sliding=more)
    reused = 0
    for _ in range(int(os.environ.get("CACHE_OPERATIONS", "2000")) // 2):
        index = random.randrange(3)
        action = random.choice(("start", "commit", "commit", "commit", "commit", "mark", "follow", "leave"))
        if action == "start":
            before = world.slots[index].length
            world.start(
                index,
                world.ids_like(
                    random.randrange(1000), random.randrange(420), random.randrange(200), random.randrange(4)
                ),
            )
            reused += world.slots[index].length - before
        elif action == "commit":
            world.commit(index, random.randrange(CHUNK + 1))
        elif action == "mark":
            world.slots[index].mark()
        elif action == "follow":
            world.follow(index)
        elif random.random() < 0.5:
            world.leave(index, suspect=random.random() < 0.1)
        world.check()
    assert reused > 0
    assert world.pools["sliding"].evictions > 0
    assert world.pools["full"].evictions > 0


def turn(world: World, ids: list[int], index: int = 0) -> int:
    """One request from beginning to end; how many of its ids were there."""
    world.start(index, ids)
    slot = world.slots[index]
    found = slot.length
    while slot.length < len(ids):
        world.commit(index, CHUNK)
    slot.mark()
    world.leave(index)
    world.check()
    return found


def run_of(letter: int, count: int) -> list[int]:
    return [letter * 1000 + n for n in range(count)]


def test_a_point_whose_window_is_gone_moves_back_and_is_kept_the_next_time() -> None:
    """A system prompt of 250 ids before several questions, and long prompts of others in between."""
    world = World(slots=1, window=100, full=100, more_sliding=8)
    system = run_of(1, 250)
    assert turn(world, system + run_of(2, 160)) == 0
    turn(world, run_of(7, 415))
    turn(world, run_of(8, 415))
    back = turn(world, system + run_of(3, 160))
    assert back < 250, "the sliding pages before position 250 were given away"
    turn(world, run_of(9, 415))
    assert turn(world, system + run_of(4, 160)) == 250, "but not a second time"


def test_ends_of_turns_outlive_the_middles_of_long_prompts() -> None:
    world = World(slots=1, window=100, full=100, more_sliding=6)
    chat = run_of(1, 150)
    turn(world, chat)
    turn(world, run_of(2, 415))
    assert turn(world, chat + run_of(3, 50)) == 150


def test_an_end_that_another_page_contains_takes_no_page_of_its_own() -> None:
    world = World(slots=1, full=40, more_sliding=20)
    ids = run_of(1, 100)
    turn(world, ids[:70])
    turn(world, ids[:80])
    turn(world, ids)
    turn(world, ids[:75])
    assert world.pools["full"].idle == 2
    assert turn(world, ids[:75]) == 75


def test_following_a_slot_that_commits_the_same_prompt() -> None:
    world = World(full=60)
    ids = run_of(1, 400)
    world.start(0, ids)
    world.start(1, ids)
    world.commit(0, 64)
    world.commit(0, 64)
    world.follow(1)
    assert world.slots[1].length == 128
    world.commit(1, 30)
    world.follow(1)
    assert world.slots[1].length == 158, "within a page it goes on by itself"
    world.check()
    assert world.pools["full"].count - world.pools["full"].available == 3 + 1, "two pages are shared"


def test_the_window_is_that_of_the_model() -> None:
    prefixes = World(window=100).prefixes
    assert list(prefixes.window(0)) == []
    assert list(prefixes.window(99)) == [0, 1]
    assert list(prefixes.window(163)) == [1, 2]  # 99 positions: 64 to 162
    assert list(prefixes.window(192)) == [1, 2]
