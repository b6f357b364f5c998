// The controls of the direction: More and Less, presets, dial or sliders, an expression, the measured front.
// All of them show the same one, and all of them call `steer(weights, pressed, held)`.

import { $, button, make } from "./dom.js";
import { Dial, drawFront, Front } from "./drawing.js";
import { signedDegrees } from "./space.js";
import { askForKey, key, same, state } from "./state.js";
import { postJson, Refusal } from "./stream.js";

const LEVELS = [
  [-1, "Less"],
  [0, "Default"],
  [1, "More"],
];

export class Controls {
  #checking = null;

  // `tapped()` follows a preset: whoever taps one looks at the answer.
  constructor(space, steer, tapped) {
    this.space = space;
    this.steer = steer;
    this.#buildLevels();
    this.#buildPresets(tapped);
    this.#buildFiner();
    this.#buildHolds();
    this.#buildAxis();
    this.redrawFront();
    $("expert").addEventListener("submit", () => this.#apply("error"));
    let width = 0;
    new ResizeObserver(() => {
      if ($("front").clientWidth === width) return;
      width = $("front").clientWidth;
      this.#draw();
    }).observe($("front"));
  }

  show() {
    const { space } = this;
    const { weights, pressed, held } = state;
    $("words").textContent = `${space.wishWords(weights, held, pressed)}.`;
    $("numbers").textContent = space.wishText(weights, held);
    const angle = Math.round(space.angle(space.free(weights, held), held));
    $("angle").textContent = angle === 0 ? "the middle of what was trained" : `${angle}° from the middle, trained to ${space.maxAngle}°`;
    const levels = space.levels(weights, pressed);
    for (const k of space.adjustable)
      for (const input of document.getElementsByName(`level-${k}`)) {
        input.disabled = space.names[k] in held;
        input.checked = !input.disabled && Number(input.value) === levels[k];
      }
    const holds = Object.keys(held).length > 0;
    if (holds && !this.holds) $("holding").open = true; // by a link or an expression
    this.holds = holds;
    for (const chip of $("presets").children) chip.setAttribute("aria-pressed", !holds && same(weights, chip.weights));
    this.dial?.show(weights);
    const leanings = space.leanings(weights);
    for (const slider of $("sliders").querySelectorAll("input")) {
      const lean = leanings[slider.k];
      slider.disabled = space.names[slider.k] in held;
      slider.value = Math.round(100 * lean);
      slider.setAttribute("aria-valuetext", signedDegrees(lean * space.maxAngle));
      slider.output.textContent = signedDegrees(lean * space.maxAngle);
    }
    $("expression").value = space.wishText(weights, held);
    $("expression-error").replaceChildren();
    for (const row of $("holds").children) row.show(held);
    this.#draw();
  }

  redrawFront() {
    this.front = new Front(this.space, state.x);
    const count = this.front.points.length;
    $("front").hidden = !count;
    const deaf = this.space.data.front_follows === false ? "As measured, this model does not follow its direction. " : "";
    $("front-note").textContent = count
      ? `${deaf}${count} directions on held-out questions: ${this.front.reward}, 95% intervals. Click to pick. Grey: not trained.`
      : "No measurement travels with this model. The loop’s evaluation writes one beside it; the controls work without.";
  }

  #draw() {
    if (this.front.points.length) drawFront($("front"), this.front, state.weights, this.steer);
  }

