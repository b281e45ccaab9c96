"""Load with a realistic mix: few queries are asked often (Zipf), some have never been asked before.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8080
    locust -f loadtest/locustfile.py --host http://127.0.0.1:8080 --headless -u 20 -r 5 -t 60s --queries queries.txt

A query of the list may be in the answer cache; a *miss* has never been asked, by no earlier test either, and must be
computed. They are reported apart.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import quote

from locust import FastHttpUser, between, events, task

BUILT_IN_QUERIES = (
    "count how often each element occurs in a list",
    "open a file and read it line by line",
    "sort a list by a key",
    "join two paths",
    "run a command and capture its output",
    "parse command line arguments",
    "read and write csv files",
    "convert an object to json",
    "download a web page",
    "make a temporary directory",
    "remember the results of a function",
    "run functions in parallel processes",
    "wait for a thread to finish",
    "the greatest common divisor of two numbers",
    "shuffle a list",
    "pick a random element",
    "the middle value of some numbers",
    "difference between two dates",
    "time zones",
    "format a date as text",
    "replace text with a regular expression",
    "split a string at commas",
    "remove whitespace around a string",
    "merge two dictionaries",
    "a dictionary with default values",
    "a queue that is safe between threads",
    "the n largest items",
    "group consecutive equal items",
    "all combinations of a list",
    "compress data",
    "hash a password",
    "encode bytes as base64",
    "walk through all files of a folder",
    "delete a folder with everything in it",
    "copy a file",
    "check whether a file exists",
    "environment variables",
    "log a message",
    "measure how long code takes",
    "a class without boilerplate",
    "exact decimal numbers",
    "find where to insert into a sorted list",
    "compare two texts line by line",
    "wrap long lines of text",
    "send an email",
    "a simple web server",
    "a database in a file",
    "inspect the arguments of a function",
    "write a test",
    "what went wrong: print the traceback",
)
WORDS = ("list", "file", "thread", "date", "number", "text", "path", "queue", "random", "socket", "table", "parse")


class Mix:
    """Draws requests; one for all users, so that the popularity of queries is one distribution.

    A seed repeats the order in which queries are drawn, not who draws them.
    """

    def __init__(self, queries: list[str], exponent: float, miss_share: float, seed: int) -> None:
        self.random = random.Random(seed)  # noqa: S311 - load to be repeated, not secrets
        self.queries = queries
        self.miss_share = miss_share
        self.cumulative = list(itertools.accumulate((rank + 1) ** -exponent for rank in range(len(queries))))
        self.numbers = itertools.count()
        self.nonce = secrets.token_hex(4)  # the seed repeats the mix, but what it asked before may be in the cache

    def draw(self) -> tuple[str, str]:
        """Return ("hit" or "miss", query); a miss is words with a number of its own in a test of its own."""
        if self.random.random() < self.miss_share:
            return "miss", " ".join([*self.random.sample(WORDS, 3), str(next(self.numbers)), self.nonce])
        return "hit", self.random.choices(self.queries, cum_weights=self.cumulative)[0]


@events.init_command_line_parser.add_listener
def add_arguments(parser: Any) -> None:
    """Add the mix's options to locust's."""
    parser.add_argument("--queries", default="", help="File of queries, one a line, the most popular first")
    parser.add_argument("--zipf", type=float, default=1.0, help="Exponent of the queries' popularity")
    parser.add_argument("--misses", type=float, default=0.2, help="Share of queries that were never asked")
    parser.add_argument("--seed", type=int, default=1, help="Seed of the mix")
    parser.add_argument("--top-k", type=int, default=10, help="Results per query")
    parser.add_argument("--beam-width", type=int, default=0, help="Width of the beam; 0 leaves it to the service")


@events.init.add_listener
@events.test_start.add_listener
def make_mix(environment: Any, **_: Any) -> None:
    """Read the queries once, before any user starts; and for every test anew, since its page may change the options.

    Where they cannot be read, every request of the test says so: locust would go on with those of the last one.
    """
    options = environment.parsed_options
    environment.mix = None
    queries = list(BUILT_IN_QUERIES)
    if options.queries:
        lines = Path(options.queries).read_text("utf-8").splitlines()
        queries = [line.strip() for line in lines if line.strip()]
    if not queries:
        raise ValueError(f"{options.queries} holds no queries: write one a line")
    environment.mix = Mix(queries, options.zipf, options.misses, options.seed)


class Searcher(FastHttpUser):
    """Someone who searches, reads a moment, now and then opens a document, and rarely asks several things at once."""

    wait_time = between(0.1, 1.0)

    @task(20)
    def search(self) -> None:
        """One query; a 503 with Retry-After is the service protecting itself, reported as such."""
        kind, query = self._mix().draw()
        answer = self._ask({"query": query}, f"search ({kind})")
        if answer and answer["results"] and random.random() < 0.1:  # noqa: S311 - as above
            self.open_document(answer["results"][0]["id"])

    @task(1)
    def batch(self) -> None:
        """Eight queries in one request."""
        self._ask({"queries": [self._mix().draw()[1] for _ in range(8)]}, "search (batch of 8)")

    def open_document(self, document_id: str) -> None:
        """Read one of the results."""
        self.client.get(f"/v1/documents/{quote(document_id)}", name="document")

    def _mix(self) -> Mix:
        mix: Mix | None = self.environment.mix
        if mix is None:
            raise ValueError(f"no queries to ask: {self.environment.parsed_options.queries} could not be read")
        return mix

    def _ask(self, question: dict[str, Any], name: str) -> dict[str, Any] | None:
        options = self.environment.parsed_options
        body = {"top_k": options.top_k} | question
        if options.beam_width:
            body["beam_width"] = options.beam_width
        with self.client.post("/v1/search", json=body, name=name, catch_response=True) as response:
            if response.status_code != 200:
                response.failure(reason(response.status_code, response.text))
                return None
            answer = response.json()
            if not ("results" in answer or all(each["results"] for each in answer["answers"])):
                response.failure("200: not an answer")
                return None
            return answer if "results" in answer else None


def reason(status: int, text: str | None) -> str:
    """Say what the service says of a refusal, without its numbers, so that locust counts equal ones together."""
    try:
        detail = str(json.loads(text or "")["detail"])
    except (ValueError, KeyError, TypeError):
        detail = "no answer" if not text else "not an answer"
    return f"{status}: {re.sub(r'[0-9][0-9.,]*', 'N', detail)}"
