// Where a step's time went, by worker and by role, and how old its samples were.

import { get, runPath } from "./api.js";
import { h, number, percent, seconds, show, table, throttled } from "./dom.js";
import { gantt } from "./gantt.js";

export class Timing {
  constructor(name, signal) {
    Object.assign(this, { name, signal, step: null, whole: true, ahead: 0 });
    this.status = h("p", { class: "muted small", role: "status" });
    this.body = h("div", { class: "grid wide" });
    this.node = h("section", { id: "timing", "aria-label": "Timing" }, h("header", null, h("h2", null, "Timing"), this.status), this.body);
    this.load = throttled(300, () => this.fetch().catch(() => {}));
  }

  choose(step) {
    this.step = step;
    this.load();
  }

  newest(step) {
    if (this.step === null) this.choose(step);
  }

  /** A step's groups were recorded: the one that is shown, or a later one whose work ran beside it. */
  recorded(newest) {
    if (this.step !== null && !this.whole && newest >= this.step && newest <= this.step + this.ahead) this.load();
  }

  async fetch() {
    const step = this.step;
    const data = await get(`${runPath(this.name)}/steps/${step}`, this.signal).catch((error) => ({ error }));
    if (step !== this.step) return;
    this.status.textContent = `step ${number(step)}`;
    if (data.error || !data.lanes.length) {
      show(this.body, h("p", { class: "muted" }, "This step has no timing."));
      return;
    }
    this.whole = data.timeline?.whole ?? false;
    this.ahead = data.ahead;
    show(this.body, data.timeline ? gantt(data.timeline, step) : null, this.lanes(data), this.ages(data));
  }

  lanes({ lanes, row }) {
    const names = [...new Map(lanes.flatMap((lane) => lane.parts.map((part) => [part.phase, part.label])))];
    return h("div", { class: "panel", style: { gridColumn: "1 / -1" } }, h("h3", null, `What each role did in ${seconds(row["time/step_s"])}`),
      h("div", { class: "lanes", role: "img", "aria-label": lanes.map(told).join(". "), style: { marginTop: ".8rem" } }, lanes.map((lane) => h("div", { class: "lane" },
        h("span", null, lane.num > 1 ? `${lane.role} × ${lane.num}` : lane.role),
        h("span", { class: "bar" }, lane.parts.map((part) => h("span", { class: `p-${part.phase}`, style: { width: `${100 * part.share}%` }, title: `${part.label}: ${seconds(part.seconds)}, ${percent(part.share)}` }))),
        h("span", { class: "num muted small" }, seconds(lane.seconds))))),
      h("p", { class: "keys" }, names.map(([phase, label]) => h("span", null, h("span", { class: `swatch p-${phase}` }), label))),
      h("details", null, h("summary", null, "Table"), table(["Phase", "Seconds", "Share"], lanes.flatMap((lane) => lane.parts.map((part) => [`${lane.role}: ${part.label}`, seconds(part.seconds), percent(part.share)])), "Seconds by role and phase")));
  }

  ages({ ages, row }) {
    const total = ages.reduce((sum, one) => sum + one.samples, 0);
    if (!total) return null;
    return h("div", { class: "panel" }, h("h3", null, "Staleness: versions between drawing and training"),
      h("div", { class: "bars", style: { marginTop: ".8rem" } }, ages.map((one) => h("div", null, h("span", null, one.age === "1" ? "1 version" : `${one.age} versions`),
        h("span", { class: "track" }, h("span", { style: { width: `${(100 * one.samples) / total}%` } })), h("span", { class: "num" }, number(one.samples))))),
      h("p", { class: "muted small", style: { marginTop: ".5rem" } }, `samples of this step; mean ${number(row["staleness/mean"], 2)}, at most ${number(row["staleness/max"])}`));
  }
}

const told = (lane) => `${lane.role}: ${lane.parts.map((part) => `${part.label} ${percent(part.share)}`).join(", ")}`;
