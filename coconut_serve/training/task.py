"""The task: which of two places can be reached from a third, in a forest of two trees.

Both trees have the same number of nodes and a leaf at the same depth; these leaves are the
candidates. Both trees have the same distribution, so only following the edges reveals which one
the root belongs to. A graph's labelled edges decide whether it is trained on (`partition_of`).
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from coconut_serve.training.vocabulary import (
    ANSWER,
    BOS,
    COMMA,
    EOS,
    FIRST_NAME,
    FROM,
    NAMES,
    OR,
    VOCAB_SIZE,
)

Ints = NDArray[np.int64]
Partition = Literal["train", "dev", "test"]

HOPS: Final = (2, 3, 4, 5)
NUM_EXTRA: Final = {2: 2, 3: 2, 4: 3, 5: 3}  # by hops: a tree's nodes off the candidate's path
_CHAIN_RATIO = 0.5  # share of extra nodes that are children of the previous extra node


@dataclass(frozen=True, slots=True, kw_only=True)
class Graphs:
    """Questions with the same number of hops; a place is an index into NAMES."""

    edges: Ints  # [num_graphs, num_edges, 2], parent and child, in the question's order
    candidates: Ints  # [num_graphs, 2], in the question's order
    path: Ints  # [num_graphs, hops + 1], from the root to the right candidate
    nodes: Ints  # [num_graphs, num_nodes], the root's tree
    depths: Ints  # [num_graphs, num_nodes], of these nodes

    @property
    def hops(self) -> int:
        """Number of edges between root and answer."""
        return int(self.path.shape[1]) - 1

    def __len__(self) -> int:
        return len(self.path)

    def take(self, rows: slice | NDArray[Any]) -> "Graphs":
        """Select some of the graphs."""
        return Graphs(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question as text, in the format of COCONUT's data files."""

    question: str
    steps: list[str]
    answer: str
    hops: int


def draw(rng: np.random.Generator, hops: int, count: int) -> Graphs:
    """Draw random questions from all partitions."""
    num_nodes = hops + 1 + NUM_EXTRA[hops]
    parents, depths = _draw_trees(rng, hops, count)
    names = rng.random((count, len(NAMES))).argsort(axis=1)[:, : 2 * num_nodes]
    names = names.reshape(count, 2, num_nodes)  # the first tree has the root of the question
    ends = np.stack([np.take_along_axis(names, parents, axis=2), names], axis=3)[:, :, 1:]
    edges = _shuffle(rng, ends.reshape(count, -1, 2))
    return Graphs(
        edges=edges,
        candidates=_shuffle(rng, names[:, :, hops]),
        path=names[:, 0, : hops + 1],
        nodes=names[:, 0],
        depths=depths[:, 0],
    )


def _draw_trees(rng: np.random.Generator, hops: int, count: int) -> tuple[Ints, Ints]:
    """Draw two trees per graph: nodes [0, hops] are a path, the others hang off it or each other.

    Returns:
        Parent and depth of each node, both [count, 2, num_nodes]; the root is its own parent.
    """
    num_nodes = hops + 1 + NUM_EXTRA[hops]
    parents = np.zeros((count, 2, num_nodes), dtype=np.int64)
    depths = np.zeros_like(parents)
    parents[:, :, 1 : hops + 1] = np.arange(hops)
    depths[:, :, : hops + 1] = np.arange(hops + 1)
    for node in range(hops + 1, num_nodes):
        may_have_children = depths[:, :, :node] < hops  # so candidates are leaves, at full depth
        parent = np.where(may_have_children, rng.random((count, 2, node)), -1.0).argmax(axis=2)
        if node > hops + 1:
            is_chained = (rng.random((count, 2)) < _CHAIN_RATIO) & may_have_children[:, :, -1]
            parent = np.where(is_chained, node - 1, parent)
        parents[:, :, node] = parent
        depths[:, :, node] = np.take_along_axis(depths, parent[:, :, None], axis=2)[:, :, 0] + 1
    return parents, depths


def _shuffle(rng: np.random.Generator, rows: Ints) -> Ints:
    """Shuffle axis 1 of each row independently."""
    order = rng.random(rows.shape[:2]).argsort(axis=1)
    return np.take_along_axis(rows, order.reshape(*order.shape, *[1] * (rows.ndim - 2)), axis=1)


def partition_of(edges: Ints) -> Ints:
    """Hash each graph's labelled edge set, independent of edge order.

    Args:
        edges: [num_graphs, num_edges, 2].

    Returns:
        [num_graphs] in [0, 100): 0 is the test partition, 1 dev, the rest train.
    """
    codes = (edges[..., 0] * len(NAMES) + edges[..., 1]).astype(np.uint64)
    hashes: Ints = (_mix(_mix(codes).sum(axis=1)) % np.uint64(100)).astype(np.int64)
    return hashes


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit numbers (the finaliser of SplitMix64)."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sample(rng: np.random.Generator, hops: int, count: int, partition: Partition) -> Graphs:
    """Draw random questions from one partition."""
    found: list[Graphs] = []
    size = count + count // 16 + 8 if partition == "train" else 120 * count
    while sum(map(len, found)) < count:
        graphs = draw(rng, hops, size)
        hashes = partition_of(graphs.edges)
        found.append(graphs.take(_is_in(hashes, partition)))
    whole = {f.name: np.concatenate([getattr(g, f.name) for g in found]) for f in fields(Graphs)}
    return Graphs(**whole).take(slice(count))


