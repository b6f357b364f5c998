// The page: one state, every control showing it. No build step, nothing loaded from elsewhere, no text as markup.

import { Answer } from "./answer.js";
import { Dial, drawFront, Front } from "./drawing.js";
import { bodyOf, curl, python, stock } from "./snippets.js";
import { norm, add, signedDegrees, Space } from "./space.js";
import { asksForKey, getJson, postJson, Refusal } from "./stream.js";

const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};
const later = (wait, action) => {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => action(...given), wait);
  };
};
const KEY = "dpa-key";
const SETTINGS = { seed: [0, 2147483647], temperature: [0, 2], maxTokens: [1, 1e6] };

let space;
let front;
let dial;
let plain;
let steered;
const state = { question: "", weights: [], seed: 1, temperature: 0.7, maxTokens: 256, compare: "default", x: 0, snippet: "curl" };

let wantsKey = false; // the browser may have asked for it before this page was there

const key = () => $("key").value.trim();
const origin = () => location.origin + location.pathname.replace(/\/[^/]*$/, "");
const same = (a, b) => norm(add(a, b, -1)) < 2e-3;

// --- the state in the address: question, direction, settings; never the key ---

function addressOf() {
  const fields = new URLSearchParams();
  if (state.question) fields.set("q", state.question);
  fields.set("d", Object.entries(space.mapping(state.weights)).map(([name, weight]) => `${name}:${weight}`).join(","));
  fields.set("seed", state.seed);
  fields.set("t", state.temperature);
  fields.set("n", state.maxTokens);
  if (state.compare !== "default") fields.set("vs", state.compare);
  if (space.names.length > 2) fields.set("x", space.names[state.x]);
  return `#${fields}`;
}

function readAddress() {
  const fields = new URLSearchParams(location.hash.slice(1));
  const number = (name, field) => {
    const value = Number(fields.get(name));
    const [low, high] = SETTINGS[field];
    if (fields.has(name) && value >= low && value <= high) state[field] = field === "temperature" ? value : Math.round(value);
  };
  if (fields.has("q")) state.question = fields.get("q");
  number("seed", "seed");
  number("t", "temperature");
  number("n", "maxTokens");
  state.compare = space.data.base && fields.get("vs") === "base" ? "base" : "default";
  const x = space.names.indexOf(fields.get("x"));
  if (x >= 0 && space.poles[x]) state.x = x;
  if (!fields.has("d")) return;
  const weights = readWeights(fields.get("d"));
  if (weights) state.weights = weights;
  notice(weights ? "" : "The link’s direction does not fit this model, so the default one is set instead.");
}

function readWeights(text) {
  const pairs = text.split(",").map((term) => term.split(":"));
  const mapping = Object.fromEntries(pairs);
  const fits = pairs.every(([name, weight]) => space.names.includes(name) && Number.isFinite(Number(weight || "x")));
  const weights = space.names.map((name) => Number(mapping[name] ?? 0));
  if (!fits || norm(weights) < 1e-6) return null;
  return space.angle(weights) <= space.maxAngle + 0.5 ? space.rounded(weights) : null;
}

const writeAddress = later(250, () => history.replaceState(null, "", addressOf()));

// --- showing the state ---

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

const announce = (text) => ($("status").textContent = text);

function show() {
  const { weights } = state;
  $("words").textContent = `${space.words(weights)}.`;
  $("numbers").textContent = space.text(weights);
  const angle = Math.round(space.angle(weights));
  $("angle").textContent = angle === 0 ? "the middle of what was trained" : `${angle}° from the middle, trained to ${space.maxAngle}°`;
  space.levels(weights).forEach((level, k) => {
    const can = space.canChange(weights, k);
    for (const input of document.getElementsByName(`level-${k}`)) {
      input.checked = Number(input.value) === level;
      input.disabled = !can && !input.checked;
      input.title = input.disabled ? `Nothing else leans yet: ${space.names[k]} is all there is` : "";
    }
  });
  for (const chip of $("presets").children) chip.setAttribute("aria-pressed", same(weights, chip.weights));
  dial?.show(weights);
  const leanings = space.leanings(weights);
  for (const slider of $("sliders").querySelectorAll("input")) {
    const lean = leanings[slider.k];
    slider.value = Math.round(100 * lean);
    slider.setAttribute("aria-valuetext", signedDegrees(lean * space.maxAngle));
    slider.output.textContent = signedDegrees(lean * space.maxAngle);
  }
  $("expression").value = space.text(weights);
  if (front.points.length) drawFront($("front"), front, weights, steer);
  showSettings();
}

