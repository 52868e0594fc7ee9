"""Passes of one decoding, kept by a `Film`, and a page without outside resources that plays them in
a browser.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

SPACE_MARK = "\u2581"  # a space, inside a piece


class Cell(NamedTuple):
    """One token of the span after a pass."""

    token: int  # -1: nothing was guessed yet
    p: float  # its probability when it was chosen
    open: bool  # masked; the token is a guess
    at: int  # the pass that chose it; 0: it stood there before


class Unit(NamedTuple):
    """What is shown as one: a token, or the byte tokens of one character."""

    text: str
    label: str  # names of its tokens
    p: float
    open: bool
    at: int


def character(raw: bytes) -> tuple[str, int]:
    """Return the first character and its number of bytes; bytes that make none are one replacement
    mark.
    """
    text = raw.decode(errors="replace")
    sizes = (n for n in range(1, len(raw) + 1) if raw[:n].decode(errors="replace") == text[0])
    return text[0], next(n for n in sizes if raw[n:].decode(errors="replace") == text[1:])


def join(tokenizer: Any, cells: Sequence[Cell]) -> list[Unit]:
    """Spell tokens; the byte tokens of one character, named <0x00> to <0xFF>, become one unit."""
    names = [tokenizer.id_to_piece(cell.token) if cell.token >= 0 else "" for cell in cells]
    is_byte = [not cell.open and tokenizer.is_byte(cell.token) for cell in cells]
    units, i = list[Unit](), 0
    while i < len(cells):
        run = itertools.takewhile(
            is_byte.__getitem__, range(i, min(i + 4, len(cells)))
        )  # no character has more bytes
        raw = bytes(int(names[j][1:-1], 16) for j in run)
        text, size = character(raw) if raw else (names[i].replace(SPACE_MARK, " "), 1)
        own, label = cells[i : i + size], " ".join(names[i : i + size])
        units.append(
            Unit(
                text, label, min(cell.p for cell in own), own[0].open, max(cell.at for cell in own)
            )
        )
        i += size
    return units


def spell(tokenizer: Any, tokens: Iterable[int]) -> str:
    """Text of tokens in the middle of a text: unlike `decode` it keeps a leading space."""
    return "".join(
        unit.text for unit in join(tokenizer, [Cell(token, 1.0, False, 0) for token in tokens])
    )


class Film:
    """Keeps every pass over a span (the first row's); `decode` calls it. Its own time is kept
    apart.
    """

    def __init__(
        self, start: int, cells: Sequence[Cell], draw: Callable[[str, Sequence[Cell]], None] | None
    ) -> None:
        self.start = start
        self.cells = list(cells)
        self.draw = draw
        self.frames = list[tuple[str, list[Cell]]]()
        self.passes = 0
        self.seconds = 0.0

    def add(self, name: str) -> None:
        self.frames.append((name, list(self.cells)))
        if self.draw:
            self.draw(name, self.cells)

    def put(self, name: str, tokens: Sequence[int], nats: Sequence[float]) -> None:
        """Add tokens that no pass over the span has chosen; there may be more nats than tokens."""
        self.cells = [
            Cell(token, math.exp(-n), False, 0) for token, n in zip(tokens, nats, strict=False)
        ]
        self.add(name)

    def __call__(self, *seen: Any) -> None:
        """Take in positions, tokens, log-probabilities and what is still open after a pass: tensors
        (B, n).
        """
        began = time.perf_counter()
        self.passes += 1
        for place, token, log_p, still_open in zip(*(x[0].tolist() for x in seen), strict=True):
            if (
                0 <= (i := place - self.start) < len(self.cells)
            ):  # windows show text around the span too
                was = self.cells[i]
                if (
                    still_open or was.open or was.token != token
                ):  # else it stood, and its probability with it
                    self.cells[i] = Cell(token, math.exp(log_p), still_open, self.passes)
        self.add(f"pass {self.passes}")
        self.seconds += time.perf_counter() - began

    def reel(self, tokenizer: Any, count: int, **about: str) -> dict[str, Any]:
        """Return what the page needs of the first `count` tokens, each unit once; about: title,
        note, before, after.
        """
        index, frames = dict[Unit, int](), []
        for name, cells in self.frames:
            units = [unit._replace(p=round(unit.p, 4)) for unit in join(tokenizer, cells[:count])]
            frames.append([name, [index.setdefault(unit, len(index)) for unit in units]])
        return {**about, "units": list(index), "frames": frames}


def page(reels: Sequence[dict[str, Any]]) -> str:
    """Return the page that plays reels. Their text is JSON in which no tag can end."""
    return PAGE.replace("@DATA@", json.dumps(reels, separators=(",", ":")).replace("<", "\\u003c"))


PAGE = r"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'unsafe-inline'"><title>Decoding, pass by pass</title>
<style>:root { color-scheme: light dark; --ground: #fbfbf9; --ink: #1c1c1a; --faint: #62625d; --line: #d5d5cf;
  --block: #b9b9b3; --s: 75%; --l: 80% }
@media (prefers-color-scheme: dark) { :root { --ground: #17181a; --ink: #ecebe6; --faint: #a2a29b; --line: #3b3c40;
  --block: #5b5c61; --s: 60%; --l: 25% } }
body { margin: auto; max-width: 60rem; padding: 1rem; background: var(--ground); color: var(--ink) }
body, button, select { font: 1rem/1.5 system-ui, sans-serif } h1 { font-size: 1.2rem; margin: 0 }
#note, .legend { color: var(--faint); font-size: .9rem; margin: .2rem 0 .8rem }
.bar { position: sticky; top: 0; background: var(--ground); padding: .4rem 0; display: flex; flex-wrap: wrap;
  gap: .4rem; align-items: center; border-bottom: 1px solid var(--line) }
button, select { padding: .4rem .7rem; color: inherit; background: none; border: 1px solid var(--line) }
button:disabled { opacity: .4 } #slider { flex: 1 1 9rem; min-width: 6rem } #counter { flex: 1 0 100% }
#text { font: .95rem/1.75 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  tab-size: 4; margin: 1rem 0 }
.token { background: hsl(calc(var(--p) * 120) var(--s) var(--l)); padding: .08rem 0 }
.now { box-shadow: inset 0 -.16rem var(--ink) } .mark { opacity: .5; user-select: none }
.open { background: repeating-linear-gradient(45deg, var(--block) 0 .2rem, transparent .2rem .4rem); margin: 0 .06rem }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; border-top: 1px solid var(--line); padding-top: .6rem }
.scale { display: inline-block; width: 6rem; height: .8rem; background: linear-gradient(90deg,
  hsl(0 var(--s) var(--l)), hsl(60 var(--s) var(--l)), hsl(120 var(--s) var(--l))) }
#tip { position: fixed; max-width: 18rem; padding: .3rem .6rem; background: var(--ink); color: var(--ground);
  font-size: .85rem; white-space: pre-line; overflow-wrap: anywhere; pointer-events: none }
</style></head><body><main><h1 id="title"></h1><p id="note"></p>
<div class="bar" role="group" aria-label="Playback"><button id="play" type="button"></button>
<button id="back" type="button" aria-label="One pass back">◀|</button>
<button id="forward" type="button" aria-label="One pass forward">|▶</button>
<input id="slider" type="range" min="0" aria-label="Pass">
<select id="speed" aria-label="Speed"><option value="0.5">&frac12;&times;<option value="1" selected>1&times;
<option value="2">2&times;<option value="4">4&times;<option value="10">10&times;</select>
<select id="which" aria-label="Decoding"></select><output id="counter" for="slider"></output></div>
<div id="text" role="region" aria-label="Text after this pass"></div>
<div class="legend"><span>confidence 0 <i class="scale"></i> 1</span><span><i class="open">&emsp;</i> masked</span>
<span><span class="now">chosen</span> in this pass</span><span>no colour: prompt and suffix</span>
<span>keys: space, ← →, Home, End; hover or tap a token</span></div></main><div id="tip" role="tooltip" hidden></div>
<script type="application/json" id="data">@DATA@</script><script>
const $ = (id) => document.getElementById(id), films = JSON.parse($("data").textContent);
const box = (parent, className, textContent) =>
  parent.appendChild(Object.assign(document.createElement("span"), { className, textContent }));
let film = films[0], frame = 0, timer = 0;
const write = (parent, text) => text.split(/(\n|\t)/).forEach((part) => {  // line ends and tabs stay, behind a mark
  if (part === "\n" || part === "\t") box(parent, "mark", part === "\n" ? "↵" : "⇥").ariaHidden = "true";
  parent.append(part);
});
function describe([text, label, p, open, at]) {
  const when = open ? "masked; guess of pass " + at : at ? "committed at pass " + at : "no pass chose it";
  const lines = [JSON.stringify(text), "token " + label, "probability " + p.toFixed(3), when];
  return label ? lines.join("\n") : "masked, nothing guessed yet";
}
function go(to) {
  const last = film.frames.length - 1, rows = document.createDocumentFragment();
  frame = Math.min(Math.max(to, 0), last);
  const [name, indices] = film.frames[frame], units = indices.map((i) => film.units[i]);
  rows.append(film.before);
  for (const unit of units) {
    const [piece, , p, open, at] = unit, now = at && name === "pass " + at ? " now" : "";
    const made = box(rows, open ? "open" : "token" + now, open ? "\u2003" : "");
    made.style.setProperty("--p", p); made.dataset.tip = describe(unit);
    if (open) Object.assign(made, { role: "img", ariaLabel: "masked" }); else write(made, piece);
  }
  rows.append(film.after);
  $("text").replaceChildren(rows); $("tip").hidden = true;
  $("counter").value = `${name} (${frame} of ${last}) · ${units.filter((u) => u[3]).length} of ${units.length} open`;
  $("slider").max = last; $("slider").value = frame; $("slider").ariaValueText = $("counter").value;
  $("back").disabled = frame === 0; $("forward").disabled = frame === last;
}
function play(on) {
  const end = () => frame === film.frames.length - 1; clearInterval(timer);
  if (on && end()) go(0);
  timer = on && setInterval(() => { go(frame + 1); if (end()) play(false); }, 700 / $("speed").value);
  $("play").textContent = on ? "❚❚" : "▶"; $("play").ariaLabel = on ? "Pause" : "Play";
  $("counter").ariaLive = on ? "off" : "polite";  // a reader is not to speak every pass while it plays
}
const choose = (index) => { film = films[index]; $("title").textContent = film.title;
  $("note").textContent = film.note; play(false); go(0); };
const jump = (to) => { play(false); go(to); }, keys = { " ": () => play(!timer), Home: () => jump(0),
  End: () => jump(Infinity), ArrowLeft: () => jump(frame - 1), ArrowRight: () => jump(frame + 1) };
$("play").onclick = keys[" "]; $("back").onclick = keys.ArrowLeft; $("forward").onclick = keys.ArrowRight;
$("slider").oninput = (event) => jump(Number(event.target.value));
$("speed").onchange = () => play(Boolean(timer)); $("which").onchange = (event) => choose(event.target.value);
document.onkeydown = (event) => {
  const { key, target } = event;  // selects use arrows, and buttons space, themselves
  if (!keys[key] || event.ctrlKey || event.altKey || event.metaKey || target.tagName === "SELECT") return;
  if (key !== " " || target.tagName !== "BUTTON") { event.preventDefault(); keys[key](); }
};
document.onpointerover = (event) => {
  const token = event.target.closest("[data-tip]"), tip = $("tip");
  tip.hidden = !token; if (token) tip.textContent = token.dataset.tip; else return;
  const at = token.getClientRects()[0], { offsetWidth: width, offsetHeight: height } = tip;
  tip.style.left = Math.max(4, Math.min(at.left, document.documentElement.clientWidth - width - 8)) + "px";
  tip.style.top = (at.bottom + height + 6 < innerHeight ? at.bottom + 6 : at.top - height - 6) + "px";
};
$("which").append(...films.map((each, index) => new Option(each.title, index)));
$("which").hidden = films.length < 2; choose(0);
if (!matchMedia("(prefers-reduced-motion: reduce)").matches) play(true);
</script></body></html>"""
