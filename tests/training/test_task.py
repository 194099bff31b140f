"""The questions are what they claim to be: balanced, solvable by search only, split by graph."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from coconut_serve.training.task import (
    HOPS,
    NUM_EXTRA,
    Graphs,
    audit_shortcuts,
    cot_ids,
    draw,
    frontiers,
    partition_of,
    prompt_ids,
    questions,
    sample,
    write_questions,
)
from coconut_serve.training.vocabulary import FIRST_NAME, NAMES, WORDS


def levels(edges: np.ndarray[tuple[int, int], np.dtype[np.int64]], root: int) -> list[set[int]]:
    """Breadth-first search, the obvious way: the places 0, 1, 2, ... edges from the root."""
    children = defaultdict(set)
    for parent, child in edges.tolist():
        children[parent].add(child)
    found = [{root}]
    while found[-1]:
        found.append(set().union(*(children[node] for node in found[-1])))
    return found[:-1]


def graphs_of(hops: int, count: int = 200, seed: int = 5) -> Graphs:
    return draw(np.random.default_rng(seed), hops, count)


@pytest.mark.parametrize("hops", HOPS)
def test_only_the_answer_is_reachable_and_it_is_as_far_as_asked(hops: int) -> None:
    graphs = graphs_of(hops)
    for edges, candidates, path in zip(
        graphs.edges, graphs.candidates.tolist(), graphs.path.tolist(), strict=True
    ):
        found = levels(edges, path[0])
        answer, other = path[-1], sum(candidates) - path[-1]
        assert answer in candidates
        assert answer in found[hops]
        assert not any(other in level for level in found)
        assert len(found) == hops + 1, "nothing is farther away than the answer"
        assert not np.isin(edges[:, 0], candidates).any(), "candidates are leaves"
        told = {tuple(edge) for edge in edges.tolist()}
        assert told >= set(pairwise(path))


@pytest.mark.parametrize("hops", HOPS)
def test_both_trees_have_the_same_size(hops: int) -> None:
    for edges, path in zip(graphs_of(hops).edges, graphs_of(hops).path, strict=True):
        num_nodes = hops + 1 + NUM_EXTRA[hops]
        assert len(edges) == 2 * (num_nodes - 1)
        assert len(np.unique(edges)) == 2 * num_nodes
        assert sum(map(len, levels(edges, path[0]))) == num_nodes


@pytest.mark.parametrize("hops", HOPS)
def test_frontiers_are_those_of_a_breadth_first_search(hops: int) -> None:
    graphs = graphs_of(hops)
    for row, target in enumerate(frontiers(graphs, 6)):
        found = levels(graphs.edges[row], graphs.path[row, 0])
        for thought, probs in enumerate(target):
            places = set((probs.nonzero()[0] - FIRST_NAME).tolist())
            assert places == found[min(thought + 1, hops)]
            assert np.allclose(probs[probs > 0], 1 / len(places))


@pytest.mark.parametrize("hops", HOPS)
def test_rules_that_follow_no_edge_are_right_half_the_time(hops: int) -> None:
    """With 10,000 questions, 0.5 +- 0.025 is five standard deviations; 20 checks, seed fixed."""
    for rule, right in audit_shortcuts(graphs_of(hops, 10_000)).items():
        assert right == pytest.approx(0.5, abs=0.025), rule
    assert audit_shortcuts(graphs_of(hops, 10_000))["has_more_edges_in"] == 0.5


def test_every_name_is_used_alike() -> None:
    counts = np.bincount(graphs_of(5, 4000).nodes.ravel(), minlength=len(NAMES))
    assert counts.min() > 0.8 * counts.mean()


def test_partition_depends_on_the_set_of_labelled_edges_only() -> None:
    edges = graphs_of(3).edges
    assert (partition_of(edges) == partition_of(edges[:, ::-1])).all()
    renamed = (edges + 1) % len(NAMES)
    assert (partition_of(edges) != partition_of(renamed)).mean() > 0.95
    turned = edges[:, :, ::-1]
    assert (partition_of(edges) != partition_of(turned)).mean() > 0.95


def test_partitions_are_disjoint_and_of_the_stated_sizes() -> None:
    hashes = partition_of(graphs_of(2, 40_000).edges)
    assert (hashes == 0).mean() == pytest.approx(0.01, abs=0.003)
    rng = np.random.default_rng(0)
    assert (partition_of(sample(rng, 2, 300, "test").edges) == 0).all()
    assert (partition_of(sample(rng, 2, 300, "dev").edges) == 1).all()
    assert (partition_of(sample(rng, 2, 3000, "train").edges) > 1).all()


def test_same_seed_gives_the_same_questions() -> None:
    first, second = (sample(np.random.default_rng([7, 1]), 4, 50, "train") for _ in range(2))
    assert (prompt_ids(first) == prompt_ids(second)).all()
    other = sample(np.random.default_rng([7, 2]), 4, 50, "train")
    assert not (prompt_ids(first) == prompt_ids(other)).all()


def test_ids_and_text_say_the_same() -> None:
    graphs = graphs_of(3, 5)
    for question, prompt, cot in zip(
        questions(graphs), prompt_ids(graphs).tolist(), cot_ids(graphs).tolist(), strict=True
    ):
        text = question.question.replace(",", " ,").replace(">", "").replace("?", "")
        assert [WORDS[i] for i in prompt] == ["<bos>", *text.split()]
        steps = [word for step in question.steps for word in (*step.split(" > "), ",")]
        assert [WORDS[i] for i in cot] == [*steps, "###", question.answer, "<eos>"]


def test_written_questions_are_held_out_and_in_coconuts_format(tmp_path: Path) -> None:
    write_questions(tmp_path / "test.json", seed=4, per_hop=10)
    rows = json.loads((tmp_path / "test.json").read_text())
    assert [row["hops"] for row in rows] == [h for h in HOPS for _ in range(10)]
    assert {tuple(row) for row in rows} == {("question", "steps", "answer", "hops")}
    for row in rows:
        edges = [edge.split(" > ") for edge in row["question"].split(", ")[:-1]]
        ids = np.array([[[NAMES.index(name) for name in edge] for edge in edges]])
        assert partition_of(ids)[0] == 0
        assert len(row["steps"]) == row["hops"]
        assert row["steps"][-1].endswith(row["answer"])