function showSettings() {
  for (const [id, value] of Object.entries({ question: state.question, seed: state.seed, temperature: state.temperature, "max-tokens": state.maxTokens, compare: state.compare, "x-axis": space.names[state.x] }))
    if (document.activeElement !== $(id) && $(id).value !== String(value)) $(id).value = value;
  $("default-title").textContent = state.compare === "base" ? "Told no direction" : "Default";
  showSnippet();
  writeAddress();
}

function showSnippet() {
  const body = bodyOf(space.data.model, { ...state, question: state.question || "…" }, space.mapping(state.weights));
  const written = { curl, python, stock }[state.snippet](origin(), wantsKey || Boolean(key()), body);
  $("snippet").firstElementChild.textContent = written;
  for (const tab of document.querySelectorAll('[role="tab"]')) {
    const chosen = tab.dataset.kind === state.snippet;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    if (chosen) $("snippet").setAttribute("aria-labelledby", tab.id);
  }
}

function redrawFront() {
  front = new Front(space, state.x);
  $("front").hidden = !front.points.length;
  const reward = space.data.front_reward === "gold" ? "the true reward" : "the reward model";
  $("front-note").textContent = front.points.length
    ? `${front.points.length} directions on held-out questions, scored by ${reward}, with 95% intervals. Click one, or the line between. Grey: beyond what was trained.`
    : "No measurement travels with this model. The loop’s evaluation writes one beside it; the controls work without.";
}

// --- steering and asking ---

function steer(weights) {
  if (same(weights, state.weights)) return show();
  state.weights = weights;
  $("expression-error").replaceChildren();
  show();
  if (!steered.asked) return;
  if ($("follow").checked) answerAgain();
  else if (steered.asked !== JSON.stringify(bodies().steered)) steered.card.classList.add("earlier");
}

const answerAgain = later(400, () => {
  if (state.question.trim()) ask();
});

function bodies() {
  const settings = state;
  const options = space.data.scorer ? { dpa_options: { scores: true } } : {};
  const other =
    state.compare === "base"
      ? bodyOf(`${space.data.model}@base`, settings, null)
      : bodyOf(space.data.model, settings, space.mapping(space.reference));
  return {
    plain: { ...other, ...options },
    steered: { ...bodyOf(space.data.model, settings, space.mapping(state.weights)), ...options },
  };
}

async function ask({ scroll = false } = {}) {
  const asked = bodies();
  const jobs = [steered.run(asked.steered, key())];
  // The other answer does not depend on the direction: it is kept while only the direction changes.
  const kept = plain.asked === JSON.stringify(asked.plain) && (plain.done || plain.running);
  if (!kept) jobs.push(plain.run(asked.plain, key()));
  announce(kept ? "Answering again in the new direction." : "Both answers are being written.");
  busy();
  if (scroll && $("answers").getBoundingClientRect().top > innerHeight - 160)
    $("answers").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  await Promise.all(jobs);
}

function busy() {
  const running = plain.running || steered.running;
  const pressed = document.activeElement;
  // One takes the other's place, so that nothing below moves; whoever had the focus does not lose it.
  $("stop").hidden = !running;
  $("reseed").hidden = running;
  if (pressed?.hidden) $("go").focus({ preventScroll: true });
  $("go").textContent = running ? "Ask anew" : "Ask";
}

function answered(card, how) {
  busy();
  const values = [plain, steered].flatMap((answer) => Object.values(answer.scores ?? {})).filter(Number.isFinite);
  const range = [Math.min(0, ...values), Math.max(100, ...values)];
  for (const answer of [plain, steered]) answer.showScores(range);
  steered.showDifference(plain, state.compare === "base" ? "without one" : "the default");
  if (card.refusal?.status === 401) askForKey();
  if (plain.running || steered.running) return;
  const trouble = steered.refusal ?? plain.refusal;
  if (trouble) announce(trouble.message);
  else if (how === "stopped") announce("Stopped.");
  else if (plain.done && steered.done) announce(`Both answers are there: ${plain.words} words, and steered ${steered.words} words.`);
}

function askForKey() {
  notice(key() ? "The server does not take this key." : "This server asks for a key.");
  $("key-box").open = true;
  $("key").focus();
}

