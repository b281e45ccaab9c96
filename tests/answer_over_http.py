"""Index, serve and ask every model that a quick study trained: python -m tests.answer_over_http OUT."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx

from models.quantizers.report import load_sids
from service.index.build import build_bundle
from service.index.bundle import open_bundle
from service.index.corpus import read_corpus
from service.search.pipeline import Pipeline
from tests.service.http.fakes import running

ASKED = "the value of an expression"


def main(out: Path) -> None:
    """Ask all models of a study with every scoring that they offer."""
    models = sorted(out.glob("cells/*/*/*/run/model"))
    assert models, f"{out} holds no model: run a quick study into it first"
    corpus = list(read_corpus(out / "quick" / "data" / "topics" / "corpus.jsonl"))
    for number, model in enumerate(models):
        folder = out / "asked" / str(number)
        build_bundle(model, corpus, folder, progress=False)
        sids = load_sids(folder)
        codes = dict(zip(sids.ids or [], sids.codes.tolist(), strict=True))
        with running(Pipeline(open_bundle(folder), 1)) as (url, _, _):
            info = httpx.get(f"{url}/info", timeout=60).json()
            for scoring in info["scorings"]:
                check_answer(url, scoring, codes)
        print(f"{info['recipe']} answers: {', '.join(info['scorings'])}")


def check_answer(url: str, scoring: str, codes: dict[str, list[int]]) -> None:
    """Ask for five documents: all are stored, with the semantic IDs that the index gave them."""
    body = {"query": ASKED, "top_k": 5, "scoring": scoring, "include": ["codes"]}
    answer = httpx.post(f"{url}/v1/search", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    results = answer.json()["results"]
    assert len(results) == 5, results
    for result in results:
        assert [c for c in result["codes"] if c >= 0] == [c for c in codes[result["id"]] if c >= 0], result
    stored = httpx.get(f"{url}/v1/documents/{results[0]['id']}", timeout=60)
    assert stored.json()["text"], stored.text


if __name__ == "__main__":
    main(Path(sys.argv[1]))
