"""Which committed ids lie in which pages, so that a new prompt finds the longest prefix anybody has committed.

A tree: each node is one page of ids behind its parent's, so a path from the root is a prefix, compared id by id and
never by a hash alone. A node's page of the full layers lives as long as the node; its page of the sliding layers may go
earlier. Nodes of fewer than PAGE ids are leaves: ends of a turn, to be copied and not shared. Knows ids, page numbers
and the window, no tensors and no requests.

Invariant: whoever holds a node's full page holds those of all nodes above it, and drops them from below; so a page that
has been idle for longest is never above another, and giving it away cuts nothing off.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from engine.pages import PAGE, PagePool, SlotPages


@dataclass(eq=False)
class Node:
    """A page of ids behind its parent's, and where their keys and values lie."""

    parent: Node | None
    ids: tuple[int, ...]
    full: int = -1  # page of the full layers; the root has none
    sliding: int | None = None  # page of the sliding layers, while it is there
    wanted: bool = False  # it lies in the window of a point where others will go on
    children: list[Node] = field(default_factory=list)  # in the order of their ids


@dataclass(frozen=True)
class Found:
    """What of some ids is there: `length` of them, in whole pages `nodes` and in the first ids of `tail`."""

    nodes: tuple[Node, ...]
    tail: Node | None
    length: int
    wished: int  # what would be there if no sliding page had been given away


