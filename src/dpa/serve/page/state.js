// What is being asked, and the link that says it: question, direction and settings; never the key.

import { $, later, notice } from "./dom.js";
import { add, HELD, norm } from "./space.js";
import { faultOf } from "./stream.js";

export const state = {
  question: "", // in the box, not asked yet
  weights: [],
  pressed: null, // {k, level} where the direction comes from a pressed More or Less
  held: {}, // objective to value, for a target
  seed: 1,
  temperature: 0.7,
  maxTokens: 256,
  compare: "default",
  memory: true, // the earlier turns go along
  follow: true, // steering answers again
  marks: true, // words that the other answer lacks are marked
  x: 0, // the objective along the front
  snippet: "curl",
};

export const LIMITS = { seed: [0, 2147483647], temperature: [0, 2], maxTokens: [1, 1e6] };

export const same = (a, b) => norm(add(a, b, -1)) < 2e-3;

export const within = (field, value) => {
  const [low, high] = LIMITS[field];
  const bounded = Math.min(high, Math.max(low, Number(value) || low));
  return field === "temperature" ? bounded : Math.round(bounded);
};

export function addressOf(space, question) {
  const fields = new URLSearchParams();
  if (question) fields.set("q", question);
  fields.set("d", Object.entries(space.wish(state.weights, state.held)).map(([name, weight]) => `${name}:${weight}`).join(","));
  fields.set("seed", state.seed);
  fields.set("t", state.temperature);
  fields.set("n", state.maxTokens);
  if (state.compare !== "default") fields.set("vs", state.compare);
  if (space.names.length > 2) fields.set("x", space.names[state.x]);
  return `#${fields}`;
}

export const writeAddress = later(250, (space, question) => history.replaceState(null, "", addressOf(space, question)));

export function readAddress(space, link) {
  const fields = new URLSearchParams(link.slice(1));
  const number = (name, field) => {
    const value = Number(fields.get(name));
    const [low, high] = LIMITS[field];
    if (fields.has(name) && value >= low && value <= high) state[field] = within(field, value);
  };
  if (fields.has("q")) state.question = fields.get("q");
  number("seed", "seed");
  number("t", "temperature");
  number("n", "maxTokens");
  const x = space.names.indexOf(fields.get("x"));
  if (x >= 0 && space.poles[x]) state.x = x;
  if (!fields.has("d")) return; // no link of ours
  state.compare = space.data.base && fields.get("vs") === "base" ? "base" : "default";
  const wish = fitting(space, Object.fromEntries(fields.get("d").split(",").map((term) => term.split(":"))));
  if (wish) Object.assign(state, wish, { pressed: null });
  notice(wish ? "" : "The link’s direction does not fit this model, so another one is set instead.");
}

// {weights, held} of a mapping from elsewhere, or null where the space does not know it or was not trained so far out.
export function fitting(space, mapping) {
  const given = Object.entries(mapping ?? {});
  const holds = ([, value]) => HELD.test(value);
  const held = Object.fromEntries(given.filter(holds).map(([name, value]) => [name, Number(value.slice(1))]));
  const rest = Object.fromEntries(given.filter((one) => !holds(one)).map(([name, weight]) => [name, weight === "" ? NaN : Number(weight)]));
  const known = given.every(([name]) => space.names.includes(name));
  const mayHold = Object.keys(held).every((name) => space.holdable.includes(space.names.indexOf(name)));
  const weights = space.names.map((name) => rest[name] ?? 0);
  if (!known || !mayHold || !(norm(weights) > 1e-6)) return null;
  return space.angle(weights, held) <= space.maxAngle + 0.5 ? { weights: space.rounded(weights), held } : null;
}

// Where the page begins: a preset whose answer differs from the default one, terse where there is such.
export function firstWeights(space) {
  const presets = Object.entries(space.data.presets ?? {}).map(([name, preset]) => [name, space.weightsOf(preset.weights)]);
  const differing = presets.filter(([, weights]) => !same(weights, space.reference));
  const chosen = differing.find(([name]) => name === "terse") ?? differing[0];
  return chosen?.[1] ?? space.withLevel(space.reference, space.arc, 1);
}

// --- the key: typed here, kept in this tab ---

export const key = () => $("key").value.trim();

export function askForKey() {
  notice(key() ? faultOf(key()) || "The server does not take this key." : "This server asks for a key.");
  $("key-box").open = true;
  $("key").focus();
}
