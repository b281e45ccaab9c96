"""A study of two cells from training to its page, and that nothing is done twice."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.data import DataError, Document
from models.study import runner
from models.study.claims import CLAIMS, Claim, figure, find
from models.study.measuring import parts_of
from models.study.plan import Cell, Place, Plan, places
from models.study.quick import write_quick
from models.study.report import write_report
from models.study.runner import run_study
from models.task import Task

NO_PARTS = {"geometric": {"parts": {}}}
PLAN = Plan(
    seeds=(0, 1),
    data=("tiny",),
    beams=(5, 10),
    common={
        "text.max_query_tokens": 12, "text.max_document_tokens": 24, "pseudo_queries.per_document": 1,
        "stage.epochs": 1, "stage.batch": 16, "decoder.layers": 1, "decoder.heads": 2, "decoder.width": 16,
        "quantizer.level_sizes": [4, 8],
    },
    cell=(
        Cell(name="hhq", group="systems", recipe="hhq"),
        Cell(name="rq_kmeans", group="systems", recipe="rq_kmeans"),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def study(tiny_encoder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("study")
    shutil.copytree(tiny_data, out / "data" / "tiny")
    return run_study(PLAN, out / "data", str(tiny_encoder), out / "cells", out / "figures"), out


def test_every_cell_has_its_figures_and_leaves_the_model_that_was_measured(study: tuple[dict[str, Any], Path]) -> None:
    results, out = study
    for cell in PLAN.cell:
        for seed in PLAN.seeds:
            place = Place("tiny", cell, seed)
            run = place.under(out / "cells") / "run"
            assert [path.name for path in run.parent.iterdir()] == ["run"]
            assert {path.name for path in run.iterdir()} == {"fingerprint", "log.jsonl", "model", "vectors"}
            assert json.loads(place.file(out / "figures").read_text()) == results["tiny"][cell.name][str(seed)]
            result = results["tiny"][cell.name][str(seed)]
            assert (result["documents"], result["queries"]) == (60, 60)
            assert result["made"].keys() == {"torch", "onnxruntime", "device", "source"}
            assert result["log"] == [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            assert 0 < figure(result, "p_unique") <= 1
            assert {row["scoring"] for row in result["rows"]} == {"", "generative", "geometric", "guided"}
            assert figure(result, "made-up") == 0.0
            for name in (
                "cosine",
                "gini.2",
                "guided.R@10",
                "invalid",
                "invalid.5",
                "made-up",
                "retrieved",
                "recall.deepest",
                "head.R@10",
                "head.deepest",
                "head code.R@1",
                "given.R@1",
                "same.R@1",
                "early.generative_mrr",
            ):
                assert figure(result, name) is not None, name
    assert figure(results["tiny"]["hhq"]["0"], "gini.3") is None


def test_what_is_done_is_not_done_again_unless_the_recipe_changes(
    study: tuple[dict[str, Any], Path], tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, out = study
    trained: list[str] = []
    monkeypatch.setattr(runner, "run_cell", lambda job, *_: trained.append(job.recipe.name))
    seen: list[dict[str, Any]] = []
    assert (
        run_study(PLAN, out / "data", str(tiny_encoder), out / "cells", out / "figures", after=seen.append) == results
    )
    assert seen == [results], "the page can be written before anything runs"
    assert trained == []
    changed = PLAN.model_copy(
        update={"cell": (PLAN.cell[0], PLAN.cell[1].model_copy(update={"changes": {"decoder.width": 32}}))}
    )
    held = run_study(changed, out / "data", str(tiny_encoder), out / "cells", out / "figures")["tiny"]
    assert held == {"hhq": results["tiny"]["hhq"]}, "figures of a cell that has changed since are not shown"
    assert trained == ["rq_kmeans", "rq_kmeans"]


def test_figures_are_enough_to_go_on(
    study: tuple[dict[str, Any], Path], tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, with the figures alone: no encoder is tuned for cells that are done."""
    results, out = study
    monkeypatch.setattr(runner, "train", lambda *_, **__: pytest.fail("everything is done"))
    assert run_study(PLAN, out / "data", str(tiny_encoder), tmp_path, out / "figures") == results
    assert not any(tmp_path.iterdir())


