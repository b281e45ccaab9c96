"""The papers' claims as comparisons of two cells: what a paper says, what the study found, whether the signs agree."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.measures import MEASURES
from models.task import SAMPLED

LESS = " less "  # between two figures of one cell: their difference
BEAM = 20  # of the retrieval figures that claims compare; the nearest beam that was measured
FREE_QUERIES = 200  # are decoded without the trie
GIVEN_QUERIES = 500  # walks with the first code given are walked one by one


@dataclass(frozen=True)
class Claim:
    """One comparison.

    Attributes:
        text: what is claimed.
        paper: the paper's figures.
        left, right: the cells compared.
        metric: see `figure`.
        sign: 1 where left should be higher, -1 where lower.
        margin: how far left may stay behind right all the same.
        against: the right side's metric, where it is another.
    """

    text: str
    paper: str
    left: str
    right: str
    metric: str
    sign: int = 1
    margin: float = 0.0
    against: str = ""


PLAIN = "hhq, as in the paper"
EQUAL = "rq_kmeans, equal levels"  # where levels differ in size, so does how evenly chance would use them
CLAIMS = (
    Claim("1 HHQ gives documents more distinct IDs than RQ-KMeans", "p_unique higher at every size (app. C)",
          PLAIN, "rq_kmeans", "p_unique"),
    Claim("1 and more with neighbours told apart", "ours", "hhq", "rq_kmeans", "p_unique"),
    Claim("1 HHQ's codes lie nearer to the vectors", "-", PLAIN, "rq_kmeans", "cosine"),
    Claim("1 HHQ uses its codes more evenly (Gini, level 2)", "-", PLAIN, "rq_kmeans", "gini.2", -1),
    Claim("2 constrained fine-tuning beats unmasked training", "without it, HHQ does not learn",
          PLAIN, "hhq, no mask", "generative.R@1"),
    Claim("2 and learns faster (MRR@10 of held-out queries after two epochs)", "faster",
          PLAIN, "hhq, no mask", "early.generative_mrr"),
    Claim("2 and so does the mask by the predecessor alone (eq. 8)", "as above",
          "hhq, mask by predecessor", "hhq, no mask", "generative.R@1"),
    Claim("a dense teacher adds to labels", "ours", "hhq", "hhq, labels only", "generative.R@1"),
    Claim("and held-out queries know how far to trust it", "ours",
          "hhq, teacher as right", "hhq", "generative.R@10"),
    Claim("also in the combination", "ours", "combined", "combined, teacher trusted", "generative.R@10"),
    Claim("3 pseudo-queries raise R@1", "+4.4 to +6.0 points",
          PLAIN, "hhq, as in the paper, real queries only", "generative.R@1"),
    Claim("3 and with a dense teacher, whom they give more to say", "ours",
          "hhq", "hhq, no pseudo-queries", "generative.R@1"),
    Claim("1 so that leaves may be expanded by sampling in place of cosine (R@1)", "rarely matters", PLAIN, PLAIN,
          "sampled.R@1", margin=0.01, against="generative.R@1"),
    Claim("4 few levels lose at most a point to more levels", "48.33 with 5 tokens, 48.92 with 24",
          "hhq, 5 levels of 128", "hhq, 12 levels of 128", "generative.R@1", margin=0.01),
    Claim("4 and decode fewer tokens (steps of a walk, which ends where one document is left)", "5 tokens against 24",
          "hhq, 5 levels of 128", "hhq, 12 levels of 128", "steps", -1),
    Claim("5 codes learnt with the decoder (DGI, encoder frozen here) beat two stages, H@1",
          ".5052 against .4323", "dgi", "tiger", "generative.R@1"),
    Claim("5 codes learnt with the decoder (DGI, encoder frozen here) beat two stages, H@10",
          "higher", "dgi", "tiger", "generative.R@10"),
    Claim("5 and gains more in the tail than in the head (R@10 of tail less that of head)",
          "largest in the coldest bucket", "dgi", "tiger", "tail.R@10 less head.R@10"),
    Claim("5 scaled cosine helps", "H@1 .5651 → .3768 without",
          "dgi", "dgi, plain products", "generative.R@1"),
    Claim("5 and more than tied heads", "largest single part",
          "dgi, heads apart", "dgi, plain products", "generative.R@1"),
    Claim("5 and more than soft gradients", "largest single part",
          "dgi, straight-through", "dgi, plain products", "generative.R@1"),
    Claim("5 tied heads help", "H@1 .5651 → .5282 without", "dgi", "dgi, heads apart", "generative.R@1"),
    Claim("5 soft gradients help", "H@1 .5651 → .5216 without", "dgi", "dgi, straight-through", "generative.R@1"),
    Claim("5 and both together", "H@1 .5651 → .5193 without", "dgi", "dgi, neither", "generative.R@1"),
    Claim("6 RQ's middle level is used less evenly than its first (Gini)", "higher in the middle",
          EQUAL, EQUAL, "gini.2", against="gini.1"),
    Claim("6 and than its last", "higher in the middle", EQUAL, EQUAL, "gini.2", against="gini.3"),
    Claim("6 documents under head codes of level 2 are found more often (R@1)", ".3617 against .2131",
          EQUAL, EQUAL, "head code.R@1", against="tail code.R@1"),
    Claim("6 dropping top codes of level 2 raises R@1", ".2480 → .3340",
          "hourglass, no mask", "rq_kmeans, no mask", "generative.R@1"),
    Claim("6 also where training chooses among children", "as above", "hourglass", "rq_kmeans", "generative.R@1"),
    Claim("6 and so does dropping the level", ".2480 → .3090",
          "hourglass, level 2 removed", "rq_kmeans", "generative.R@1"),
    Claim("6 but finds less further down (R@10)", ".590 → .564",
          "hourglass, level 2 removed", "rq_kmeans", "generative.R@10", -1),
    Claim("6 variable length writes fewer IDs that nothing has", "lower at every k",
          "hourglass, no mask", "rq_kmeans, no mask", "invalid", -1),
    Claim("6 levels exchanged, a path is lost at its start: R@1 that the first code, given, adds",
          ".2390 → .6600; levels as they were, not given", "hourglass, levels exchanged", EQUAL,
          "given.R@1 less same.R@1"),
    Claim("7 SA2CRQ makes up fewer IDs (Hallu)", ".2514 → .1808", "sa2crq, no mask", "tiger", "invalid", -1),
    Claim("7 SA2CRQ retrieves more items a query", "509 → 914", "sa2crq, no mask", "tiger", "retrieved"),
    Claim("7 SA2CRQ finds more far down", "R@2k .6448 → .7231", "sa2crq, no mask", "tiger", "recall.deepest"),
    Claim("7 the head does not lose", "R@2k of the head .7772 → .7820", "sa2crq, no mask", "tiger", "head.deepest"),
    Claim("7 the tail gains", "R@2k .4288 → .4555", "sa2crq, no mask", "tiger", "tail.deepest"),
    Claim("8 free decoding writes invalid IDs, the more the wider", "below 5 % of 10, more of 50", "tiger",
          "tiger", "invalid.100", against="invalid.10"),
    Claim("8 and more of them where training chose among children", "-", "hhq", "tiger", "invalid.10"),
    Claim("8 with the trie none can be", "0", "tiger", "tiger", "made-up", -1, against="invalid.10"),
    Claim("the decoder adds to geometry", "ours", "hhq", "hhq", "guided.R@10", against="geometric.R@10"),
    *(Claim(f"the combination beats {name} alone, {measure}", "ours", "combined", name, f"generative.{measure}")
      for name in ("hhq", "hhq, teacher as right", "dgi", "hourglass", "sa2crq", "rq_kmeans", "tiger")
      for measure in ("R@10", "MRR@10")),
    Claim("its decoder adds to geometry", "ours", "combined", "combined", "guided.R@10", against="geometric.R@10"),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What the study says of a claim on one data set.

    Attributes:
        left, right: mean over the seeds that both have, and deviation of one seed (over all that a side has).
        sampled: standard error of the gap, since test queries are a sample; 0 for what is no share of them.
        seeds: that both have.
    """

    claim: Claim
    data: str
    left: tuple[float, float]
    right: tuple[float, float]
    sampled: float
    seeds: int

    @property
    def verdict(self) -> str:
        """`same sign`, `opposite`, or `within noise` where the gap, with the margin, is less than one deviation.

        The deviation of both sides over seeds, and of the gap over queries as if each side were asked its own: what
        they have in common makes it smaller.
        """
        gap = self.claim.sign * (self.left[0] - self.right[0]) + self.claim.margin
        noise = math.hypot(self.left[1], self.right[1], self.sampled)
        verdict = "same sign" if gap > 0 else "opposite" if gap < 0 else "equal"
        verdict = "within noise" if noise and abs(gap) <= noise else verdict
        return verdict if self.seeds > 1 else f"{verdict}, one seed"