class PrefixCache:
    """The index over the pages of two pools. `window`: of the sliding layers, as in ModelConfig."""

    def __init__(self, pools: dict[str, PagePool], window: int) -> None:
        self.pools = pools
        self._kept = window - 1
        self._root = Node(None, ())
        self._by_page: dict[str, dict[int, Node]] = {kind: {} for kind in pools}
        pools["full"].on_evict = self._lose
        pools["sliding"].on_evict = self._lose_sliding

    def window(self, length: int) -> range:
        """Page numbers that sliding layers need to go on from a point."""
        return range(max(0, length - self._kept) // PAGE, -(-length // PAGE))

    def find(self, ids: Sequence[int], path: Sequence[Node] = (), *, whole: bool = False) -> Found:
        """The longest prefix of `ids` from which a slot can go on; `path`: the nodes of its beginning, if known;
        `whole`: in whole pages only.

        A point whose window has lost a sliding page is passed over for the next before it, and its window is wanted
        from now on.
        """
        nodes, here = list(path), path[-1] if path else self._root
        while True:
            begin = len(nodes) * PAGE
            key = tuple(ids[begin : begin + PAGE])
            child = _child(here, key)
            if child is None or len(child.ids) < PAGE:
                break
            nodes.append(child)
            here = child
        tail, shared = (None, 0) if whole else _closest(here, key)
        longest = begin + shared
        chain = nodes if tail is None else [*nodes, tail]
        length = self._reach(chain, longest)
        if length < longest:
            self.want(chain, longest)
        count = length // PAGE
        return Found(tuple(nodes[:count]), chain[count] if length % PAGE else None, length, longest)

    def _reach(self, chain: Sequence[Node], longest: int) -> int:
        """The last point up to `longest` whose window's sliding pages are all there."""
        first = 0  # of the pages that are there without a gap
        best = 0
        for number, node in enumerate(chain):
            if node.sliding is None:
                first = number + 1
                continue
            end = min(longest, (number + 1) * PAGE)
            if self.window(end).start >= first:
                best = end
        return best

    def want(self, chain: Sequence[Node], length: int) -> None:
        """Keep the sliding pages in the window of a point on a chain of nodes before others, now or when they come."""
        for number in self.window(length):
            if number < len(chain):
                chain[number].wanted = True
                page = chain[number].sliding
                if page is not None:
                    self.pools["sliding"].keep(page, precious=True)

    def insert(
        self, parent: Node | None, ids: tuple[int, ...], full: int, sliding: int | None, *, wanted: bool
    ) -> Node:
        """Index a page of committed ids, or give what is known of them already. `full`, `sliding`: pages the caller
        holds; the node's own may be others, of the same contents."""
        parent = parent or self._root
        node = _child(parent, ids)
        if node is None:
            node = Node(parent, ids, full)
            insort(parent.children, node, key=_ids_of)
            self._by_page["full"][full] = node
            self.pools["full"].keep(full)
            self._replace_ends(parent, node)
        node.wanted |= wanted
        if node.sliding is None and sliding is not None:
            node.sliding = sliding
            self._by_page["sliding"][sliding] = node
        if node.sliding is not None:
            self.pools["sliding"].keep(node.sliding, precious=node.wanted)
        return node

    def insert_end(self, parent: Node | None, ids: tuple[int, ...], full: int, sliding: int | None) -> None:
        """Index the last page of a prefix, of fewer than PAGE ids, unless another page contains them."""
        here = parent or self._root
        known, shared = _closest(here, ids)
        if known is None or shared < len(ids) or known.sliding is None:
            self.insert(here, ids, full, sliding, wanted=True)

    def forget(self, node: Node) -> bool:
        """Take a node that leads nowhere else out of the index; False if it leads on."""
        if node.children:
            return False
        self._remove(node)
        self.pools["full"].discard(node.full)
        return True

    def holders(self, found: Found) -> int:
        """How many of the whole pages some slot holds now."""
        return sum(self.pools["full"].holders(node.full) > 0 for node in found.nodes)

    def check_integrity(self, slots: Sequence[dict[str, SlotPages]]) -> None:
        """Raise AssertionError unless index, pools and the slots' pages agree."""
        nodes = list(self._all())
        for kind in self.pools:
            self.pools[kind].check_integrity([page for slot in slots for page in slot[kind].pages])
            pages = [page for node in nodes if (page := getattr(node, kind)) is not None]
            assert len(pages) == len(set(pages)), "two nodes have one page"
            assert set(pages) == set(self._by_page[kind]) == self.pools[kind].kept, f"the index of {kind} pages is off"
        for node in nodes:
            assert node.parent is not None
            assert len(node.ids) == PAGE or not node.children, "a page that is not full leads on"
            assert [child.ids for child in node.children] == sorted({child.ids for child in node.children})
            holders = self.pools["full"].holders
            if node.parent is not self._root:
                assert holders(node.full) <= holders(node.parent.full), "a page is held without the one before it"

    def _all(self) -> Iterator[Node]:
        ahead = list(self._root.children)
        while ahead:
            node = ahead.pop()
            ahead += node.children
            yield node

    def _replace_ends(self, parent: Node, node: Node) -> None:
        """Forget ends of turns that the new node goes on from: it contains them."""
        for count in range(1, len(node.ids)) if len(parent.children) > 1 else ():
            end = _child(parent, node.ids[:count])
            if end is not None:
                node.wanted |= end.wanted
                self.forget(end)

    def _lose(self, page: int) -> None:
        """The pool gives a full page away."""
        node = self._by_page["full"][page]
        assert not node.children, "a page is given away before those behind it"
        self._remove(node)

    def _lose_sliding(self, page: int) -> None:
        self._by_page["sliding"].pop(page).sliding = None

    def _remove(self, node: Node) -> None:
        assert node.parent is not None, "the root stays"
        siblings = node.parent.children
        del siblings[bisect_left(siblings, node.ids, key=_ids_of)]
        del self._by_page["full"][node.full]
        if node.sliding is not None:
            self.pools["sliding"].discard(node.sliding)
            self._lose_sliding(node.sliding)


def _ids_of(node: Node) -> tuple[int, ...]:
    return node.ids


def _child(node: Node, ids: tuple[int, ...]) -> Node | None:
    at = bisect_left(node.children, ids, key=_ids_of)
    found = node.children[at] if at < len(node.children) else None
    return found if found is not None and found.ids == ids else None


def _closest(node: Node, ids: tuple[int, ...]) -> tuple[Node | None, int]:
    """The child that shares most ids from the beginning, and how many. In the order of their ids it is a neighbour."""
    at = bisect_left(node.children, ids, key=_ids_of)
    best, most = None, 0
    for child in node.children[max(0, at - 1) : at + 1]:
        shared = next((i for i, (a, b) in enumerate(zip(child.ids, ids, strict=False)) if a != b), -1)
        shared = min(len(child.ids), len(ids)) if shared < 0 else shared
        if shared > most or (shared == most and best is not None and best.sliding is None):
            best, most = child, shared
    return best, most
