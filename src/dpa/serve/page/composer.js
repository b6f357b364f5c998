// Where a question is written: Enter asks, Shift+Enter breaks the line, an example asks at once; its settings; Stop.

import { $, button, make } from "./dom.js";
import { LIMITS, state, within } from "./state.js";

const FIELDS = { seed: "seed", temperature: "temperature", "max-tokens": "maxTokens" };

export class Composer {
  // `changed()` follows whatever is typed or set.
  constructor(space, talk, changed) {
    this.talk = talk;
    this.changed = changed;
    const most = space.data.limits?.max_tokens;
    if (most) {
      LIMITS.maxTokens[1] = most;
      state.maxTokens = Math.min(state.maxTokens, most);
      $("max-tokens").max = most;
    }
    if (!space.usual) $("compare").options[0].textContent = "no direction, as by default";
    if (space.data.base) $("compare").append(make("option", { value: "base", textContent: "no direction, or the base model" }));
    this.#buildExamples(space.data.examples ?? []);
    this.#listen();
  }

  // Ask what is in the box, `how` being "ask" or "sweep".
  send(how = "ask") {
    const question = state.question.trim() ? state.question : "";
    if (!question && !this.talk.turn) {
      $("question").focus();
      return;
    }
    state.question = "";
    $("question").value = "";
    this.talk[how](question);
    this.changed();
  }

  show() {
    const shown = { question: state.question, compare: state.compare };
    for (const [id, field] of Object.entries(FIELDS)) shown[id] = state[field];
    for (const [id, value] of Object.entries(shown))
      if ((document.activeElement !== $(id) || id === "question") && $(id).value !== String(value)) $(id).value = value;
    const { running } = this.talk;
    const stopped = !running && document.activeElement === $("stop");
    $("stop").disabled = !running;
    if (stopped) $("question").focus({ preventScroll: true }); // whoever pressed it does not lose the focus
    $("question").placeholder = this.talk.turn ? "Ask something more" : "What would you like to know?";
  }

  #buildExamples(examples) {
    const chips = examples.slice(0, 4).map((example) => {
      const text = String(example);
      const ask = () => {
        state.question = text;
        this.send();
      };
      return button(text, ask, { className: "example" });
    });
    $("examples").hidden = !chips.length;
    $("examples").replaceChildren(...chips);
  }

  #listen() {
    $("ask").addEventListener("submit", () => this.send());
    $("sweep").addEventListener("click", () => this.send("sweep"));
    $("stop").addEventListener("click", () => this.talk.stop());
    $("question").addEventListener("input", () => {
      state.question = $("question").value;
      this.changed();
    });
    $("question").addEventListener("keydown", (event) => {
      // While an input method composes a word, Enter takes the word; 229 is what some browsers say instead.
      if (event.key !== "Enter" || event.shiftKey || event.altKey || event.isComposing || event.keyCode === 229) return;
      event.preventDefault();
      if (!event.repeat) this.send();
    });
    for (const [id, field] of Object.entries(FIELDS))
      $(id).addEventListener("change", () => {
        state[field] = within(field, $(id).value);
        $(id).value = state[field];
        this.changed();
      });
    $("compare").addEventListener("change", () => {
      state.compare = $("compare").value;
      this.changed();
    });
    for (const name of ["follow", "memory"]) {
      $(name).checked = state[name]; // some browsers bring the boxes of before a reload back
      $(name).addEventListener("change", () => {
        state[name] = $(name).checked;
        this.changed();
      });
    }
  }
}
