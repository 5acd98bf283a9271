// Line charts with bands: drawn as SVG in the page's own pixels, read by pointer and by keys, with a table behind each.

import { h, number, show, svg, table } from "./dom.js";

const MARGIN = { left: 52, right: 10, top: 8, bottom: 22 };
const TABLE_ROWS = 40;

export class Chart {
  /** series: [{ label, style, dots, curve: { x, y, low, high } }]; pick(step) is told of a chosen step. */
  constructor({ title, series, height = 200, pick = null, floor = null, xLabel = "step" }) {
    Object.assign(this, { title, series, height, pick, floor, xLabel, place: null });
    this.svg = svg("svg", { class: "chart", tabindex: "0", role: "img", height });
    this.readout = h("p", { class: "readout", "aria-live": "polite" });
    this.details = h("details", { ontoggle: () => this.fillTable() }, h("summary", null, "Table"));
    this.node = h("figure", { class: "panel" }, h("figcaption", null, h("h3", null, title), this.legends()), this.svg, h("div", { class: "chart-foot" }, this.readout, this.details));
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.mark(null));
    this.svg.addEventListener("click", (event) => { this.point(event); this.choose(); });
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.svg.addEventListener("blur", () => this.mark(null));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  legends() {
    if (this.series.length < 2 && !this.series[0]?.note) return [];
    return this.series.map((one) => h("span", { class: "legend" },
      svg("svg", { viewBox: "0 0 18 8", "aria-hidden": "true" }, svg("path", { d: "M0 4H18", class: `line s${one.style}` })), one.label));
  }

  set(curves) {
    this.series.forEach((one, place) => { if (curves[place]) one.curve = curves[place]; });
    this.draw();
  }

  /** A new step at the end of each series that has it; its width is half that of the 95 % interval, if known. */
  append(place, step, value, width) {
    const curve = this.series[place].curve;
    const last = curve.x.length - 1;
    const at = last >= 0 && curve.x[last] === step ? last : last + 1;
    if (last >= 0 && step < curve.x[last]) return;
    curve.x[at] = step;
    curve.y[at] = value;
    if (curve.band) {
      curve.low[at] = width === undefined ? value : value - width;
      curve.high[at] = width === undefined ? value : value + width;
    }
    this.draw();
  }

  draw() {
    if (this.queued) return;
    this.queued = true;
    requestAnimationFrame(() => { this.queued = false; this.paint(); });
  }