// --- building the controls ---

function buildLevels() {
  const leanings = [
    [-1, "Less"],
    [0, "Default"],
    [1, "More"],
  ];
  $("levels").replaceChildren(
    ...space.names.map((name, k) => {
      const choices = leanings.map(([level, text]) => {
        const input = make("input", { type: "radio", name: `level-${k}`, value: level });
        input.addEventListener("change", () => steer(space.withLevel(state.weights, k, level)));
        return make("label", {}, input, make("span", { textContent: text }));
      });
      const legend = make("legend", { textContent: name, title: space.descriptions[k] });
      return make("fieldset", { className: "level" }, legend, make("div", { className: "segments" }, ...choices));
    }),
  );
}

function buildPresets() {
  const presets = Object.entries(space.data.presets ?? {});
  $("presets").hidden = !presets.length;
  $("presets").replaceChildren(
    ...presets.map(([name, preset]) => {
      const weights = space.weightsOf(preset.weights);
      const chip = make("button", { type: "button", className: "chip", textContent: name, title: preset.text, weights });
      chip.addEventListener("click", () => steer(weights));
      return chip;
    }),
  );
}

function buildFiner() {
  const two = space.names.length === 2;
  $("dial-box").hidden = !two;
  $("sliders").hidden = two;
  dial = two ? new Dial($("dial-box"), space, steer) : null;
  $("cone-note").textContent = two
    ? "Drag, or use the arrow keys. Grey was not trained and cannot be chosen."
    : "Each slider spans what was trained; the others give way where its end is reached.";
  $("sliders").replaceChildren(
    ...space.names.flatMap((name, k) => {
      if (two || !space.poles[k]) return [];
      const slider = make("input", { type: "range", min: -100, max: 100, step: 1, id: `slider-${k}`, k });
      slider.output = make("output", { htmlFor: slider.id });
      slider.addEventListener("input", () => steer(space.withLeaning(state.weights, k, slider.value / 100)));
      return [make("div", { className: "slider" }, make("label", { htmlFor: slider.id, textContent: name }), slider, slider.output)];
    }),
  );
  $("expression").placeholder = `${space.names[0]}*0.8 - ${space.names[1]}*0.6`;
}

function buildAxis() {
  const choices = space.names.filter((_, k) => space.poles[k]);
  state.x = space.poles[1] ? 1 : space.arc;
  $("x-pick").hidden = space.names.length < 3;
  $("x-axis").replaceChildren(...choices.map((name) => make("option", { value: name, textContent: name })));
}

function buildExamples() {
  const examples = (space.data.examples ?? []).slice(0, 4).map(String);
  $("examples").hidden = !examples.length;
  $("examples").replaceChildren(
    ...examples.map((text) => {
      const chip = make("button", { type: "button", className: "chip", textContent: text.split("\n")[0], title: text });
      chip.addEventListener("click", () => {
        state.question = text;
        $("question").value = text;
        showSettings();
      });
      return chip;
    }),
  );
}

// --- what the user does ---

let checking = null;

async function applyExpression(outside) {
  checking?.abort();
  checking = new AbortController();
  const { signal } = checking;
  const direction = $("expression").value.trim();
  const error = $("expression-error");
  error.replaceChildren();
  if (!direction) return;
  const check = (how) => postJson("v1/dpa/direction", { direction, outside: how }, key(), signal);
  try {
    const found = await check(outside);
    steer(space.weightsOf(found.weights));
  } catch (refusal) {
    if (!(refusal instanceof Refusal)) return;
    if (refusal.status === 401) askForKey();
    error.replaceChildren(refusal.message);
    const nearest = refusal.status === 400 ? await check("clamp").catch(() => null) : null;
    if (!nearest || signal.aborted) return;
    const button = make("button", { type: "button", textContent: "Take the nearest trained one" });
    button.addEventListener("click", () => {
      error.replaceChildren();
      steer(space.weightsOf(nearest.weights));
    });
    error.append(" ", button);
  }
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without a secure context there is no clipboard: take the old way.
    const box = make("textarea", { value: text });
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
  const before = button.textContent;
  button.textContent = "Copied";
  announce("Copied.");
  setTimeout(() => (button.textContent = before), 1500);
}