def find(claims: Sequence[Claim], results: Mapping[str, Any]) -> list[Finding]:
    """Compare all cells that are there."""
    found = []
    for claim in claims:
        for data, cells in results.items():
            if claim.left in cells and claim.right in cells:
                shared = cells[claim.left].keys() & cells[claim.right].keys()
                asked = (cells[claim.left], claim.metric), (cells[claim.right], claim.against or claim.metric)
                left, right = (_side(seeds, shared, metric) for seeds, metric in asked)
                if left and right:
                    one = min(shared)
                    sampled = math.sqrt(sum(_variance(seeds[one], metric) for seeds, metric in asked))
                    found.append(Finding(claim, data, left, right, sampled, len(shared)))
    return found


def _variance(result: Mapping[str, Any], metric: str) -> float:
    """Of a mean over queries: at most m (1 - m) / Q, for what lies between 0 and 1."""
    if LESS in metric:
        return sum(_variance(result, part) for part in metric.split(LESS))
    (first, _, measure), parts = metric.rpartition("."), _far_down(result)["parts"]
    if metric.partition(".")[0] == "invalid":
        queries = min(FREE_QUERIES, result["queries"])
    elif measure not in (*MEASURES, "deepest"):
        return 0.0
    elif first in parts:
        queries = parts[first]["queries"]
    else:
        queries = min(GIVEN_QUERIES, result["queries"]) if first in ("given", "same") else result["queries"]
    mean = figure(result, metric) or 0.0
    return float(mean * (1 - mean) / queries)


