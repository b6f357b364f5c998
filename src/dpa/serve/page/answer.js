// One answer's card: it streams text in, counts words, shows scores, and says kindly what went wrong.
// What a model wrote is only ever put into text nodes, and is laid out once a frame, however fast it comes.

import { $, button, copy, make, plural } from "./dom.js";
import { Refusal, streamAnswer } from "./stream.js";
import { WordCount } from "./words.js";

const PIECE = 4000; // characters of a text node: the browser shapes again only the one that grows

export class Answer {
  #stop = null;
  #clock = null;
  #pending = "";
  #frame = 0;

  // `label`: the card's heading; `changed(card, how)` is called when it is asked, when its first words are there
  // ("asked", "begun") and when it has ended, well or badly.
  constructor(label, names, changed, id = "") {
    this.card = $("answer-card").content.firstElementChild.cloneNode(true);
    this.names = names;
    this.changed = changed;
    this.part = (selector) => this.card.querySelector(selector);
    if (id) this.card.id = id;
    this.label(label);
    this.retry = () => {};
    this.part(".trouble button").addEventListener("click", () => this.retry());
    this.part(".copy").addEventListener("click", () => copy(this.text, this.part(".copy")));
    this.clear();
  }

  get running() {
    return this.#stop !== null;
  }

  label(text) {
    this.title = text;
    this.part("h3").textContent = text;
    this.card.setAttribute("aria-label", text);
    this.part(".text").setAttribute("aria-label", `${text}: the answer`);
    this.part(".copy").setAttribute("aria-label", `Copy: ${text}`);
  }

  clear() {
    this.asked = null; // the body this card answers
    this.direction = null;
    this.done = false;
    this.text = "";
    this.words = null;
    this.scores = null;
    this.#pending = "";
    this.counter = new WordCount();
    this.part(".text").replaceChildren();
    this.part(".told").textContent = "";
    this.part(".copy").hidden = true;
    this.card.classList.remove("earlier");
    this.#footer("");
    this.#trouble(null);
    this.say("");
  }

  say(state) {
    this.part(".state").textContent = state;
  }