def test_a_cell_that_was_cut_off_goes_on(
    study: tuple[dict[str, Any], Path], tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between training and measuring: the second run finds the trained model and gives the same figures."""
    results, out = study
    shutil.copytree(out / "cells" / "tiny" / "encoder", tmp_path / "tiny" / "encoder")
    plan = PLAN.model_copy(update={"seeds": (0,), "cell": PLAN.cell[:1]})
    with monkeypatch.context() as patched:
        patched.setattr(runner, "measure_bundle", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_study(plan, out / "data", str(tiny_encoder), tmp_path, tmp_path / "figures")
    monkeypatch.setattr(runner, "train", lambda *_, **__: pytest.fail("it is trained"))
    again = run_study(plan, out / "data", str(tiny_encoder), tmp_path, tmp_path / "figures")["tiny"]["hhq"]["0"]
    first = results["tiny"]["hhq"]["0"]
    assert again["sids"] == first["sids"]
    assert [row["measures"] for row in again["rows"]] == [row["measures"] for row in first["rows"]]


def test_other_measuring_trains_nothing_again(
    study: tuple[dict[str, Any], Path], tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, out = study
    for folder in ("data", "cells", "figures"):
        shutil.copytree(out / folder, tmp_path / folder)
    monkeypatch.setattr(runner, "train", lambda *_, **__: pytest.fail("everything is trained"))
    fewer = PLAN.model_copy(update={"queries": 20, "seeds": (0,), "cell": PLAN.cell[:1]})
    found = run_study(fewer, tmp_path / "data", str(tiny_encoder), tmp_path / "cells", tmp_path / "figures")
    result = found["tiny"]["hhq"]["0"]
    assert result["queries"] == 20
    assert result["sids"] == results["tiny"]["hhq"]["0"]["sids"]


def test_parts_are_split_by_interactions_and_by_the_second_code() -> None:
    """Five of eight documents share code 7 of level 2, so half of them and more are under this one: a head code."""
    ids = [f"d{n}" for n in range(8)]
    task = Task([Document(id_, "", "") for id_ in ids], [], [], [], {f"q{n}": {f"d{n}": 1} for n in range(8)})
    codes = np.array([[n, 7 if n < 5 else n + 10] for n in range(8)])
    parts = parts_of(task, {"d6": 9, "d7": 3}, codes)
    assert parts["head"].keys() == {"q6", "q7"}
    assert parts["head code"].keys() == {f"q{n}" for n in range(5)}
    assert parts["tail code"].keys() == {"q5", "q6", "q7"}
    assert parts_of(task, {}, codes[:, :1]).keys() == {"head", "tail"}


def test_the_published_page_holds_the_claims_that_are_tested() -> None:
    page = (Path(runner.__file__).parents[1] / "results" / "systems.md").read_text("utf-8")
    table = page.split("## Claims")[1].split("\n## ")[0]
    shown = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert set(shown) <= {claim.text for claim in CLAIMS}
    assert len(shown) > 20


def test_the_page_has_every_cell_and_verdict(study: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    write_report(PLAN, study[0], tmp_path / "page.md", "a command")
    page = (tmp_path / "page.md").read_text()
    assert "4 of 4 trainings are done" in page
    (claim,) = [line for line in page.splitlines() if line.startswith("| 1 and more with neighbours told apart")]
    assert "| hhq / rq_kmeans: p_unique |" in claim
    assert claim.count("±") == 2
    assert claim.endswith(("**same sign** |", "**opposite** |", "**within noise** |", "**equal** |"))
    rows = [line for line in page.splitlines() if line.startswith(("| hhq | 2 |", "| rq_kmeans | 2 |"))]
    assert len(rows) == 6, "both cells, in all three tables"
    assert all("±" in row for row in rows), rows
    assert "### Popularity" in page
    assert "| system | seeds | beam 5 | beam 10 | with the trie |" in page
    assert (tmp_path / "page.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("left", "right", "sign", "margin", "verdict"),
    [
        ([0.5, 0.52], [0.4, 0.41], 1, 0.0, "same sign"),
        ([0.5, 0.52], [0.4, 0.41], -1, 0.0, "opposite"),
        ([0.5, 0.3], [0.39, 0.4], 1, 0.0, "within noise"),
        ([0.491, 0.491], [0.5, 0.5], 1, 0.01, "same sign"),
        ([0.489, 0.489], [0.5, 0.5], 1, 0.01, "opposite"),
        ([0.509, 0.509], [0.5, 0.5], -1, 0.01, "same sign"),
        ([0.488, 0.492], [0.5, 0.5], 1, 0.01, "within noise"),
        ([0.491], [0.5], 1, 0.01, "same sign, one seed"),
    ],
)
def test_verdicts_weigh_the_gap_against_the_seeds(
    left: list[float], right: list[float], sign: int, margin: float, verdict: str
) -> None:
    def cell(values: list[float]) -> dict[str, Any]:
        return {str(n): {"sids": {"cosine": value}, "deep": NO_PARTS} for n, value in enumerate(values)}

    results = {"data": {"a": cell(left), "b": cell(right)}}
    claims = [Claim("", "", "a", "b", "cosine", sign, margin), Claim("", "", "a", "missing", "cosine")]
    (found,) = find(claims, results)
    assert found.verdict == verdict


def test_cells_are_compared_by_the_seeds_that_both_have() -> None:
    def cell(**values: float) -> dict[str, Any]:
        return {seed[1:]: {"sids": {"cosine": value}, "deep": NO_PARTS} for seed, value in values.items()}

    claim = Claim("", "", "a", "b", "cosine")
    (found,) = find([claim], {"data": {"a": cell(s0=0.4, s1=0.41, s2=0.42), "b": cell(s0=0.45)}})
    assert (found.left[0], found.seeds, found.verdict) == (0.4, 1, "opposite, one seed")
    (found,) = find([claim], {"data": {"a": cell(s0=0.4, s1=0.5, s2=0.51), "b": cell(s0=0.42)}})
    assert found.verdict == "within noise, one seed"
    assert find([claim], {"data": {"a": cell(s1=0.4), "b": cell(s0=0.45)}}) == []


def test_a_quick_study_finds_what_it_made_the_first_time(tmp_path: Path) -> None:
    """Learnt by processes of their own, two vocabularies differ."""
    script = (
        "import sys; from pathlib import Path; from models.study.quick import write_quick as w; w(Path(sys.argv[1]))"
    )
    states = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
        files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        states.append({str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files})
    assert states[0] == states[1]
    assert write_quick(tmp_path) == (tmp_path / "quick" / "data", str(tmp_path / "quick" / "encoder"))


def test_a_gain_in_the_tail_is_weighed_against_that_in_the_head() -> None:
    """Left gains .1 in the tail and .2 in the head: it does not gain most in the tail."""

    def cell(tail: float, head: float | None) -> dict[str, Any]:
        of_many = {"queries": 10.0**6}
        parts = {"tail": of_many | {"R@10": tail}} | ({} if head is None else {"head": of_many | {"R@10": head}})
        return {"0": {"sids": {}, "queries": 10**6, "deep": {"geometric": {"parts": parts}}}}

    claim = Claim("", "", "a", "b", "tail.R@10 less head.R@10")
    (found,) = find([claim], {"data": {"a": cell(0.5, 0.8), "b": cell(0.4, 0.6)}})
    assert (found.left[0], found.right[0]) == (pytest.approx(-0.3), pytest.approx(-0.2))
    assert found.verdict == "opposite, one seed"
    assert find([claim], {"data": {"a": cell(0.5, 0.8), "b": cell(0.4, None)}}) == []


def test_two_figures_of_one_cell_are_compared() -> None:
    cells = {"a": {"0": _asked({"given": {"R@1": 0.6}, "same": {"R@1": 0.2}}, 100)}}
    (found,) = find([Claim("", "", "a", "a", "given.R@1", against="same.R@1")], {"data": cells})
    assert (found.left[0], found.right[0], found.verdict) == (0.6, 0.2, "same sign, one seed")


@pytest.mark.parametrize(("queries", "verdict"), [(100, "within noise, one seed"), (1000, "same sign, one seed")])
def test_queries_are_a_sample(queries: int, verdict: str) -> None:
    """Shares of .54 and .5: of 100 queries the gap has a standard error of .07, of 500 of .032; more are not given."""
    cells = {name: {"0": _asked({"given": {"R@1": share}}, queries)} for name, share in (("a", 0.54), ("b", 0.5))}
    (found,) = find([Claim("", "", "a", "b", "given.R@1")], {"data": cells})
    assert found.verdict == verdict
    assert found.sampled == pytest.approx(math.sqrt((0.54 * 0.46 + 0.25) / min(queries, 500)))


def test_made_up_ids_are_a_share_of_few_queries() -> None:
    rows = [{"beam": 10, "valid_free": 0.4}]
    cells = {"a": {"0": _asked({"rows": rows}, 1000)}}
    (found,) = find([Claim("", "", "a", "a", "invalid.10")], {"data": cells})
    assert found.sampled == pytest.approx(math.sqrt(2 * 0.24 / 200))


def test_a_part_of_the_queries_is_a_smaller_sample() -> None:
    parts = {"tail": {"R@1": 0.5, "queries": 50.0}}
    asked = {"queries": 1000, "sids": {}, "deep": {"geometric": {"parts": parts}}}
    (found,) = find([Claim("", "", "a", "a", "tail.R@1")], {"data": {"a": {"0": asked}}})
    assert found.sampled == pytest.approx(math.sqrt(2 * 0.25 / 50))


def _asked(figures: dict[str, Any], queries: int) -> dict[str, Any]:
    return figures | {"queries": queries, "sids": {}, "deep": NO_PARTS}


def test_claims_say_what_is_compared() -> None:
    metrics = {claim.text: (claim.metric, claim.margin) for claim in CLAIMS}
    assert metrics["4 few levels lose at most a point to more levels"] == ("generative.R@1", 0.01)
    (tail,) = (metric for text, (metric, _) in metrics.items() if "more in the tail than in the head" in text)
    assert tail == "tail.R@10 less head.R@10"


def test_one_seed_says_so_and_cells_keep_to_their_data(tmp_path: Path) -> None:
    cells = {name: {"0": {"sids": {"cosine": n}, "deep": NO_PARTS}} for n, name in enumerate(("a", "b"))}
    (found,) = find([Claim("", "", "a", "b", "cosine")], {"data": cells})
    assert found.verdict == "opposite, one seed"
    plan = PLAN.model_copy(
        update={"data": ("tiny", "other"), "cell": (PLAN.cell[0], PLAN.cell[1].model_copy(update={"data": ("other",)}))}
    )
    assert [(place.data, place.cell.name) for place in places(plan) if place.seed == 0] == [
        ("tiny", "hhq"), ("other", "hhq"), ("other", "rq_kmeans"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="the plan has no data set 'else': it has tiny"):
        run_study(PLAN, tmp_path, "", tmp_path, tmp_path, only=["else"])


def test_a_tuned_encoder_is_not_replaced_by_another(
    study: tuple[dict[str, Any], Path], tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another start, or other data; the same encoder by another path is the same, and so are the figures by another."""
    results, out = study
    for name in ("cells", "figures"):
        shutil.copytree(out / name, tmp_path / name)
    shutil.copytree(tiny_encoder, tmp_path / "start")
    shutil.copytree(out / "data", tmp_path / "data")
    monkeypatch.setattr(runner, "train", lambda *_, **__: pytest.fail("everything is done"))
    monkeypatch.chdir(tmp_path)
    assert run_study(PLAN, Path("data"), "start", Path("cells"), Path("figures")) == results
    before = sorted(str(path) for path in (tmp_path / "cells").rglob("*"))
    for changed in (tmp_path / "start" / "config.json", tmp_path / "data" / "tiny" / "qrels" / "train.tsv"):
        kept = changed.read_text()
        changed.write_text(kept + "\n")
        with pytest.raises(DataError, match=r"tuned from another encoder, on other data .* choose another --out"):
            run_study(
                PLAN, Path("data"), "start", Path("cells"), Path("figures"),
                after=lambda _: pytest.fail("the page would go"),
            )  # fmt: skip
        changed.write_text(kept)
    assert sorted(str(path) for path in (tmp_path / "cells").rglob("*")) == before


def test_a_missing_data_set_is_named(tiny_encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tiny: no corpus\.jsonl there; the plan names the data sets tiny"):
        run_study(PLAN, tmp_path, str(tiny_encoder), tmp_path / "cells", tmp_path / "figures")


def test_results_are_plain_json(study: tuple[dict[str, Any], Path]) -> None:
    assert json.loads(json.dumps(study[0])) == study[0]