def _side(seeds: Mapping[str, Any], shared: Collection[str], metric: str) -> tuple[float, float] | None:
    """Mean over the shared seeds, deviation over all; None where there is none, or one lacks the figure."""
    everywhere, here = spread(seeds, metric), spread({seed: seeds[seed] for seed in sorted(shared)}, metric)
    return None if everywhere is None or here is None else (here[0], everywhere[1])


def spread(seeds: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """Mean and standard deviation of a figure over seeds; None where a seed lacks it."""
    values = [figure(result, metric) for result in seeds.values()]
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def figure(result: Mapping[str, Any], metric: str) -> float | None:
    """One figure of a result, or with `less` between two the first minus the second; None if it is not there.

    Of the SIDs `p_unique`, `cosine`, `mean_length`, `gini.LEVEL`. Of walks `SCORING.MEASURE`, lexicographic at beam 20;
    the generative walk's candidates also as `fused.MEASURE`, ranked by log P + weight · cosine, and `sampled.MEASURE`,
    a leaf's documents in an order drawn at random; its `steps` of the decoder. Of the generative walk, where there is
    one, at the widest beam `retrieved`, `recall.DEPTH` (`first`, `second`, `deepest`) and, for a part of the documents
    (`measuring.parts_of`), `PART.MEASURE`; `given.MEASURE` with the first code given and `same.MEASURE`, of the same
    queries, without. The share of SIDs that no document has: `invalid.BEAM` written without the trie (`invalid`: the
    widest beam) and `made-up` with it. Of the training `early.NAME`, as first logged.
    """
    if LESS in metric:
        left, right = (figure(result, part) for part in metric.split(LESS))
        return None if left is None or right is None else left - right
    first, _, rest = metric.partition(".")
    sids, deep = result["sids"], _far_down(result)
    if first in ("p_unique", "cosine", "mean_length"):
        value: float | None = sids[first]
        return value
    if first == "gini":
        levels = sids["levels"]
        return float(levels[int(rest) - 1]["gini"]) if int(rest) <= len(levels) else None
    if first == "invalid":
        free = {row["beam"]: row["valid_free"] for row in result["rows"] if row["valid_free"] is not None}
        beam = int(rest) if rest else max(free, default=0)
        return 1 - free[beam] if beam in free else None
    if first == "made-up":
        known = [row["valid_trie"] for row in result["rows"] if row["valid_trie"] is not None]
        return 1 - min(known) if known else None
    if first == "steps":
        walk = _walk(result["rows"], "generative")
        return walk.get("steps") if walk else None
    if first == "retrieved":
        return float(deep["retrieved"])
    if first == "recall":
        depth = dict(zip(("first", "second", "deepest"), sorted(deep["recall"], key=int), strict=True))[rest]
        return float(deep["recall"][depth])
    if first in ("given", "same"):
        return float(result[first][rest])
    if first == "early":
        return next((float(line[rest]) for line in result["log"] if rest in line), None)
    if first in ("head", "tail", "head code", "tail code"):
        return deep["parts"][first][rest] if first in deep["parts"] else None
    return _retrieval(result["rows"], first, rest)


def _far_down(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Deep measures of the decoder's walk, or of a model without one geometry's."""
    deep: Mapping[str, Any] = result["deep"].get("generative") or result["deep"]["geometric"]
    return deep


def _retrieval(rows: Sequence[Mapping[str, Any]], name: str, measure: str) -> float | None:
    walk = _walk(rows, name)
    return float(walk["measures"][measure]) if walk else None


def _walk(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any] | None:
    wanted = ("generative", name) if name in ("fused", SAMPLED) else (name, "lexicographic")
    walks = [row for row in rows if (row["scoring"], row["ranking"]) == wanted or row["system"] == name]
    return min(walks, key=lambda row: abs((row["beam"] or BEAM) - BEAM), default=None)
