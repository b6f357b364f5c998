// Pictures as inline SVG, one unit being one pixel: the measured front, and the dial of two objectives.

import { add, dot, norm, scale, signedDegrees } from "./space.js";

const SVG = "http://www.w3.org/2000/svg";

export function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, String(value));
  node.append(...children);
  return node;
}

// What `write` makes of a name of which there is room for `most` letters; of a longer one the title has the whole.
function label(name, most, attributes, write) {
  if (name.length <= most) return svg("text", attributes, write(name));
  return svg("text", attributes, svg("title", {}, write(name)), write(`${name.slice(0, most - 1)}…`));
}

const shown = (value) => (Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : value.toFixed(1));

// The measured points of GET /v1/dpa/space seen along one arc: `points` in keyboard order, those on the arc first.
export class Front {
  constructor(space, x) {
    this.space = space;
    this.x = x;
    this.y = space.anchor >= 0 && space.anchor !== x ? space.anchor : x === 0 ? 1 : 0;
    this.reward = space.data.front_reward === "gold" ? "true reward" : "model reward";
    const [xName, yName] = [space.names[x], space.names[this.y]];
    const known = (space.data.front ?? []).filter(
      (point) => point.objectives[xName]?.value != null && point.objectives[yName]?.value != null,
    );
    const points = known.map((point) => {
      const weights = space.weightsOf(point.weights);
      const u = space.tangent(weights);
      const lean = dot(u, space.poles[x]);
      return {
        weights,
        u,
        lean,
        words: point.words,
        onArc: norm(add(u, space.poles[x], -lean)) < 0.02,
        at: [point.objectives[xName], point.objectives[yName]],
      };
    });
    this.arc = points.filter((point) => point.onArc).sort((a, b) => a.lean - b.lean);
    this.points = [...this.arc, ...points.filter((point) => !point.onArc)];
  }

  label(point) {
    const [x, y] = point.at;
    const length = point.words == null ? "" : `, ${Math.round(point.words)} words`;
    const { names } = this.space;
    const scores = `${names[this.y]} ${shown(y.value)}, ${names[this.x]} ${shown(x.value)}`;
    return `${this.space.words(point.weights)}: ${this.reward} ${scores}${length}`;
  }

  // Where a direction should come out: at its measured point, or between its nearest ones.
  expected(weights) {
    if (!this.points.length) return null;
    const u = this.space.tangent(weights);
    const near = this.points
      .map((point) => ({ point, far: norm(add(u, point.u, -1)) }))
      .sort((a, b) => a.far - b.far);
    if (near[0].far < 0.03) return { value: near[0].point.at.map((v) => v.value), measured: near[0].point };
    const lean = dot(u, this.space.poles[this.x]);
    const off = norm(add(u, this.space.poles[this.x], -lean));
    const after = this.arc.findIndex((point) => point.lean >= lean);
    if (off < 0.03 && after > 0) {
      const [a, b] = [this.arc[after - 1], this.arc[after]];
      const share = (lean - a.lean) / (b.lean - a.lean);
      return { value: a.at.map((v, i) => v.value + share * (b.at[i].value - v.value)), measured: null };
    }
    const nearest = near.slice(0, this.space.names.length);
    const total = nearest.reduce((sum, { far }) => sum + 1 / (far * far), 0);
    const mean = (i) => nearest.reduce((sum, { point, far }) => sum + point.at[i].value / (far * far), 0) / total;
    return { value: [mean(0), mean(1)], measured: null };
  }
}

