// The group browser: a step's prompts, the siblings of each side by side, and everything known of one of them.

import { get, pictureUrl, runPath } from "./api.js";
import { foreign, h, number, plainText, reward, seconds, show, signed, throttled } from "./dom.js";

const FIRST_GROUPS = 6;
const SMALL_PICTURE = 160;
const ORDERS = {
  drawn: () => 0,
  reward: (a, b) => (b.total ?? -Infinity) - (a.total ?? -Infinity),
};

export class Groups {
  constructor(name, data, signal, chosen) {
    Object.assign(this, { name, signal, chosen, kind: "train", step: null, order: "drawn", following: true, all: false });
    this.list = h("div", { "aria-live": "polite", "aria-busy": "false" });
    this.status = h("p", { class: "muted small", role: "status" });
    this.number = h("input", { type: "number", id: "group-step", min: 0, onchange: () => this.choose(Number(this.number.value)) });
    this.slider = h("input", { type: "range", min: 0, "aria-label": "Recorded step", oninput: () => this.choose(this.steps()[Number(this.slider.value)]) });
    this.follow = h("input", { type: "checkbox", checked: true, onchange: () => { this.following = this.follow.checked; if (this.following) this.choose(null); } });
    this.kinds = this.segmented("Kind", { train: "Training", eval: "Held out" }, "kind", () => this.choose(null));
    this.orders = this.segmented("Order", { drawn: "As drawn", reward: "By reward" }, "order", () => this.paint());
    const step = (by) => () => this.choose(this.steps()[this.place() + by]);
    this.back = h("button", { type: "button", "aria-label": "Previous recorded step", onclick: step(-1) }, "‹");
    this.on = h("button", { type: "button", "aria-label": "Next recorded step", onclick: step(1) }, "›");
    this.node = h("section", { id: "groups", "aria-label": "Groups" }, h("header", null, h("h2", null, "Groups"), this.status),
      h("div", { class: "controls" }, this.kinds, h("span", { class: "steps" }, h("label", { for: "group-step" }, "Step"), this.back, this.number, this.on),
        this.slider, h("label", null, this.follow, "newest"), this.orders), this.list);
    this.dialog = new SampleDialog(name);
    this.node.append(this.dialog.node);
    this.load = throttled(250, () => this.fetch().catch((error) => { if (!this.signal.aborted) this.status.textContent = plainText(error.message); }));
    this.know(data.records);
  }

  segmented(label, names, field, after) {
    const buttons = Object.entries(names).map(([value, text]) => h("button", { type: "button", "aria-pressed": String(this[field] === value), onclick: () => {
      this[field] = value;
      for (const [place, one] of buttons.entries()) one.setAttribute("aria-pressed", String(Object.keys(names)[place] === value));
      after();
    } }, text));
    return h("span", { class: "segmented", role: "group", "aria-label": label }, buttons);
  }

  know(records) {
    this.records = Object.fromEntries(Object.entries(records).map(([kind, ranges]) => [kind, ranges.flatMap(([first, last, stride]) => {
      const found = [];
      for (let step = first; step <= last; step += stride || 1) found.push(step);
      return found;
    })]));
    this.controls();
  }

  steps() { return this.records[this.kind] ?? []; }

  place() {
    const found = this.steps().findIndex((one) => one >= this.step);
    return found < 0 ? this.steps().length - 1 : found;
  }

  arrived(newest) {
    for (const [kind, step] of Object.entries(newest)) {
      const known = this.records[kind];
      if (step >= 0 && (known.at(-1) ?? -1) < step) known.push(step);
    }
    if (this.following) this.choose(null);
    else this.controls();
  }

  /** The step to show, or the nearest that is recorded; null for the newest. */
  choose(step, kind) {
    if (kind && kind !== this.kind) this.kinds.children[kind === "train" ? 0 : 1].click();
    const steps = this.steps();
    if (!steps.length) {
      this.step = null;
      this.data = null;
      this.controls();
      show(this.list, h("p", { class: "muted" }, this.kind === "train" ? "No groups are recorded of this run." : "No held-out groups are recorded of this run."));
      return;
    }
    const wanted = step ?? steps.at(-1);
    this.step = steps.reduce((best, one) => (Math.abs(one - wanted) < Math.abs(best - wanted) ? one : best));
    if (step !== null && step !== undefined) { this.following = this.step === steps.at(-1) && this.following; this.follow.checked = this.following; }
    this.all = false;
    this.controls();
    this.load();
    if (this.kind === "train") this.chosen(this.step);
  }

  controls() {
    const steps = this.steps();
    const place = this.place();
    this.number.value = this.step ?? "";
    this.slider.max = Math.max(0, steps.length - 1);
    this.slider.value = Math.max(0, place);
    this.slider.setAttribute("aria-valuetext", `step ${this.step ?? "none"}`);
    this.back.disabled = place <= 0;
    this.on.disabled = place >= steps.length - 1;
    this.slider.disabled = this.number.disabled = steps.length < 2;
  }

