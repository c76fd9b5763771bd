"""An HTML page that shows queries beside their best answers: one file, pictures inside, no server and no network.

Cards are built in the browser, one screen at a time, so that a thousand queries open as fast as ten.
"""

import base64
import html
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cad_models.task import Answer

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #2f6fdb; }
* { box-sizing: border-box; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1200px; padding: 1rem; }
h1 { font-size: 1.3rem; margin: 0 0 .25rem; }
header p { margin: .15rem 0; opacity: .75; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; padding: .75rem 0; position: sticky; top: 0; background: Canvas; z-index: 1; }
nav input, nav select, nav button { font: inherit; padding: .35rem .6rem; border: 1px solid var(--line); border-radius: 6px; background: Canvas; color: inherit; }
nav input { flex: 1 1 12rem; min-width: 8rem; }
nav button:disabled { opacity: .4; }
.card { display: flex; flex-wrap: wrap; gap: .75rem; border: 1px solid var(--line); border-radius: 10px; padding: .75rem; margin-bottom: .75rem; }
.query { border-right: 1px solid var(--line); padding-right: .75rem; }
figure { margin: 0; width: 136px; }
figure div { width: 136px; height: 136px; background: #fff; border: 1px solid var(--line); border-radius: 6px; display: grid; place-items: center;
  color: #777; font-size: .8rem; }
img { max-width: 128px; max-height: 128px; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; margin-top: .25rem; }
.labels { flex: 1 1 16rem; min-width: 12rem; align-self: center; }
.labels p { margin: .2rem 0 0; overflow-wrap: anywhere; }
.labels p:first-child { font-weight: 600; font-size: 1.05rem; }
.bar { height: 4px; border-radius: 2px; background: var(--soft); margin-top: .25rem; }
.bar span { display: block; height: 100%; border-radius: 2px; background: var(--accent); }
@media (max-width: 560px) { .query { border-right: 0; padding-right: 0; flex-basis: 100%; } figure, figure div { width: 104px; } figure div { height: 104px; }
  img { max-width: 96px; max-height: 96px; } }
"""

_SCRIPT = """
const data = JSON.parse(document.getElementById("data").textContent);
const pageSize = 20, $ = id => document.getElementById(id);
let page = 0;
function element(tag, parent, text, name) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (name) node.className = name;
  parent.append(node);
  return node;
}
function figure(parent, id, picture, note, share) {
  const node = element("figure", parent), frame = element("div", node);
  if (data.pictures[picture]) {
    const image = element("img", frame);
    image.loading = "lazy"; image.alt = id; image.src = "data:image/jpeg;base64," + data.pictures[picture];
  } else frame.textContent = "no picture";
  element("figcaption", node, note ? note + " " + id : id);
  if (share !== undefined) element("span", element("div", node, undefined, "bar")).style.width = 100 * Math.max(0, Math.min(1, share)) + "%";
  return node;
}
function show() {
  const wanted = $("find").value.toLowerCase(), cards = data.cards.filter(card => card.direction === $("direction").value &&
    (!wanted || card.query.toLowerCase().includes(wanted) || card.answers.some(a => a[0].toLowerCase().includes(wanted))));
  const last = Math.max(0, Math.ceil(cards.length / pageSize) - 1);
  page = Math.max(0, Math.min(page, last));
  $("cards").replaceChildren();
  for (const card of cards.slice(page * pageSize, (page + 1) * pageSize)) {
    const node = element("section", $("cards"), undefined, "card");
    const query = element("div", node, undefined, "query");
    figure(query, card.query, card.picture);
    if (card.labels) {
      const labels = element("div", node, undefined, "labels");
      for (const [id, score] of card.answers) {
        element("p", labels, id + " (" + score.toFixed(3) + ")");
        element("span", element("div", labels, undefined, "bar")).style.width = 100 * Math.max(0, Math.min(1, score)) + "%";
      }
    } else card.answers.forEach(([id, score, picture], i) => figure(node, id, picture, (i + 1) + ". (" + score.toFixed(3) + ")", score));
  }
  if (!cards.length) element("p", $("cards"), "Nothing matches.");
  $("where").textContent = cards.length ? (page * pageSize + 1) + "–" + Math.min(cards.length, (page + 1) * pageSize) + " of " + cards.length : "0";
  $("back").disabled = page === 0; $("next").disabled = page === last;
}
for (const name of [...new Set(data.cards.map(card => card.direction))]) {
  const option = element("option", $("direction"), name.replaceAll("_", " "));
  option.value = name;
}
$("direction").hidden = $("direction").length < 2;
$("direction").onchange = $("find").oninput = () => { page = 0; show(); };
$("back").onclick = () => { page--; show(); scrollTo(0, 0); };
$("next").onclick = () => { page++; show(); scrollTo(0, 0); };
show();
"""


def answers_page(
    answers: Sequence[Answer],
    pictures: Mapping[tuple[str, str, str], bytes],
    *,
    title: str,
    notes: Sequence[str] = (),
    labels: Collection[str] = (),
    max_queries: int = 1_000,
) -> str:
    """The page as HTML; the same arguments give the same text.

    Args:
        pictures: JPEG bytes by (direction, ``query`` or ``answer``, id); things without one are shown by name.
        notes: Lines below the title.
        labels: Directions whose answers are names of classes, not files: shown as a list.
        max_queries: Queries of each direction that are shown; a note tells when there are more.
    """
    cards: dict[tuple[str, str], dict[str, Any]] = {}
    left_out: dict[str, set[str]] = {}
    counts: dict[str, int] = {}
    numbers: dict[bytes, int] = {}
    encoded: list[str] = []

    def picture(*key: str) -> int:
        data = pictures.get(key, b"")
        if not data:
            return -1
        if data not in numbers:
            numbers[data] = len(encoded)
            encoded.append(base64.b64encode(data).decode())
        return numbers[data]

    for answer in answers:
        key = (answer.direction, answer.query)
        if key not in cards:
            if counts.get(answer.direction, 0) >= max_queries:
                left_out.setdefault(answer.direction, set()).add(answer.query)
                continue
            counts[answer.direction] = counts.get(answer.direction, 0) + 1
            cards[key] = {
                "direction": answer.direction,
                "query": answer.query,
                "picture": picture(answer.direction, "query", answer.query),
                "labels": answer.direction in labels,
                "answers": [],
            }
        cards[key]["answers"].append([answer.answer, round(answer.score, 6), picture(answer.direction, "answer", answer.answer)])
    told = [*notes, *(f"{name}: {len(ids):,} further queries are in the table only" for name, ids in sorted(left_out.items()))]
    # "<" as an escape: no text of the data can end the script element.
    data = json.dumps({"cards": list(cards.values()), "pictures": encoded}, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    lines = "".join(f"<p>{html.escape(note)}</p>" for note in told)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>\n<header><h1>{html.escape(title)}</h1>{lines}</header>\n"
        '<nav><select id="direction" aria-label="direction"></select><input id="find" type="search" placeholder="Find a query or an answer">'
        '<button id="back">Back</button><span id="where"></span><button id="next">Next</button></nav>\n'
        "<noscript><p>This page needs JavaScript; the same answers are in the CSV and Parquet files beside it.</p></noscript>\n"
        f'<main id="cards"></main>\n<script type="application/json" id="data">{data}</script>\n<script>{_SCRIPT}</script></body></html>\n'
    )
