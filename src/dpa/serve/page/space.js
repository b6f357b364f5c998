// Arithmetic of a direction space, as core/directions.py has it: directions are unit vectors, the trained ones a cone.
//
// Controls work on the cone's "tangent": u, a vector orthogonal to the center whose length is the angle to the center
// divided by the cone's half-angle. The trained directions are exactly the ball |u| <= 1.

const LEANS = 0.15; // of the cone's half-angle: less than this is no leaning
const NUDGE = 0.7; // where More and Less lead

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
    this.reference = data.default ? this.weightsOf(data.default.weights) : this.rounded(this.center);
  }

  // K numbers from a mapping; objectives left out weigh nothing.
  weightsOf(mapping) {
    return this.rounded(unit(this.names.map((name) => mapping[name] ?? 0)));
  }

  // What is shown, linked, copied and sent are the same three decimals.
  rounded(weights) {
    return unit(weights).map((value) => Math.round(value * 1000) / 1000 + 0);
  }

  mapping(weights) {
    return Object.fromEntries(this.names.map((name, k) => [name, weights[k]]).filter(([, weight]) => weight !== 0));
  }

  // As the policy is told: helpfulness*97 + verbosity*-26.
  text(weights) {
    const whole = unit(weights).map((value) => halfToEven(100 * value) + 0);
    return this.names.map((name, k) => `${name}*${whole[k]}`).join(" + ");
  }

  // Degrees between a direction and the center.
  angle(weights) {
    const w = unit(weights);
    const along = dot(w, this.center);
    return degrees(Math.atan2(norm(add(w, this.center, -along)), along));
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

  // K = 2: the signed angle from the center towards the last objective with a pole, in degrees.
  get arc() {
    return this.poles.findLastIndex((pole) => pole !== null);
  }

  // --- More / Default / Less: +1, 0, -1 for each objective, against the server's default (or the center) ---

  levels(weights) {
    const leaning = this.leanings(weights);
    const usual = this.leanings(this.reference);
    return this.names.map((_, k) => {
      if (leaning[k] === null) return this.#anchorLevel(weights);
      const lean = leaning[k] - usual[k];
      return lean > LEANS ? 1 : lean < -LEANS ? -1 : 0;
    });
  }

  // The center's own objective: More of it is nearer to the center, and nothing can be nearer than the center is.
  canChange(weights, k) {
    return this.poles[k] !== null || norm(this.tangent(weights)) > LEANS;
  }

  withLevel(weights, k, level) {
    const u = this.tangent(weights);
    const pole = this.poles[k];
    if (!pole) return this.fromTangent(scale(u, this.#radius(level) / norm(u)));
    const usual = this.leanings(this.reference)[k];
    const target = clip(usual + NUDGE * level, -1, 1);
    const moved = add(u, pole, target - dot(u, pole));
    const others = this.levels(this.fromTangent(moved)).filter((_, j) => j !== this.anchor);
    if (others.every((value) => value === 0)) return this.reference;
    if (norm(this.tangent(this.reference)) > LEANS || norm(moved) < 0.05) return this.fromTangent(moved);
    const radius = this.anchor >= 0 ? this.#radius(this.#anchorLevel(weights)) : NUDGE;
    return this.fromTangent(scale(moved, radius / norm(moved)));
  }

  #sign() {
    return this.center[this.anchor] < 0 ? -1 : 1;
  }

  #anchorLevel(weights) {
    const radius = norm(this.tangent(weights));
    const usual = norm(this.tangent(this.reference));
    if (radius < LEANS) return 0;
    const [low, high] = usual < LEANS ? [0.55, 0.85] : [usual - LEANS, usual + LEANS];
    return this.#sign() * (radius < low ? 1 : radius > high ? -1 : 0);
  }

  #radius(level) {
    const usual = norm(this.tangent(this.reference));
    const [near, middle, far] = usual < LEANS ? [0.4, NUDGE, 1] : [usual / 2, usual, Math.min(1, usual + 0.4)];
    return [far, middle, near][this.#sign() * level + 1];
  }

  // --- in words ---

  words(weights) {
    const parts = [];
    this.leanings(weights).forEach((lean, k) => {
      if (lean === null || Math.abs(lean) < LEANS) return;
      const much = Math.abs(lean) < 0.4 ? "a little " : Math.abs(lean) < 0.8 ? "" : "much ";
      parts.push(`${much}${lean > 0 ? "more" : "less"} ${this.names[k]}`);
    });
    if (parts.length) return sentence(parts);
    return this.anchor >= 0 ? `${capital(this.names[this.anchor])} first` : "No leaning: the middle";
  }
}

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