  async fetch() {
    if (this.step === null) return;
    const [kind, step] = [this.kind, this.step];
    this.list.setAttribute("aria-busy", "true");
    const data = await get(`${runPath(this.name)}/groups/${kind}/${step}`, this.signal);
    if (kind !== this.kind || step !== this.step) return;
    this.data = data;
    this.paint();
  }

  paint() {
    if (!this.data) return;
    const { groups, num_groups: total, num_skipped: skipped, step, kind } = this.data;
    const shown = this.all ? groups : groups.slice(0, FIRST_GROUPS);
    const siblings = groups.reduce((sum, group) => sum + group.samples.length, 0);
    this.status.textContent = `step ${number(step)}: ${number(groups.length)}${total > groups.length ? ` of ${number(total)}` : ""} groups, ${number(siblings)} samples${skipped ? ` · ${number(skipped)} steps were not recorded, as writing fell behind` : ""}`;
    show(this.list, shown.map((group) => this.article(group)), shown.length < groups.length ? h("button", { type: "button", onclick: () => { this.all = true; this.paint(); } }, `Show all ${groups.length} groups`) : null);
    this.list.dataset.step = String(step);
    this.list.dataset.kind = kind;
    this.list.setAttribute("aria-busy", "false");
  }

  article(group) {
    const samples = [...group.samples].sort(ORDERS[this.order]);
    const scored = samples.map((one) => one.total).filter((one) => one !== null);
    const mean = scored.reduce((sum, one) => sum + one, 0) / scored.length;
    const flat = scored.length > 1 && scored.every((one) => one === scored[0]);
    const most = Math.max(1e-9, ...samples.map((one) => Math.abs(one.advantage ?? 0)));
    const isText = samples.some((one) => "text" in one);
    const open = (place) => () => this.dialog.open(group, samples, place, this.data.kind, this.data.step);
    return h("article", { class: "group panel" },
      h("header", null, h("h3", null, foreign(group.prompt.text)), h("p", { class: "muted small" }, scored.length ? `mean ${reward(mean)}` : "no rewards", flat ? h("span", { class: "warn" }, " · all alike, no signal") : "", ` · visit ${number(group.visit)}`)),
      h("ul", { class: `samples${isText ? " texts" : ""}` }, samples.map((sample, place) => h("li", null,
        h("button", { type: "button", class: "sample", onclick: open(place), "aria-label": spoken(sample) }, sampleBody(this.name, this.data.kind, this.data.step, sample, most))))),
      group.drafts ? this.drafts(group) : null);
  }

  drafts(group) {
    const chosen = group.drafts.filter((one) => one.chosen).length;
    return h("details", { class: "drafts" }, h("summary", null, `${group.drafts.length} drafts, ${chosen} chosen${group.redrawn ? " and drawn again" : ""}`),
      h("ul", null, group.drafts.map((one) => h("li", { class: one.chosen ? "chosen" : null },
        one.picture ? h("img", { src: pictureUrl(this.name, this.data.kind, this.data.step, one.picture), alt: "", class: "small", loading: "lazy" }) : null,
        `${one.index}: ${reward(one.total)} ${one.chosen ? "chosen" : "dropped"}`))));
  }
}

function spoken(sample) {
  const credit = sample.advantage === null ? "" : `, advantage ${signed(sample.advantage, 2)}`;
  const text = "text" in sample ? `: ${plainText(sample.text).slice(0, 120)}` : "";
  return `Sample ${sample.index}, ${sample.failure ? `failed, ${plainText(sample.failure.kind)}` : `reward ${reward(sample.total)}`}${credit}${text}`;
}

export function sampleBody(name, kind, step, sample, most = null) {
  const credit = sample.advantage;
  return [
    sample.picture ? picture(name, kind, step, sample) : "text" in sample ? h("span", { class: "text" }, foreign(sample.text)) : null,
    sample.failure ? h("span", { class: sample.picture || "text" in sample ? "foot bad" : "empty" }, foreign(sample.failure.kind)) : null,
    sample.failure ? null : h("span", { class: "foot" }, h("b", null, reward(sample.total)), credit === null ? null : h("span", { class: "muted" }, signed(credit, 2))),
    most === null || credit === null ? null : h("span", { class: "credit", "aria-hidden": "true" }, h("span", {
      class: credit < 0 ? "down" : "up",
      style: { width: `${(50 * Math.abs(credit)) / most}%`, left: credit < 0 ? `${50 - (50 * Math.abs(credit)) / most}%` : "50%" },
    })),
  ];
}

