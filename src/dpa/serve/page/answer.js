// One answer's card: it streams text in, counts words, shows scores, and says kindly what went wrong.
// What a model wrote is only ever put into text nodes.

import { Refusal, streamAnswer } from "./stream.js";

const wordsIn = (text) => (text.match(/\S+/g) ?? []).length;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

export class Answer {
  #stop = null;
  #clock = null;

  // `names`: the objectives; `changed()` is called when an answer has ended, well or badly.
  constructor(card, names, changed) {
    this.card = card;
    this.names = names;
    this.changed = changed;
    this.part = (selector) => card.querySelector(selector);
    this.retry = () => {};
    this.part(".trouble button").addEventListener("click", () => this.retry());
    this.clear();
  }

  get running() {
    return this.#stop !== null;
  }

  clear() {
    this.asked = null; // the body this card answers
    this.done = false;
    this.words = null;
    this.scores = null;
    this.text = document.createTextNode("");
    this.part(".text").replaceChildren(this.text);
    this.part(".told").textContent = "";
    this.#footer("");
    this.#trouble(null);
    this.say("");
  }

  say(state) {
    this.part(".state").textContent = state;
  }

  // Ask for `body` (streamed); resolves to "done", "stopped" or "failed".
  async run(body, key) {
    this.stop();
    const stop = new AbortController();
    this.#stop = stop;
    this.clear();
    this.asked = JSON.stringify(body);
    this.retry = () => this.run(body, key);
    this.card.setAttribute("aria-busy", "true");
    this.card.classList.remove("earlier");
    this.say("waiting");
    try {
      const { finish, dpa } = await streamAnswer({ ...body, stream: true }, key, stop.signal, {
        onText: (piece) => {
          if (this.#stop !== stop) return;
          if (!this.text.length) this.say("writing");
          this.text.appendData(piece);
          this.words = wordsIn(this.text.data);
          this.#footer(plural(this.words, "word"));
        },
        onDirection: (dpa) => {
          if (this.#stop === stop) this.part(".told").textContent = told(dpa);
        },
      });
      if (this.#stop !== stop) return "stopped";
      this.words = dpa?.words ?? wordsIn(this.text.data);
      this.scores = dpa?.scores ?? null;
      this.done = true;
      this.#footer(plural(this.words, "word"));
      this.say(finish === "length" ? "cut at the longest allowed" : this.text.length ? "" : "it said nothing");
      return this.#end(stop, "done");
    } catch (error) {
      if (this.#stop !== stop) return "stopped";
      if (error.name === "AbortError") {
        this.say("stopped");
        return this.#end(stop, "stopped");
      }
      if (!(error instanceof Refusal)) console.error(error);
      this.say(this.text.length ? "broken off" : "no answer");
      this.#trouble(error instanceof Refusal ? error : new Refusal("The answer could not be read.", 0));
      return this.#end(stop, "failed");
    }
  }

  stop() {
    this.#stop?.abort();
  }

  // Bars of the scores, 0 to 100 unless a score lies beyond, on a range both cards share.
  showScores([low, high]) {
    const rows = this.scores ? this.names.filter((name) => Number.isFinite(this.scores[name])) : [];
    this.part(".bars").replaceChildren(
      ...rows.flatMap((name) => {
        const [term, value, bar, fill, number] = ["dt", "dd", "span", "i", "b"].map((tag) => document.createElement(tag));
        term.textContent = name;
        number.textContent = this.scores[name].toFixed(0);
        fill.style.width = `${(100 * (this.scores[name] - low)) / (high - low)}%`;
        bar.append(fill);
        value.append(bar, number);
        return [term, value];
      }),
    );
  }

  showDifference(other, named) {
    if (!this.done || !other.done) return;
    const more = this.words - other.words;
    const difference = more === 0 ? `as many as ${named}` : `${Math.abs(more)} ${more > 0 ? "more" : "fewer"} than ${named}`;
    this.#footer(`${plural(this.words, "word")}, ${difference}`);
  }

  #footer(count) {
    this.part(".count").textContent = count;
    if (!this.scores) this.part(".bars").replaceChildren();
  }

  #end(stop, how) {
    if (this.#stop === stop) this.#stop = null;
    this.card.removeAttribute("aria-busy");
    this.changed(this, how);
    return how;
  }

  #trouble(refusal) {
    clearInterval(this.#clock);
    const [box, text, button] = [this.part(".trouble"), this.part(".trouble p"), this.part(".trouble button")];
    box.hidden = !refusal;
    button.disabled = false;
    this.refusal = refusal;
    this.card.classList.toggle("failed", Boolean(refusal));
    if (!refusal) return;
    if (refusal.status !== 429) {
      text.textContent = refusal.message;
      return;
    }
    let left = Math.ceil(refusal.retryAfter ?? 1);
    const tell = () => {
      button.disabled = left > 0;
      text.textContent = `The server has its hands full just now. ${left > 0 ? `It will take another question in ${left} s.` : "It should be ready again."}`;
      if (left-- <= 0) clearInterval(this.#clock);
    };
    this.#clock = setInterval(tell, 1000);
    tell();
  }
}

function told(dpa) {
  if (!dpa.direction) return "no direction stated";
  const clamped = dpa.clamped ? ", moved to the edge of what was trained" : "";
  return `${dpa.source === "default" ? "the server’s default: " : ""}${dpa.direction}${clamped}`;
}
