"""Measures how diverse the thoughts in trajectories.jsonl files are: distinct n-grams, clusters, and a picture.

    python -m agentrefine.diversity runs/a/refine/trajectories.jsonl runs/b/round_0/rollout/trajectories.jsonl
    python -m agentrefine.diversity FILE FILE FILE --picture thoughts.svg

All metrics depend on the sample size, so each file is sampled down to the size of the smallest.
- distinct: distinct thoughts / all thoughts.
- distinct_n: distinct word n-grams / all word n-grams (Li et al. 2016, arXiv 1510.03055).
- clusters: the thoughts of all files are clustered together (k-means over TF-IDF of words and word pairs, reduced to 50
  dimensions). Reported per file: clusters with at least 1 % of its thoughts, and their effective number, exp(entropy).
The picture has one panel per file: t-SNE of the same 50 dimensions (AgentRefine shows such a projection of a text
embedding that it does not name). Prints a table and, as the last line, one JSON object.
Needs scikit-learn and matplotlib: pip install -r requirements/analysis.txt.
Left out: neural embeddings, to avoid a download; synonyms count as different words.

Shapes: N thoughts of all files, K dimensions.
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from artifacts.cli import Range, run_main
from artifacts.seeds import draw_seed, generator
from artifacts.trajectory import read_trajectories

DIMENSIONS = 50
OCCUPIED = 0.01  # minimum share of a file's thoughts for a cluster to count


@dataclass(frozen=True, kw_only=True)
class Args:
    files: tyro.conf.Positional[tuple[Path, ...]]
    """trajectories.jsonl files to compare."""
    thoughts: Annotated[int, Range(2)] = 2000
    """Maximum thoughts sampled from each file, without replacement."""
    clusters: Annotated[int, Range(1)] = 50
    """Number of clusters (k) over the thoughts of all files."""
    picture: Path = Path("runs/diversity.png")
    """File to write the picture to; .png or .svg."""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    """Seed of the samples, the clusters and the projection."""

    def check(self) -> None:
        if not self.files:
            raise ValueError("no files given; expected trajectories.jsonl files")
        if self.picture.suffix not in (".png", ".svg"):
            raise ValueError(f"--picture is {self.picture}; expected a name that ends in .png or .svg")


def load_thoughts(path: Path) -> list[str]:
    """Every thought of every turn that has a word in it, in order. Raises ValueError if there are none."""
    turns = (turn for trajectory in read_trajectories(path) for turn in trajectory.turns)
    found = [thought for turn in turns for thought in turn.thought.split("\n") if re.search(r"\w", thought)]
    if not found:
        raise ValueError(f"{path} holds no thoughts; expected trajectories of an agent that thinks")
    return found


def distinct_n(thoughts: Sequence[str], n: int) -> float:
    """Distinct lower-case word n-grams / all word n-grams; 0 if there are none."""
    grams = []
    for thought in thoughts:
        words = re.findall(r"\w+", thought.lower())
        grams += zip(*(words[i:] for i in range(n)), strict=False)
    return len(set(grams)) / max(1, len(grams))


def embed(thoughts: Sequence[str], seed: int) -> np.ndarray:
    """TF-IDF of words and word pairs, reduced to at most DIMENSIONS: [N, K] float."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+").fit_transform(thoughts)
    if min(counts.shape) <= DIMENSIONS:
        return counts.toarray()
    return TruncatedSVD(DIMENSIONS, random_state=seed).fit_transform(counts)


def cluster(points_NK: np.ndarray, k: int, seed: int) -> np.ndarray:
    """The cluster of each thought: [N] int, 0..k-1."""
    from sklearn.cluster import KMeans

    k = min(k, len(np.unique(points_NK.round(6), axis=0)))
    return KMeans(k, n_init=4, random_state=seed).fit_predict(points_NK)


def spread(labels: np.ndarray) -> tuple[int, float]:
    """Number of clusters with at least OCCUPIED of the thoughts, and exp(entropy) over all clusters."""
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return int((shares >= OCCUPIED).sum()), float(np.exp(-(shares * np.log(shares)).sum()))


def plot(points_NK: np.ndarray, names: Sequence[str], path: Path, seed: int) -> None:
    """Writes the picture: one panel per file on shared axes; the points are grouped by file, equally many each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(points_NK) - 1) / 3)
    points_N2 = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points_NK)
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 5), sharex=True, sharey=True, squeeze=False)
    for axis, name, own_N2 in zip(axes[0], names, np.split(points_N2, len(names)), strict=True):
        axis.scatter(*points_N2.T, s=2, c="0.88", linewidths=0)  # all files, as a backdrop
        axis.scatter(*own_N2.T, s=4, linewidths=0)
        axis.set(title=name, xticks=[], yticks=[])
        axis.title.set_fontsize(8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def compare(args: Args) -> tuple[dict[str, Any], np.ndarray]:
    """The metrics of all files, and their points [N, K] by file. Raises ValueError for a file without thoughts."""
    everything = {str(path): load_thoughts(path) for path in args.files}
    sample_size = min(args.thoughts, *map(len, everything.values()))
    if sample_size < 2:
        raise ValueError("got one thought to compare; expected at least two per file")
    samples: dict[str, list[str]] = {}
    for name, thoughts in everything.items():
        indices = generator(args.seed, "diversity", name).choice(len(thoughts), sample_size, replace=False)
        samples[name] = [thoughts[index] for index in sorted(indices)]
    seed = draw_seed(args.seed, "diversity")
    points_NK = embed([thought for thoughts in samples.values() for thought in thoughts], seed)
    labels = cluster(points_NK, args.clusters, seed)
    files = []
    for i, (name, thoughts) in enumerate(samples.items()):
        occupied, effective = spread(labels[i * sample_size : (i + 1) * sample_size])
        files.append(
            {
                "file": name,
                "thoughts": len(everything[name]),
                "distinct": round(len(set(thoughts)) / sample_size, 4),
                **{f"distinct_{n}": round(distinct_n(thoughts, n), 4) for n in (1, 2, 3)},
                "clusters": occupied,
                "effective_clusters": round(effective, 2),
            }
        )
    return {"drawn": sample_size, "k": int(labels.max()) + 1, "files": files, "picture": str(args.picture)}, points_NK


def main(args: Args) -> None:
    try:
        found, points_NK = compare(args)
        plot(points_NK, [entry["file"] for entry in found["files"]], args.picture, draw_seed(args.seed, "diversity"))
    except ImportError as error:
        raise ValueError(f"{error}; run: pip install -r requirements/analysis.txt") from error
    columns = ("thoughts", "distinct", "distinct_1", "distinct_2", "distinct_3", "clusters", "effective_clusters")
    print(" ".join(f"{column:>11}" for column in columns) + "  file")
    for entry in found["files"]:
        print(" ".join(f"{entry[column]:>{max(11, len(column))}}" for column in columns) + f"  {entry['file']}")
    print(f"{found['drawn']} sampled thoughts per file, k = {found['k']} clusters -> {found['picture']}")
    print(json.dumps(found))


if __name__ == "__main__":
    run_main(main, Args, __doc__)
