// Arithmetic of a direction space, as core/directions.py has it: directions are unit vectors, the trained ones a cone.
//
// Controls work on the cone's "tangent": u, a vector orthogonal to the center whose length is the angle to the center
// divided by the cone's half-angle. The trained directions are exactly the ball |u| <= 1.

const LEANS = 0.15; // of the cone's half-angle: less than this is no leaning
export const NUDGE = 0.7; // where More and Less lead
export const HELD = /^=(100|[1-9]?\d)$/; // a value in place of a weight

export const dot = (a, b) => a.reduce((sum, value, k) => sum + value * b[k], 0);
export const norm = (a) => Math.sqrt(dot(a, a));
export const scale = (a, factor) => a.map((value) => value * factor);
export const add = (a, b, factor = 1) => a.map((value, k) => value + factor * b[k]);
export const unit = (a) => scale(a, 1 / norm(a));
const clip = (value, low, high) => Math.min(high, Math.max(low, value));

export class Space {
  // `data` is the answer of GET /v1/dpa/space.
  constructor(data) {
    this.data = data;
    this.names = data.objectives.map((objective) => objective.name);
    this.descriptions = data.objectives.map((objective) => objective.description || "");
    this.center = unit(this.names.map((name) => data.center[name] ?? 0));
    this.maxAngle = data.max_angle;
    // The way towards each objective; null where the objective is the center itself.
    this.poles = this.names.map((_, k) => {
      const axis = this.names.map((_, j) => (j === k ? 1 : 0));
      const across = add(axis, this.center, -this.center[k]);
      return norm(across) > 1e-6 ? unit(across) : null;
    });
    this.anchor = this.poles.indexOf(null);
    // The objective whose arc is seen first, and the one the center stands for above all; of two they are each other's.
    this.arc = this.poles[1] ? 1 : this.poles.findIndex((pole) => pole !== null);
    const shares = this.center.map(Math.abs);
    this.main = this.names.length === 2 ? 1 - this.arc : shares.indexOf(Math.max(...shares));
    this.reference = data.default ? this.weightsOf(data.default.weights) : this.rounded(this.center);
    // What a request that states nothing is asked in; null: in no direction, though the controls start at the center.
    this.usual = data.default ? this.wish(this.reference, data.default.held ?? {}) : null;
  }

  // K numbers from a mapping; objectives left out weigh nothing.
  weightsOf(mapping) {
    return this.rounded(this.names.map((name) => mapping[name] ?? 0));
  }

  // What is shown, linked, copied, kept and sent are the same three decimals: they are no unit vector quite, and stay.
  rounded(weights) {
    const length = norm(weights);
    const isRounded = Math.abs(length - 1) <= 0.0005 * Math.sqrt(weights.length);
    return weights.map((value) => Math.round((1000 * value) / (isRounded ? 1 : length)) / 1000 + 0);
  }

  mapping(weights) {
    return Object.fromEntries(this.names.map((name, k) => [name, weights[k]]).filter(([, weight]) => weight !== 0));
  }

  // As published, and as the server prints it: helpfulness*97 + verbosity*-26.
  text(weights) {
    const whole = unit(weights).map((value) => halfToEven(100 * value) + 0);
    return this.names.map((name, k) => `${name}*${whole[k]}`).join(" + ");
  }