  // Ask for `body` (streamed); resolves to "done", "stopped" or "failed". `key()` is the key of the moment: whoever tries
  // again may have typed another one.
  async run(body, key) {
    this.stop();
    const stop = new AbortController();
    this.#stop = stop;
    this.clear();
    this.asked = JSON.stringify(body);
    this.direction = body.dpa ?? null;
    this.retry = () => this.run(body, key);
    this.card.setAttribute("aria-busy", "true");
    this.say("waiting");
    this.changed(this, "asked");
    try {
      const { finish, dpa } = await streamAnswer({ ...body, stream: true }, key(), stop.signal, {
        onText: (piece) => {
          if (this.#stop !== stop) return;
          this.#pending += piece;
          this.#frame ||= requestAnimationFrame(() => this.#write());
        },
        onDirection: (dpa) => {
          if (this.#stop === stop) this.part(".told").textContent = told(dpa);
        },
      });
      if (this.#stop !== stop) return "stopped";
      this.#write();
      this.words = dpa?.words ?? this.counter.count;
      this.scores = dpa?.scores ?? null;
      this.done = true;
      this.#footer(plural(this.words, "word"));
      this.say(finish === "length" ? "cut at the longest allowed" : this.text ? "" : "it said nothing");
      return this.#end(stop, "done");
    } catch (error) {
      if (this.#stop !== stop) return "stopped";
      this.#write();
      if (error.name === "AbortError") {
        this.say("stopped");
        return this.#end(stop, "stopped");
      }
      if (!(error instanceof Refusal)) console.error(error);
      this.say(this.text ? "broken off" : "no answer");
      this.#trouble(error instanceof Refusal ? error : new Refusal("The answer could not be read.", 0));
      return this.#end(stop, "failed");
    }
  }

  stop() {
    this.#stop?.abort();
  }

  // What came since the last frame; nothing is measured here, so the browser lays out once.
  #write() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const piece = this.#pending;
    if (!piece) return;
    this.#pending = "";
    const first = !this.text;
    this.text += piece;
    const last = this.part(".text").lastChild;
    if (last && last.length < PIECE) last.appendData(piece);
    else this.part(".text").append(document.createTextNode(piece));
    this.words = this.counter.add(piece);
    this.#footer(plural(this.words, "word"));
    if (!first) return;
    this.say("writing");
    this.changed(this, "begun");
  }

  // --- as it was kept, and as it is to be kept ---

  record() {
    this.#write();
    const { title: label, direction, text, words, scores } = this;
    const state = this.running ? "stopped" : this.part(".state").textContent;
    return { label, direction, told: this.part(".told").textContent, text, words: words ?? 0, scores, state };
  }

  restore(record) {
    this.clear();
    this.text = record.text;
    this.direction = record.direction;
    this.words = record.words;
    this.scores = record.scores;
    this.done = Boolean(record.text);
    this.part(".text").replaceChildren(document.createTextNode(record.text));
    this.part(".told").textContent = record.told;
    this.part(".copy").hidden = !record.text;
    this.#footer(record.text ? plural(record.words, "word") : "");
    this.say(record.state);
  }

  // --- beside others ---

  // Bars of the scores, 0 to 100 unless a score lies beyond, on a range the cards share.
  showScores(range) {
    this.part(".scores").replaceChildren(...scoresOf(this.scores, this.names, range));
  }

  showDifference(other, named) {
    if (!this.done || !other.done) return;
    const more = this.words - other.words;
    const difference = more === 0 ? `as many as ${named}` : `${Math.abs(more)} ${more > 0 ? "more" : "fewer"} than ${named}`;
    this.#footer(`${plural(this.words, "word")}, ${difference}`);
  }

  // Runs of text, of which some are marked, as `tag`; null takes the marks away.
  mark(runs, tag) {
    const box = this.part(".text");
    if (!runs && !box.firstElementChild) return;
    box.replaceChildren(
      ...(runs ?? [[this.text, false]]).map(([text, only]) => (only ? make(tag, { textContent: text }) : document.createTextNode(text))),
    );
  }

  #footer(count) {
    this.part(".count").textContent = count;
    if (!this.scores) this.part(".scores").replaceChildren();
  }

  #end(stop, how) {
    if (this.#stop === stop) this.#stop = null;
    this.card.removeAttribute("aria-busy");
    this.part(".copy").hidden = !this.text;
    this.changed(this, how);
    return how;
  }

  #trouble(refusal) {
    clearInterval(this.#clock);
    const [box, text, again] = [this.part(".trouble"), this.part(".trouble p"), this.part(".trouble button")];
    // Whoever pressed it does not lose the focus.
    if (!refusal && document.activeElement === again) this.part(".text").focus({ preventScroll: true });
    box.hidden = !refusal;
    again.disabled = false;
    this.refusal = refusal;
    this.card.classList.toggle("failed", Boolean(refusal));
    if (!refusal) return;
    if (refusal.status !== 429) {
      text.textContent = refusal.message;
      return;
    }
    let left = Math.ceil(refusal.retryAfter ?? 1);
    const tell = () => {
      again.disabled = left > 0;
      text.textContent = `The server has its hands full just now. ${left > 0 ? `It will take another question in ${left} s.` : "It should be ready again."}`;
      if (left-- <= 0) clearInterval(this.#clock);
    };
    this.#clock = setInterval(tell, 1000);
    tell();
  }
}

// The range of bars that are compared: 0 to 100, and what lies beyond.
export function rangeOf(answers) {
  const values = answers.flatMap((answer) => Object.values(answer.scores ?? {})).filter(Number.isFinite);
  return [Math.min(0, ...values), Math.max(100, ...values)];
}

function scoresOf(scores, names, [low, high]) {
  const known = scores ? names.filter((name) => Number.isFinite(scores[name])) : [];
  if (!known.length) return [];
  const rows = known.flatMap((name) => {
    const fill = make("i");
    fill.style.width = `${(100 * (scores[name] - low)) / (high - low)}%`;
    const number = make("b", { textContent: scores[name].toFixed(0) });
    return [make("dt", { textContent: name }), make("dd", {}, make("span", {}, fill), number)];
  });
  return [make("p", { className: "by", textContent: "Model reward" }), make("dl", { className: "bars" }, ...rows)];
}

// An answer of an earlier turn, as text alone.
export function kept(answer, names) {
  const scored = names.filter((name) => Number.isFinite(answer.scores?.[name]));
  const scores = scored.map((name) => `${name} ${answer.scores[name].toFixed(0)}`).join(", ");
  const facts = [plural(answer.words, "word"), ...(scores ? [`model reward: ${scores}`] : []), ...(answer.state ? [answer.state] : [])];
  return make(
    "div",
    { className: "kept" },
    make("p", { className: "kept-text", dir: "auto", textContent: answer.text || "No answer." }),
    make(
      "p",
      { className: "facts" },
      `${answer.label}. ${facts.join("; ")}. `,
      ...(answer.text ? [button("Copy", (pressed) => copy(answer.text, pressed), { className: "quiet" })] : []),
    ),
  );
}

function told(dpa) {
  if (!dpa.direction) return "no direction stated";
  const clamped = dpa.clamped ? ", moved to the edge of what was trained" : "";
  return `${dpa.source === "default" ? "the server’s default: " : ""}${dpa.direction}${clamped}`;
}
