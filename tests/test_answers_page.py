"""The results page: its data, its limits, and that nothing in a file's name can break out of it."""

import base64
import json
import re
from html.parser import HTMLParser

from cad_models.answers_page import answers_page
from cad_models.task import Answer


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def answers(num_queries: int, direction: str = "image_to_mesh") -> list[Answer]:
    return [
        Answer(direction=direction, query=f"q{i}", rank=rank, answer=f"a{rank}", score=1 / rank) for i in range(num_queries) for rank in (1, 2)
    ]


def test_answers_page_cards_hold_queries_answers_and_pictures():
    pictures = {("image_to_mesh", "query", "q0"): b"one", ("image_to_mesh", "answer", "a1"): b"two"}
    data = data_of(answers_page(answers(2), pictures, title="t"))
    assert [base64.b64decode(p) for p in data["pictures"]] == [b"one", b"two"]
    first, second = data["cards"]
    assert (first["query"], first["picture"], second["picture"]) == ("q0", 0, -1)
    assert first["answers"] == [["a1", 1.0, 1], ["a2", 0.5, -1]]


def test_answers_page_labels_are_told_from_files():
    data = data_of(answers_page([*answers(1, "image_to_label"), *answers(1)], {}, title="t", labels=["image_to_label"]))
    assert [(card["direction"], card["labels"]) for card in data["cards"]] == [("image_to_label", True), ("image_to_mesh", False)]


def test_answers_page_hostile_names_stay_text():
    evil = "</script><script>alert(1)</script><!--"
    page = answers_page([Answer(direction="d", query=evil, rank=1, answer=evil, score=0.5)], {}, title=evil, notes=[evil])

    class Scripts(HTMLParser):
        count = 0

        def handle_starttag(self, tag, attrs):
            self.count += tag == "script"

    parser = Scripts()
    parser.feed(page)
    assert parser.count == 2
    assert data_of(page)["cards"][0]["query"] == evil


def test_answers_page_more_queries_than_fit_are_told():
    page = answers_page([*answers(5), *answers(2, "mesh_to_image")], {}, title="t", max_queries=3)
    cards = data_of(page)["cards"]
    assert [card["direction"] for card in cards] == ["image_to_mesh"] * 3 + ["mesh_to_image"] * 2
    assert "image_to_mesh: 2 further queries are in the table only" in page


def test_answers_page_loads_nothing_from_anywhere():
    page = answers_page(answers(1), {}, title="t")
    assert not re.search(r"(src|href)=", page)
    assert "http" not in page