  // Degrees between a direction and the center, of both what is free where some are held.
  angle(weights, held = {}) {
    const [w, center] = [weights, this.center].map((all) => unit(this.#left(all, held)));
    const along = dot(w, center);
    return degrees(Math.atan2(norm(add(w, center, -along)), along));
  }

  tangent(weights) {
    const w = unit(weights);
    const across = add(w, this.center, -dot(w, this.center));
    const length = norm(across);
    return length < 1e-9 ? scale(across, 0) : scale(across, this.angle(w) / this.maxAngle / length);
  }

  // The direction at u; beyond the cone, the nearest one on its edge.
  fromTangent(u) {
    const length = norm(u);
    if (length < 1e-9) return this.rounded(this.center);
    const angle = radians(this.maxAngle * Math.min(1, length));
    return this.rounded(add(scale(this.center, Math.cos(angle)), scale(u, 1 / length), Math.sin(angle)));
  }

  // How far a direction leans towards each objective, -1 to 1 of the half-angle; null for the center's own.
  leanings(weights) {
    const u = this.tangent(weights);
    return this.poles.map((pole) => (pole ? clip(dot(u, pole), -1, 1) : null));
  }

  // The direction whose leaning towards k is `lean`; the other leanings stay, or give way where the cone ends.
  withLeaning(weights, k, lean) {
    const u = this.tangent(weights);
    const pole = this.poles[k];
    const rest = add(u, pole, -dot(u, pole));
    const room = Math.sqrt(Math.max(0, 1 - lean * lean));
    const kept = norm(rest) > room ? scale(rest, room / norm(rest)) : rest;
    return this.fromTangent(add(kept, pole, lean));
  }


  // --- in words: what a direction asks for ---
  //
  // A direction is so much of the center and what is asked for beyond it. It is a unit vector, so whatever is asked for,
  // all else weighs less; that is no wish. So the center's share is chosen such that one of the center's objectives keeps
  // exactly its part of it and as few as possible are asked for; of equal ways, the one that `main` keeps. A center that
  // is one objective's axis keeps it always, so that one is never asked for. What `pressed` ({k, level}) says, is.

  asked(weights, pressed = null) {
    const u = this.tangent(weights);
    const radius = norm(u);
    if (radius < 1e-9) return u;
    const w = unit(weights);
    const able = this.names.map((_, k) => k).filter((k) => this.center[k] !== 0 && w[k] / this.center[k] > 1e-6);
    const others = able.filter((k) => k !== pressed?.k);
    const keepers = others.length ? others : able;
    // Beyond 90 degrees nothing of the center may be left.
    if (!keepers.length) return scale(w, radius);
    const ways = keepers.map((k) => {
      const asked = add(u, this.center, -u[k] / this.center[k]);
      asked[k] = 0;
      const meant = pressed === null || levelOf(asked[pressed.k]) === pressed.level ? 0 : 100;
      const cost = meant + asked.filter((value) => levelOf(value) !== 0).length + (k === this.main ? 0 : 0.5);
      return { asked, cost };
    });
    return ways.reduce((best, way) => (way.cost < best.cost ? way : best)).asked;
  }

  words(weights, pressed = null) {
    const parts = [];
    this.asked(weights, pressed).forEach((value, k) => {
      if (levelOf(value) === 0) return;
      const much = Math.abs(value) < 0.4 ? "a little " : Math.abs(value) < 0.8 ? "" : "much ";
      parts.push(`${much}${value > 0 ? "more" : "less"} ${this.names[k]}`);
    });
    if (parts.length) return sentence(parts);
    return this.center[this.anchor] > 0 ? `${capital(this.names[this.anchor])} first` : "No leaning: the middle";
  }

  // --- More / Default / Less: +1, 0, -1 for each objective, against the server's default (or the center) ---

  // Objectives with such a control. What the center alone stands for has none: every leaning is away from it.
  get adjustable() {
    const all = this.names.map((_, k) => k);
    return this.names.length === 2 ? all.filter((k) => k !== this.main) : all.filter((k) => this.poles[k]);
  }

  levels(weights, pressed = null) {
    const usual = this.asked(this.reference);
    return this.asked(weights, pressed).map((value, k) => (k === pressed?.k ? pressed.level : levelOf(value - usual[k])));
  }

  withLevel(weights, k, level) {
    const asked = this.asked(weights, { k, level });
    const usual = this.asked(this.reference);
    const others = asked.some((value, j) => j !== k && levelOf(value - usual[j]) !== 0);
    if (level === 0 && !others) return this.reference;
    const across = (vector) => add(vector, this.center, -dot(vector, this.center));
    const wish = across(asked.map((_, j) => (j === k ? clip(usual[k] + NUDGE * level, -1, 1) : 0)));
    let rest = across(asked.map((value, j) => (j === k ? 0 : value)));
    // The others give way where the cone ends.
    while (norm(add(wish, rest)) > 1 && norm(rest) > 0.01) rest = scale(rest, 0.95);
    return this.fromTangent(add(wish, rest));
  }

  // --- targets: objectives held at a value; the others go as far as they go ---

  // Objectives that may be held: all but the one the center stands for; none where the policy knows no targets.
  get holdable() {
    return this.data.targets ? this.names.map((_, k) => k).filter((k) => this.poles[k] && k !== this.main) : [];
  }

  // What is left of a direction where `held` (objective to value) are held.
  free(weights, held) {
    if (!Object.keys(held).length) return weights;
    const left = this.#left(weights, held);
    return this.rounded(norm(left) > 1e-6 ? left : this.#left(this.center, held));
  }

  #left(all, held) {
    return all.map((value, k) => (this.names[k] in held ? 0 : value));
  }

  // What is sent: objective to weight, or to "=40" where it is held.
  wish(weights, held) {
    const values = Object.entries(held).map(([name, value]) => [name, `=${value}`]);
    return { ...this.mapping(this.free(weights, held)), ...Object.fromEntries(values) };
  }

  // As a target is written: helpfulness*100 + warmth*0; verbosity=40.
  wishText(weights, held) {
    const values = this.names.filter((name) => name in held).map((name) => `${name}=${held[name]}`);
    if (!values.length) return this.text(weights);
    const terms = this.text(this.free(weights, held)).split(" + ").filter((_, k) => !(this.names[k] in held));
    return `${terms.join(" + ")}; ${values.join(", ")}`;
  }

  wishWords(weights, held, pressed = null) {
    const values = this.names.filter((name) => name in held).map((name) => `${name} at ${held[name]}`);
    return [this.words(this.free(weights, held), values.length ? null : pressed), ...values].join(", ");
  }

  // Five directions along the arc towards objective k, from one end of what was trained to the other.
  across(k) {
    return [-1, -0.5, 0, 0.5, 1].map((lean) => this.fromTangent(scale(this.poles[k], lean)));
  }
}

// More, nothing said, less.
const levelOf = (asked) => (asked > LEANS ? 1 : asked < -LEANS ? -1 : 0);

export function signedDegrees(angle) {
  const whole = Math.round(angle);
  return whole === 0 ? "0°" : `${whole > 0 ? "+" : "−"}${Math.abs(whole)}°`;
}

const degrees = (angle) => (angle * 180) / Math.PI;
const radians = (angle) => (angle * Math.PI) / 180;
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function sentence(parts) {
  const list = parts.length < 2 ? parts[0] : `${parts.slice(0, -1).join(", ")} and ${parts.at(-1)}`;
  return capital(list);
}

// Python's round.
function halfToEven(value) {
  const low = Math.floor(value);
  const over = value - low;
  if (over !== 0.5) return Math.round(value);
  return low % 2 === 0 ? low : low + 1;
}