function listen() {
  $("ask").addEventListener("submit", () => {
    if (state.question.trim()) ask({ scroll: true });
    else $("question").focus();
  });
  $("question").addEventListener("input", () => {
    state.question = $("question").value;
    showSettings();
  });
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
  });
  for (const [id, field] of [["seed", "seed"], ["temperature", "temperature"], ["max-tokens", "maxTokens"]])
    $(id).addEventListener("change", () => {
      const [low, high] = SETTINGS[field];
      const value = Math.min(high, Math.max(low, Number($(id).value) || low));
      state[field] = field === "temperature" ? value : Math.round(value);
      $(id).value = state[field];
      showSettings();
    });
  $("compare").addEventListener("change", () => {
    state.compare = $("compare").value;
    showSettings();
  });
  $("x-axis").addEventListener("change", () => {
    state.x = space.names.indexOf($("x-axis").value);
    redrawFront();
    show();
  });
  $("reseed").addEventListener("click", () => {
    state.seed = Math.floor(Math.random() * 2 ** 31);
    $("seed").value = state.seed;
    showSettings();
    $("ask").requestSubmit();
  });
  $("stop").addEventListener("click", () => [plain, steered].forEach((answer) => answer.stop()));
  $("expert").addEventListener("submit", () => applyExpression("error"));
  $("copy-link").addEventListener("click", () => {
    history.replaceState(null, "", addressOf());
    copy(location.href, $("copy-link"));
  });
  $("copy-snippet").addEventListener("click", () => copy($("snippet").textContent, $("copy-snippet")));
  const tabs = [...document.querySelectorAll('[role="tab"]')];
  tabs.forEach((tab, index) => {
    tab.addEventListener("click", () => {
      state.snippet = tab.dataset.kind;
      showSnippet();
    });
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(index + step + tabs.length) % tabs.length];
      next.focus();
      next.click();
    });
  });
  addEventListener("hashchange", () => {
    readAddress();
    redrawFront();
    show();
  });
  let width = 0;
  new ResizeObserver(() => {
    if ($("front").clientWidth === width) return;
    width = $("front").clientWidth;
    if (front.points.length) drawFront($("front"), front, state.weights, steer);
  }).observe($("front"));
  // One menu at a time, and Escape closes it.
  const menus = [...document.querySelectorAll("details.pop")];
  document.addEventListener("click", (event) => menus.forEach((menu) => menu.contains(event.target) || (menu.open = false)));
  document.addEventListener("keydown", (event) => {
    const open = event.key === "Escape" && menus.find((menu) => menu.open);
    if (!open) return;
    open.open = false;
    open.querySelector("summary").focus();
  });
}

let starting = false;

async function start() {
  if (space || starting) return;
  starting = true;
  let data;
  try {
    data = await getJson("v1/dpa/space", key());
  } catch (refusal) {
    if (refusal.status === 401) askForKey();
    else notice(refusal.message);
    return;
  } finally {
    starting = false;
  }
  notice("");
  space = new Space(data);
  document.title = `${data.model}: ask, and say which way to go`;
  $("model-name").textContent = data.model;
  state.weights = space.reference;
  wantsKey = Boolean(key()) || (await asksForKey());
  const most = data.limits?.max_tokens;
  if (most) {
    SETTINGS.maxTokens[1] = most;
    state.maxTokens = Math.min(state.maxTokens, most);
    $("max-tokens").max = most;
  }
  if (data.base) $("compare").append(make("option", { value: "base", textContent: "no direction, or the base model" }));
  plain = new Answer($("default"), space.names, answered);
  steered = new Answer($("steered"), space.names, answered);
  $("words").classList.toggle("several", space.names.length > 2);
  $("finer").open = matchMedia("(min-width: 900px)").matches;
  buildLevels();
  buildPresets();
  buildFiner();
  buildAxis();
  buildExamples();
  readAddress();
  redrawFront();
  listen();
  show();
  document.documentElement.dataset.ready = "true";
}

// Nothing here is sent by the browser itself, not even while there is no server to ask.
document.addEventListener("submit", (event) => event.preventDefault());
$("key").value = sessionStorage.getItem(KEY) ?? "";
$("key").addEventListener("input", () => {
  if (key()) sessionStorage.setItem(KEY, key());
  else sessionStorage.removeItem(KEY);
  if (space) showSnippet();
});
for (const kind of ["change", "submit"])
  $("key-form").addEventListener(kind, () => {
    $("key-box").open = false;
    start();
  });
start();