function picture(name, kind, step, sample) {
  const [, , width, height] = sample.picture;
  return h("img", { src: pictureUrl(name, kind, step, sample.picture), width, height, loading: "lazy", decoding: "async",
    class: Math.max(width, height) < SMALL_PICTURE ? "small" : null, alt: `sample ${sample.index}` });
}

class SampleDialog {
  constructor(name) {
    this.name = name;
    this.title = h("h2", { id: "sample-title" });
    this.body = h("div", { class: "body" });
    this.back = h("button", { type: "button", "aria-label": "Previous sample", onclick: () => this.move(-1) }, "‹");
    this.on = h("button", { type: "button", "aria-label": "Next sample", onclick: () => this.move(1) }, "›");
    this.node = h("dialog", { "aria-labelledby": "sample-title", onkeydown: (event) => {
      if (event.key === "ArrowLeft") this.move(-1);
      if (event.key === "ArrowRight") this.move(1);
    }, onclick: (event) => { if (event.target === this.node) this.node.close(); } },
    h("header", null, this.title, this.back, this.on, h("button", { type: "button", onclick: () => this.node.close() }, "Close")), this.body);
  }

  open(group, samples, place, kind, step) {
    Object.assign(this, { group, samples, place, kind, step });
    this.paint();
    this.node.showModal();
  }

  move(by) {
    const next = this.place + by;
    if (next < 0 || next >= this.samples.length) return;
    this.place = next;
    this.paint();
  }

  paint() {
    const sample = this.samples[this.place];
    this.title.textContent = `Sample ${sample.index} of step ${number(this.step)}`;
    this.back.disabled = this.place === 0;
    this.on.disabled = this.place === this.samples.length - 1;
    const [run, prompt, visit, index] = sample.key;
    const [oldest, newest] = sample.versions;
    const facts = [
      ["Reward", reward(sample.total)], ["Advantage", sample.advantage === null ? "not credited" : signed(sample.advantage, 4)],
      ["Weights", oldest === newest ? `version ${oldest}` : `versions ${oldest} to ${newest}`], ["Age", sample.age === null ? "–" : sample.age === 1 ? "1 version" : `${sample.age} versions`],
      ["Key", `seed ${run} / ${plainText(prompt)} / visit ${visit} / sample ${index}`],
      ...("nfe" in sample ? [["Calls (NFE)", number(sample.nfe)]] : []), ...(sample.gamma !== null && sample.gamma !== undefined ? [["Entropy budget", number(sample.gamma)]] : []),
      ...this.wanted(),
    ];
    const draft = this.group.drafts?.find((one) => one.index === sample.index);
    if (draft) facts.push(["Draft", `${reward(draft.total)}, chosen of ${this.group.drafts.length}${this.group.redrawn ? ", drawn again" : ""}`]);
    show(this.body, sample.picture ? picture(this.name, this.kind, this.step, sample) : null,
      h("div", null, h("h3", null, "Prompt"), h("p", { class: "prose" }, foreign(this.group.prompt.text))),
      "text" in sample ? h("div", null, h("h3", null, "Answer"), h("p", { class: "prose" }, foreign(sample.text))) : null,
      sample.failure ? h("p", { class: "bad" }, `Failed: `, foreign([sample.failure.kind, sample.failure.reward, sample.failure.message].filter(Boolean).join(" · "))) : null,
      h("dl", null, facts.map(([name, value]) => [h("dt", null, name), h("dd", null, foreign(value))])),
      sample.scores.map((score) => scoreView(score)));
  }

  wanted() {
    const metadata = Object.entries(this.group.metadata ?? {}).filter(([, value]) => typeof value === "string" || typeof value === "number");
    return metadata.slice(0, 6).map(([name, value]) => [plainText(name), String(value)]);
  }
}

function scoreView(score) {
  const { reasoning, ...details } = score.details ?? {};
  const plain = Object.entries(details);
  return h("div", { class: "score" },
    h("header", null, h("h3", null, foreign(score.name)), h("span", { class: "muted small" }, [score.weight === null || score.weight === 1 ? "" : `weight ${number(score.weight)} · `, seconds(score.seconds), score.cache === "hit" ? " · remembered" : ""].join("")),
      h("b", { class: score.error ? "bad" : null }, score.error ? "failed" : reward(score.value))),
    score.error ? h("p", { class: "bad" }, foreign(`${score.error.code}: ${score.error.message}`)) : null,
    reasoning ? h("p", { class: "prose", "aria-label": "The judge's reasoning" }, foreign(reasoning)) : null,
    plain.length ? h("dl", null, plain.map(([name, value]) => [h("dt", null, plainText(name)), h("dd", null, foreign(typeof value === "string" ? value : typeof value === "number" ? number(value) : JSON.stringify(value, null, 1)))])) : null);
}