  paint() {
    const width = this.svg.clientWidth;
    if (!width) return;
    this.scale(width);
    const { left, right, top, bottom } = MARGIN;
    const parts = [];
    for (const tick of ticks(this.y0, this.y1, Math.max(3, Math.round(this.height / 42)))) {
      const y = this.toY(tick);
      parts.push(svg("line", { class: "axis", x1: left, x2: width - right, y1: y, y2: y }),
        svg("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, label(tick)));
    }
    for (const tick of ticks(this.x0, this.x1, Math.max(2, Math.floor(width / 110)), true)) {
      const x = this.toX(tick);
      const anchor = x > width - right - 14 ? "end" : x < left + 14 ? "start" : "middle";
      parts.push(svg("text", { x, y: this.height - 6, "text-anchor": anchor }, label(tick)));
    }
    for (const one of this.series) parts.push(this.band(one), this.line(one));
    this.cross = svg("g", { "aria-hidden": "true" });
    show(this.svg, parts, this.cross);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.svg.setAttribute("aria-label", this.summary());
    this.node.dataset.points = String(Math.max(0, ...this.series.map((one) => one.curve.x.length)));
    this.node.dataset.last = String(this.x1);
    this.fillTable();
    if (top + bottom > this.height) throw new Error("a chart must be higher than its margins");
  }

  scale(width) {
    const xs = this.series.flatMap(({ curve }) => curve.x.length ? [curve.x[0], curve.x[curve.x.length - 1]] : []);
    let low = Infinity;
    let high = -Infinity;
    for (const { curve } of this.series) {
      for (let i = 0; i < curve.y.length; i += 1) {
        low = Math.min(low, curve.y[i], curve.low[i] ?? Infinity);
        high = Math.max(high, curve.y[i], curve.high[i] ?? -Infinity);
      }
    }
    if (!Number.isFinite(low)) [low, high] = [0, 1];
    if (this.floor !== null) low = Math.min(low, this.floor);
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    this.x0 = xs.length ? Math.min(...xs) : 0;
    this.x1 = xs.length ? Math.max(...xs) : 1;
    if (this.x0 === this.x1) { this.x0 -= 0.5; this.x1 += 0.5; }
    this.y0 = this.floor !== null && low >= this.floor ? low : low - room;
    this.y1 = high + room;
    const { left, right, top, bottom } = MARGIN;
    this.toX = (x) => left + ((x - this.x0) / (this.x1 - this.x0)) * (width - left - right);
    this.toY = (y) => this.height - bottom - ((y - this.y0) / (this.y1 - this.y0)) * (this.height - top - bottom);
  }

  line({ curve, style, dots }) {
    const d = curve.x.map((x, i) => `${i ? "L" : "M"}${this.toX(x).toFixed(1)} ${this.toY(curve.y[i]).toFixed(1)}`).join("");
    const few = dots && curve.x.length <= 80 || curve.x.length === 1;
    const marks = few ? curve.x.map((x, i) => svg("circle", { cx: this.toX(x).toFixed(1), cy: this.toY(curve.y[i]).toFixed(1), r: 2.6, class: `f${style}` })) : [];
    return [svg("path", { d, class: `line s${style}` }), marks];
  }

  band({ curve, style }) {
    if (!curve.low.length) return null;
    const there = curve.x.map((_, i) => i).filter((i) => curve.low[i] !== null && curve.low[i] !== undefined);
    const at = (i, side) => `${this.toX(curve.x[i]).toFixed(1)} ${this.toY(side[i]).toFixed(1)}`;
    const up = there.map((i) => at(i, curve.high));
    const down = there.toReversed().map((i) => at(i, curve.low));
    return there.length > 1 ? svg("path", { d: `M${[...up, ...down].join("L")}Z`, class: `band f${style}` }) : null;
  }

  summary() {
    const told = this.series.filter(({ curve }) => curve.x.length).map(({ label: name, curve }) =>
      `${name}: from ${number(curve.y[0])} at ${this.xLabel} ${number(curve.x[0])} to ${number(curve.y.at(-1))} at ${this.xLabel} ${number(curve.x.at(-1))}`);
    return `${this.title}. ${told.join("; ") || "no values yet"}. Arrow keys read single steps.`;
  }

  places() {
    return [...new Set(this.series.flatMap(({ curve }) => curve.x))].sort((a, b) => a - b);
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    const x = this.x0 + ((event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right)) * (this.x1 - this.x0);
    const places = this.places();
    if (places.length) this.mark(places.reduce((best, one) => (Math.abs(one - x) < Math.abs(best - x) ? one : best)));
  }

  key(event) {
    const places = this.places();
    const now = places.indexOf(this.place);
    const jump = { ArrowLeft: now - 1, ArrowRight: now + 1, PageUp: now - 10, PageDown: now + 10, Home: 0, End: places.length - 1 }[event.key];
    if (event.key === "Enter" || event.key === " ") this.choose();
    else if (event.key === "Escape") this.mark(null);
    else if (jump !== undefined && places.length) this.mark(places[now < 0 && event.key === "ArrowLeft" ? places.length - 1 : Math.max(0, Math.min(places.length - 1, jump))]);
    else return;
    event.preventDefault();
  }

  choose() {
    if (this.pick && this.place !== null) this.pick(Math.round(this.place));
  }

  mark(place) {
    this.place = place;
    if (!this.cross) return;
    if (place === null) {
      show(this.cross);
      this.readout.textContent = "";
      return;
    }
    const x = this.toX(place);
    const found = this.series.map((one) => ({ one, i: nearest(one.curve.x, place) })).filter(({ i }) => i >= 0);
    show(this.cross, svg("line", { class: "cross", x1: x, x2: x, y1: MARGIN.top, y2: this.height - MARGIN.bottom }),
      found.map(({ one, i }) => svg("circle", { cx: this.toX(one.curve.x[i]), cy: this.toY(one.curve.y[i]), r: 3.5, class: `f${one.style}` })));
    const told = found.map(({ one, i }) => `${one.label} ${number(one.curve.y[i])}${interval(one.curve, i)}`);
    this.readout.textContent = `${this.xLabel} ${number(Math.round(place))}: ${told.join(" · ")}`;
  }

  fillTable() {
    if (!this.details.open) return;
    const all = this.places();
    const stride = Math.ceil(all.length / TABLE_ROWS) || 1;
    const rows = all.filter((_, i) => i % stride === 0 || i === all.length - 1).map((x) => [number(Math.round(x)), ...this.series.map(({ curve }) => {
      const i = nearest(curve.x, x);
      return i < 0 ? "–" : number(curve.y[i]) + interval(curve, i);
    })]);
    const [summary] = this.details.children;
    show(this.details, summary, table([this.xLabel, ...this.series.map((one) => one.label)], rows, `${this.title}, as numbers`));
  }
}

export function spark(values, className = "spark") {
  const low = Math.min(...values);
  const high = Math.max(...values);
  const y = (value) => 25 - (high > low ? (value - low) / (high - low) : 0.5) * 22;
  const d = values.map((value, i) => `${i ? "L" : "M"}${((i / Math.max(1, values.length - 1)) * 108 + 1).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  return svg("svg", { class: className, viewBox: "0 0 110 28", "aria-hidden": "true" }, values.length > 1 ? svg("path", { d, class: "line s0" }) : null);
}

export const emptyCurve = () => ({ x: [], y: [], low: [], high: [], band: "" });

function nearest(xs, x) {
  if (!xs.length) return -1;
  let best = 0;
  for (let i = 1; i < xs.length; i += 1) if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
  const spacing = xs.length > 1 ? (xs[xs.length - 1] - xs[0]) / (xs.length - 1) : 0;
  return Math.abs(xs[best] - x) <= Math.max(spacing / 2, 1e-9) ? best : -1;
}

function interval(curve, i) {
  if (!curve.low.length || curve.low[i] === null || curve.low[i] === undefined) return "";
  return ` (${number(curve.low[i])} to ${number(curve.high[i])})`;
}

function ticks(low, high, count, whole = false) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough) ?? 10 * power;
  const size = whole ? Math.max(1, Math.round(step)) : step;
  const found = [];
  for (let tick = Math.ceil(low / size) * size; tick <= high + size * 1e-9; tick += size) found.push(Math.abs(tick) < size * 1e-9 ? 0 : tick);
  return found;
}

function label(value) {
  const size = Math.abs(value);
  if (size >= 1e4 || (size > 0 && size < 1e-3)) return value.toExponential(0).replace("e+", "e").replace("-", "−");
  return String(Number(value.toPrecision(3))).replace("-", "−");
}
