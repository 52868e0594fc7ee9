"use strict";
// All text that is shown is set as text, never as markup.
const $ = (id) => document.getElementById(id);
let control = null;

function span(parent, className, text) {
  const made = document.createElement("span");
  made.className = className;
  made.textContent = text;
  parent.append(made);
  return made;
}

// Draws one side: frames as they come, and any of them again by its slider.
class Panel {
  constructor(id) {
    this.root = $(id);
    this.status = this.root.querySelector(".status");
    this.text = this.root.querySelector(".text");
    this.slider = this.root.querySelector(".frames");
    this.slider.addEventListener("input", () => this.draw(Number(this.slider.value)));
    this.frames = [];
    this.timer = 0;
  }

  begin(title, before, after) {
    clearInterval(this.timer);
    Object.assign(this, { frames: [], before, after, shown: -1, summary: "" });
    this.root.querySelector("h2").textContent = title;
    this.slider.hidden = true;
    this.say("Waiting for the first pass …");
    this.text.replaceChildren();
    span(this.text, "around", before + after);
    const pace = Number($("pace").value);
    this.playing = true;
    this.timer = setInterval(() => this.play(), pace || 16);
    this.jump = pace === 0;
  }

  say(text, isError) {
    this.status.textContent = text;
    this.status.classList.toggle("error", Boolean(isError));
  }

  // Shows the next frame, or the newest where frames are not slowed down.
  play() {
    const last = this.frames.length - 1;
    if (this.shown < last) this.draw(this.jump ? last : this.shown + 1);
    else if (!this.playing) this.stop();
  }

  stop() {
    clearInterval(this.timer);
    if (this.summary) this.say(this.summary);
    this.root.dataset.done = "1";
  }

  draw(index) {
    const { text, facts } = this.frames[index], rows = document.createDocumentFragment();
    this.shown = index;
    span(rows, "around", this.before);
    const characters = [...text];
    let at = 0;
    if (!facts) span(rows, "token plain", text);
    else facts.lengths.forEach((length, i) => {
      const open = facts.open[i], piece = characters.slice(at, at + length).join("");
      const made = span(rows, open ? "open" : "token", piece);
      made.classList.toggle("line", piece.includes("\n"));
      made.style.setProperty("--p", facts.p[i]);
      made.title = `probability ${facts.p[i].toFixed(3)}${open ? ", masked" : ""}`;
      at += length;
    });
    span(rows, "around", this.after);
    this.text.replaceChildren(rows);
    this.root.dataset.frame = index;
    this.slider.max = this.frames.length - 1;
    this.slider.value = index;
    this.slider.hidden = this.frames.length < 2;
    if (facts) {
      const left = facts.open.reduce((sum, open) => sum + open, 0);
      const masked = left ? `, ${left} of them still masked` : "";
      this.say(`Pass ${facts.pass}: ${facts.open.length} tokens${masked}`);
    }
  }

  take(chunk) {
    const choice = chunk.choices[0];
    if (chunk.diffusion) this.frames.push({ text: choice.text, facts: chunk.diffusion });
    if (!choice.finish_reason) return;
    const last = this.frames[this.frames.length - 1];
    if (!last || last.text !== choice.text) this.frames.push({ text: choice.text, facts: null });
    this.root.dataset.text = choice.text;
    const { decoding, timings } = choice, parts = [];
    parts.push(`${timings.predicted_n} tokens in ${timings.predicted_ms.toFixed(0)} ms`);
    parts.push(`${timings.predicted_per_second.toFixed(0)} tokens/s`, `${decoding.passes} passes`);
    if (decoding.hole) parts.push(`length ${decoding.hole.length} chosen`);
    if (decoding.fell_back === "ar") parts.push("poor, so redone by ar");
    if (decoding.fell_back === "passes") parts.push("poor, so redone with more passes");
    this.summary = parts.join(" · ");
  }
}

// Reads server-sent events of a response (EventSource cannot POST).
async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
    }
  }
}

function headers() {
  const found = { "Content-Type": "application/json" };
  if ($("key").value) found.Authorization = `Bearer ${$("key").value}`;
  return found;
}

async function decode(panel, body, signal) {
  try {
    const wish = { ...body, stream: true, diffusing: true };
    const response = await fetch("v1/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(wish), signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of chunks(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      panel.take(chunk);
    }
    panel.playing = false;
  } catch (error) {
    clearInterval(panel.timer);
    panel.say(error.name === "AbortError" ? "Cancelled." : error.message, error.name !== "AbortError");
    panel.root.dataset.done = "1";
  }
}

function request() {
  const number = (id) => Number($(id).value), mode = $("mode").value;
  const after = $("suffix").value, reads = !["ar", "speculative"].includes(mode);
  const body = { prompt: $("prompt").value, max_tokens: number("tokens"), mode,
    temperature: number("temperature"), seed: number("seed") };
  if (reads) Object.assign(body, { steps: number("steps") });
  if (reads && after) {
    Object.assign(body, { suffix: after }, $("hole").value === "fixed" && { hole: number("tokens") });
  }
  return body;
}

async function run() {
  control = new AbortController();
  $("run").disabled = true;
  $("cancel").disabled = false;
  const body = request(), jobs = [], panels = [[left, body.mode, body]];
  const { prompt, max_tokens, temperature, seed } = body;
  const causal = { prompt, max_tokens, temperature, seed, mode: "ar" };
  if ($("compare").checked) panels.push([right, "ar, left to right", causal]);
  for (const [panel, title, wish] of panels) {
    delete panel.root.dataset.done;
    delete panel.root.dataset.text;
    const reads = "suffix" in wish || !$("suffix").value;
    panel.begin(reads ? title : `${title} (reads no text after)`, prompt, $("suffix").value);
    jobs.push(decode(panel, wish, control.signal));
  }
  await Promise.all(jobs);
  $("run").disabled = false;
  $("cancel").disabled = true;
}

async function describe() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    const found = await response.json();
    if (!response.ok) throw new Error(found.error.message);
    const { id, meta } = found.data[0];
    const denoiser = meta.denoiser ? "" : ", without a denoiser: use mode ar";
    $("model").textContent = `${id}, context of ${meta.n_ctx_train} tokens${denoiser}`;
  } catch (error) {
    $("model").textContent = error.message;
  }
}

const left = new Panel("left"), right = new Panel("right");
$("form").addEventListener("submit", (event) => { event.preventDefault(); run(); });
$("cancel").addEventListener("click", () => control && control.abort());
$("key").addEventListener("change", describe);
$("compare").addEventListener("change", () => { $("right").hidden = !$("compare").checked; });
describe();