def _is_in(hashes: Ints, partition: Partition) -> NDArray[np.bool_]:
    return hashes > 1 if partition == "train" else hashes == ("test", "dev").index(partition)


def prompt_ids(graphs: Graphs) -> Ints:
    """Encode the questions as the tokenizer does: [num_graphs, 3 * num_edges + 6]."""
    size, x, y = len(graphs), *graphs.candidates.T
    comma = np.full((*graphs.edges.shape[:2], 1), COMMA)
    edges = np.concatenate([graphs.edges + FIRST_NAME, comma], axis=2).reshape(size, -1)
    root = graphs.path[:, 0] + FIRST_NAME
    asked = [x + FIRST_NAME, np.full(size, OR), y + FIRST_NAME, np.full(size, FROM), root]
    return np.concatenate([np.full((size, 1), BOS), edges, np.stack(asked, axis=1)], axis=1)


def cot_ids(graphs: Graphs) -> Ints:
    """Encode steps and answer, [num_graphs, 3 * hops + 3]: `r p1 , p1 p2 , ### p2 <eos>`."""
    size, path = len(graphs), graphs.path + FIRST_NAME
    comma = np.full((size, graphs.hops), COMMA)
    steps = np.stack([path[:, :-1], path[:, 1:], comma], axis=2).reshape(size, -1)
    answer = [np.full(size, ANSWER), path[:, -1], np.full(size, EOS)]
    return np.concatenate([steps, np.stack(answer, axis=1)], axis=1)


def frontiers(graphs: Graphs, num_thoughts: int) -> NDArray[np.float32]:
    """Compute each thought's target: thought k is uniform over the places k edges from the root.

    Thoughts beyond the last level repeat it.

    Returns:
        [num_graphs, num_thoughts, vocab_size], each row sums to 1.
    """
    targets = np.zeros((len(graphs), num_thoughts, VOCAB_SIZE), dtype=np.float32)
    for thought in range(num_thoughts):
        is_reached = graphs.depths == min(thought + 1, graphs.hops)
        row, column = is_reached.nonzero()
        targets[row, thought, graphs.nodes[row, column] + FIRST_NAME] = 1.0
    targets /= targets.sum(axis=2, keepdims=True)
    return targets


def questions(graphs: Graphs) -> Iterator[Question]:
    """Write the questions as text: `oslo > rome, rome > lima, ..., lima or bonn from oslo?`."""
    for edges, candidates, path in zip(graphs.edges, graphs.candidates, graphs.path, strict=True):
        told = "".join(f"{NAMES[a]} > {NAMES[b]}, " for a, b in edges)
        x, y = (NAMES[c] for c in candidates)
        steps = [f"{NAMES[a]} > {NAMES[b]}" for a, b in pairwise(path)]
        yield Question(
            question=f"{told}{x} or {y} from {NAMES[path[0]]}?",
            steps=steps,
            answer=NAMES[path[-1]],
            hops=graphs.hops,
        )


def sample_each(seed: int, per_hop: int, partition: Partition) -> list[Graphs]:
    """Sample the same number of questions for each hop count."""
    return [sample(np.random.default_rng([seed, h]), h, per_hop, partition) for h in HOPS]


def write_questions(path: Path, seed: int, per_hop: int) -> None:
    """Write held-out questions as a JSON list, `per_hop` for each number of hops."""
    drawn = [q for graphs in sample_each(seed, per_hop, "test") for q in questions(graphs)]
    lines = ",\n".join(json.dumps(asdict(question)) for question in drawn)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def audit_shortcuts(graphs: Graphs) -> dict[str, float]:
    """Measure how often rules that ignore the edges find the answer; all should be near 0.5."""
    answer = graphs.path[:, -1]
    other = graphs.candidates.sum(axis=1) - answer
    parents, children = graphs.edges[..., 0], graphs.edges[..., 1]
    right = {
        "is_named_first": _beats(
            _place(graphs.candidates, other), _place(graphs.candidates, answer)
        ),
        "edge_is_told_first": _beats(_place(children, other), _place(children, answer)),
        "has_more_edges_out": _beats(_count(parents, answer), _count(parents, other)),
        "has_more_edges_in": _beats(_count(children, answer), _count(children, other)),
        "comes_first_in_vocabulary": _beats(other, answer),
    }
    return {rule: float(rows.mean()) for rule, rows in right.items()}


def _beats(a: Ints, b: Ints) -> NDArray[np.float64]:
    """Return 1 where a is larger, 0.5 where they are equal (a guess), 0 elsewhere."""
    return np.where(a == b, 0.5, a > b)


def _place(ends: Ints, node: Ints) -> Ints:
    place: Ints = (ends == node[:, None]).argmax(axis=1)
    return place


def _count(ends: Ints, node: Ints) -> Ints:
    count: Ints = (ends == node[:, None]).sum(axis=1)
    return count