  #buildLevels() {
    const { space } = this;
    const rows = space.adjustable.map((k) => {
      const choices = LEVELS.map(([level, text]) => {
        const input = make("input", { type: "radio", name: `level-${k}`, value: level });
        input.addEventListener("change", () => this.steer(space.withLevel(state.weights, k, level), { k, level }, state.held));
        return make("label", {}, input, make("span", { textContent: text }));
      });
      const legend = make("legend", { textContent: space.names[k], title: space.descriptions[k] });
      return make("fieldset", { className: "level" }, legend, make("div", { className: "segments" }, ...choices));
    });
    $("levels").replaceChildren(...rows);
  }

  #buildPresets(tapped) {
    const presets = Object.entries(this.space.data.presets ?? {});
    $("presets").hidden = !presets.length;
    $("presets").replaceChildren(
      ...presets.map(([name, preset]) => {
        const weights = this.space.weightsOf(preset.weights);
        const steer = () => {
          this.steer(weights);
          tapped();
        };
        return button(name, steer, { className: "chip", title: `${this.space.words(weights)}: ${preset.text}`, weights });
      }),
    );
  }

  #buildFiner() {
    const { space } = this;
    const two = space.names.length === 2;
    $("dial-box").hidden = !two;
    $("sliders").hidden = two;
    this.dial = two ? new Dial($("dial-box"), space, this.steer) : null;
    const how = two
      ? "Drag, or use the arrow keys. Grey was not trained and cannot be chosen."
      : "Each slider spans what was trained; the others give way where its end is reached.";
    const start = space.names[space.anchor];
    $("cone-note").textContent = start ? `${how} All start from ${start}: the further one leans, the less it counts.` : how;
    $("sliders").replaceChildren(
      ...space.names.flatMap((name, k) => {
        if (two || !space.poles[k]) return [];
        const slider = make("input", { type: "range", min: -100, max: 100, step: 1, id: `slider-${k}`, k });
        slider.output = make("output", { htmlFor: slider.id });
        slider.addEventListener("input", () => this.steer(space.withLeaning(state.weights, k, slider.value / 100), null, state.held));
        return [make("div", { className: "slider" }, make("label", { htmlFor: slider.id, textContent: name }), slider, slider.output)];
      }),
    );
    $("expression").placeholder = `${space.names[0]}*0.8 - ${space.names[1]}*0.6`;
  }

  // A switch and a value for each objective that may be held.
  #buildHolds() {
    const { space } = this;
    $("holding").hidden = !space.holdable.length;
    $("holds").replaceChildren(
      ...space.holdable.map((k) => {
        const name = space.names[k];
        const on = make("input", { type: "checkbox", id: `hold-${k}` });
        const value = make("input", { type: "range", min: 0, max: 100, step: space.data.target_step, id: `value-${k}`, value: 50 });
        const output = make("output", { htmlFor: value.id });
        value.setAttribute("aria-label", `Value of ${name}`);
        const hold = (isOn) => {
          const { [name]: _, ...others } = state.held;
          this.steer(state.weights, null, isOn ? { ...others, [name]: Number(value.value) } : others);
        };
        on.addEventListener("change", () => hold(on.checked));
        value.addEventListener("input", () => hold(true));
        const show = (held) => {
          on.checked = name in held;
          if (on.checked) value.value = held[name];
          output.textContent = on.checked ? value.value : "free";
          row.classList.toggle("free", !on.checked);
        };
        const label = make("label", { className: "check", htmlFor: on.id }, on, make("span", { textContent: name }));
        const row = make("div", { className: "slider hold", show }, label, value, output);
        return row;
      }),
    );
  }

  #buildAxis() {
    const { space } = this;
    const choices = space.names.filter((_, k) => space.poles[k]);
    $("x-pick").hidden = space.names.length < 3;
    $("x-axis").replaceChildren(...choices.map((name) => make("option", { value: name, textContent: name })));
    $("x-axis").addEventListener("change", () => {
      state.x = space.names.indexOf($("x-axis").value);
      this.redrawFront();
      this.#draw();
    });
  }

  async #apply(outside) {
    this.#checking?.abort();
    this.#checking = new AbortController();
    const { signal } = this.#checking;
    const direction = $("expression").value.trim();
    const error = $("expression-error");
    error.replaceChildren();
    if (!direction) return;
    const check = (how) => postJson("v1/dpa/direction", { direction, outside: how }, key(), signal);
    try {
      const found = await check(outside);
      this.steer(this.space.weightsOf(found.weights), null, found.held);
    } catch (refusal) {
      if (!(refusal instanceof Refusal)) return;
      if (refusal.status === 401) askForKey();
      error.replaceChildren(refusal.message);
      const nearest = refusal.status === 400 ? await check("clamp").catch(() => null) : null;
      if (!nearest || signal.aborted) return;
      const take = () => this.steer(this.space.weightsOf(nearest.weights), null, nearest.held);
      error.append(" ", button("Take the nearest trained one", take));
    }
  }
}