// Draw the front into `box`. `pick(weights)` is called for a click, Enter, or an arrow key on the points.
export function drawFront(box, front, weights, pick) {
  const { space } = front;
  const focused = box.contains(document.activeElement);
  const width = Math.max(240, box.clientWidth);
  const height = Math.round(Math.min(250, Math.max(196, width * 0.56)));
  const edge = { left: 44, right: 12, top: 12, bottom: 42 };
  const spread = (i) => front.points.flatMap((point) => [point.at[i].value, point.at[i].low, point.at[i].high]);
  const xs = limits(spread(0).filter((v) => v != null), 0.07);
  const ys = limits(spread(1).filter((v) => v != null), 0.08);
  const toX = (value) => edge.left + ((value - xs[0]) / (xs[1] - xs[0])) * (width - edge.left - edge.right);
  const toY = (value) => height - edge.bottom - ((value - ys[0]) / (ys[1] - ys[0])) * (height - edge.top - edge.bottom);
  const place = (point) => [toX(point.at[0].value), toY(point.at[1].value)];

  const root = svg("svg", {
    viewBox: `0 0 ${width} ${height}`,
    width,
    height,
    class: "front",
    role: "group",
    "aria-label": `Measured: ${space.names[front.y]} against ${space.names[front.x]}, by the ${front.reward}`,
  });
  // The trained arc was measured from end to end: what lies beyond all points was never asked for in training.
  if (front.arc.length > 1) {
    const ends = front.points.map((point) => toX(point.at[0].value));
    const [left, right] = [Math.min(...ends) - 9, Math.max(...ends) + 9];
    const bands = [
      [edge.left, left],
      [right, width - edge.right],
    ];
    for (const [from, to] of bands)
      if (to > from)
        root.append(
          svg("rect", { class: "untrained", x: from, y: edge.top, width: to - from, height: height - edge.top - edge.bottom }),
        );
  }
  for (const tick of ticks(...xs, Math.floor(width / 60)))
    root.append(
      svg("path", { class: "grid", d: `M${toX(tick)} ${edge.top}V${height - edge.bottom}` }),
      svg("text", { class: "tick", x: toX(tick), y: height - edge.bottom + 16, "text-anchor": "middle" }, String(tick)),
    );
  for (const tick of ticks(...ys, 4))
    root.append(
      svg("path", { class: "grid", d: `M${edge.left} ${toY(tick)}H${width - edge.right}` }),
      svg("text", { class: "tick", x: edge.left - 7, y: toY(tick) + 4, "text-anchor": "end" }, String(tick)),
    );
  const letters = (length) => Math.floor(length / 8);
  root.append(
    label(
      space.names[front.x],
      letters(width - edge.left - edge.right) - 14,
      { class: "axis", x: (edge.left + width - edge.right) / 2, y: height - 6, "text-anchor": "middle" },
      (name) => `${name}, ${front.reward} →`,
    ),
    label(
      space.names[front.y],
      letters(height - edge.top - edge.bottom) - 2,
      { class: "axis", transform: `translate(12 ${(edge.top + height - edge.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" },
      (name) => `${name} →`,
    ),
  );
  if (front.arc.length > 1)
    root.append(svg("path", { class: "arc", d: `M${front.arc.map((point) => place(point).join(" ")).join("L")}` }));

  const expected = front.expected(weights);
  const chosen = front.points.indexOf(expected?.measured);
  const group = svg("g", { role: "radiogroup", "aria-label": "Directions that were measured" });
  front.points.forEach((point, index) => {
    const [x, y] = place(point);
    const arms = [
      [toX(point.at[0].low ?? point.at[0].value), y, toX(point.at[0].high ?? point.at[0].value), y],
      [x, toY(point.at[1].low ?? point.at[1].value), x, toY(point.at[1].high ?? point.at[1].value)],
    ];
    const node = svg(
      "g",
      {
        class: point.onArc ? "point" : "point aside",
        role: "radio",
        "aria-checked": index === chosen,
        "aria-label": front.label(point),
        tabindex: index === Math.max(chosen, 0) ? 0 : -1,
      },
      svg("title", {}, front.label(point)),
      ...arms.map(([x1, y1, x2, y2]) => svg("path", { class: "arm", d: `M${x1} ${y1}L${x2} ${y2}` })),
      svg("circle", { class: "halo", cx: x, cy: y, r: 11 }),
      svg("circle", { class: "dot", cx: x, cy: y, r: point.onArc ? 4.5 : 3.5 }),
    );
    node.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
      const count = front.points.length;
      const next = step ? (index + step + count) % count : { Home: 0, End: count - 1, Enter: index, " ": index }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      pick(front.points[next].weights);
    });
    group.append(node);
  });
  if (expected) {
    const [x, y] = [toX(expected.value[0]), toY(expected.value[1])];
    const mark = svg("g", { class: expected.measured ? "here" : "here between", "aria-hidden": "true" });
    mark.append(svg("circle", { cx: x, cy: y, r: 9 }), svg("circle", { class: "heart", cx: x, cy: y, r: 3.5 }));
    group.append(mark);
  }
  root.append(group);
  root.addEventListener("click", (event) => {
    const frame = root.getBoundingClientRect();
    const at = [((event.clientX - frame.left) * width) / frame.width, ((event.clientY - frame.top) * height) / frame.height];
    const found = nearest(front, place, at);
    if (found) pick(found);
  });
  box.replaceChildren(root);
  if (focused) group.querySelector('[tabindex="0"]')?.focus({ preventScroll: true });
}

// The direction under a click: a measured point within reach, else the nearest place on the arc's line or the points.
function nearest(front, place, [x, y]) {
  const far = ([px, py]) => Math.hypot(px - x, py - y);
  const byDistance = front.points.map((point) => ({ point, far: far(place(point)) })).sort((a, b) => a.far - b.far);
  if (!byDistance.length) return null;
  let best = { far: byDistance[0].far, weights: byDistance[0].point.weights };
  if (best.far < 10) return best.weights;
  for (let i = 1; i < front.arc.length; i++) {
    const [a, b] = [place(front.arc[i - 1]), place(front.arc[i])];
    const along = add(b, a, -1);
    const length = dot(along, along);
    const share = length ? Math.min(1, Math.max(0, dot(add([x, y], a, -1), along) / length)) : 0;
    const distance = far(add(a, along, share));
    if (distance < best.far - 1e-9) {
      const lean = front.arc[i - 1].lean + share * (front.arc[i].lean - front.arc[i - 1].lean);
      best = { far: distance, weights: front.space.fromTangent(scale(front.space.poles[front.x], lean)) };
    }
  }
  return best.weights;
}

// The dial of two objectives: the center points up, positive angles lean right; only the trained cone can be chosen.
export class Dial {
  #node;
  #needle;
  #knob;
  #space;

  constructor(box, space, pick) {
    this.#space = space;
    const full = space.maxAngle > 90;
    const [cx, cy, r] = [160, 128, 96];
    this.at = (angle, radius = r) => [
      cx + radius * Math.sin((angle * Math.PI) / 180),
      cy - radius * Math.cos((angle * Math.PI) / 180),
    ];
    const point = (angle, radius) => this.at(angle, radius).map((v) => v.toFixed(2)).join(" ");
    const sector = (from, to) => `M${cx} ${cy}L${point(from)}A${r} ${r} 0 ${to - from > 180 ? 1 : 0} 1 ${point(to)}Z`;
    const cone = Math.min(space.maxAngle, 179.99);
    const limit = full ? 179.99 : 90;
    const towards = space.names[space.arc];
    this.#node = svg("svg", {
      class: "dial",
      viewBox: `0 0 320 ${full ? 250 : 150}`,
      role: "slider",
      tabindex: 0,
      "aria-label": `Direction, from less to more ${towards}`,
      "aria-valuemin": -space.maxAngle,
      "aria-valuemax": space.maxAngle,
    });
    if (cone < limit)
      this.#node.append(
        svg("path", { class: "untrained", d: sector(-limit, -cone) }),
        svg("path", { class: "untrained", d: sector(cone, limit) }),
      );
    this.#node.append(svg("path", { class: "cone", d: sector(-cone, cone) }));
    const step = space.maxAngle > 60 ? 30 : space.maxAngle > 20 ? 15 : 5;
    for (let angle = -Math.floor(cone / step) * step; angle <= cone; angle += step)
      this.#node.append(svg("path", { class: "notch", d: `M${point(angle, r)}L${point(angle, r - 7)}` }));
    for (const angle of [-cone, 0, cone]) {
      const [x, y] = this.at(angle, r + 19);
      const anchor = angle < 0 ? "end" : angle > 0 ? "start" : "middle";
      this.#node.append(svg("text", { class: "tick", x, y: y + 4, "text-anchor": anchor }, signedDegrees(angle)));
    }
    if (!full)
      for (const [x, anchor, way] of [[4, "start", "less"], [316, "end", "more"]])
        this.#node.append(label(towards, 18, { class: "tick", x, y: 145, "text-anchor": anchor }, (name) => `${way} ${name}`));
    this.#needle = svg("path", { class: "needle" });
    this.#knob = svg("circle", { class: "knob", r: 10 });
    this.#node.append(this.#needle, svg("circle", { class: "hub", cx, cy, r: 4 }), this.#knob);
    box.replaceChildren(this.#node);

    const turn = (angle) => {
      const within = Math.min(space.maxAngle, Math.max(-space.maxAngle, angle));
      pick(space.fromTangent(scale(space.poles[space.arc], within / space.maxAngle)));
    };
    const follow = (event) => {
      const frame = this.#node.getBoundingClientRect();
      const size = 320 / frame.width;
      const [x, y] = [(event.clientX - frame.left) * size - cx, (event.clientY - frame.top) * size - cy];
      if (Math.hypot(x, y) > 6) turn(Math.round((Math.atan2(x, -y) * 180) / Math.PI));
    };
    this.#node.addEventListener("pointerdown", (event) => {
      this.#node.setPointerCapture(event.pointerId);
      this.#node.focus({ preventScroll: true });
      follow(event);
      event.preventDefault();
    });
    this.#node.addEventListener("pointermove", (event) => {
      if (this.#node.hasPointerCapture(event.pointerId)) follow(event);
    });
    this.#node.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 };
      const ends = { Home: -space.maxAngle, End: space.maxAngle };
      const now = Math.round(this.angle);
      const next = event.key in ends ? ends[event.key] : event.key in steps ? now + steps[event.key] * (event.shiftKey ? 5 : 1) : null;
      if (next === null) return;
      event.preventDefault();
      turn(next);
    });
  }

  show(weights) {
    const space = this.#space;
    this.angle = dot(space.tangent(weights), space.poles[space.arc]) * space.maxAngle;
    const [x, y] = this.at(this.angle);
    const [hx, hy] = this.at(this.angle, 0);
    this.#needle.setAttribute("d", `M${hx} ${hy}L${x} ${y}`);
    this.#knob.setAttribute("cx", x);
    this.#knob.setAttribute("cy", y);
    this.#node.setAttribute("aria-valuenow", Math.round(this.angle));
    this.#node.setAttribute("aria-valuetext", `${signedDegrees(this.angle)}, ${space.words(weights)}`);
  }
}

function limits(values, share) {
  if (!values.length) return [0, 1];
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const margin = share * (high - low) || 0.5;
  return [low - margin, high + margin];
}

function ticks(low, high, about) {
  const raw = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(Number((n * step).toPrecision(10)));
  return found;
}
