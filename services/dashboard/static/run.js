// One run: how it goes at a glance, its curves, groups, timing, failures and settings; live while it goes on.

import { follow, get, runPath } from "./api.js";
import { Chart, emptyCurve } from "./chart.js";
import { foreign, h, number, percent, plainText, reward, seconds, show, signed, throttled } from "./dom.js";
import { failuresSection, frontierSection, settingsSection } from "./extras.js";
import { Groups, sampleBody } from "./groups.js";
import { Timing } from "./timing.js";

const POINTS = 300;
const OVERVIEW_MS = 1500;

// Small charts, in the order of the page: a title, which metrics, and whether zero is the floor.
const SMALL = [
  ["Diversity of held-out samples", ["eval/diversity"], 0],
  ["Spread of rewards within groups", ["reward/std_within_group"], 0],
  ["Calls of the network per text (NFE)", ["nfe/mean", "eval/nfe"], 0],
  ["Entropy budget", ["gamma/mean", "eval/gamma"], 0],
  ["Loss", ["loss"], null],
  ["Distance from the reference (KL)", ["loss/kl"], 0],
  ["Gradient norm", ["grad/norm"], 0],
  ["Ratios that are clipped", ["ratio/clip_fraction"], 0],
  ["Parity gap", ["parity/gap"], 0],
  ["Staleness (versions)", ["staleness/mean", "staleness/max"], 0],
  ["Samples per second", ["throughput/samples_per_s"], 0],
  ["Seconds per step", ["time/step_s"], 0],
];

// What the guard did, scaled and compared; its levels are the other metrics of that name.
const GUARD_FACTS = /^guard\/(did_|tripped$|agreement$|lr_scale$|kl_scale$)/;

export async function runView(name, context) {
  await new RunPage(name, context).open();
}

class RunPage {
  constructor(name, { main, signal, say }) {
    Object.assign(this, { name, main, signal, say });
    this.head = h("div");
    this.alerts = h("div", { "aria-live": "polite" });
    this.glance = h("div", { class: "glance" });
    this.latest = h("div", { class: "panel", style: { marginTop: "1rem" } });
    this.curves = h("section", { id: "curves", "aria-label": "Curves" });
    this.charts = [];
    this.refresh = throttled(OVERVIEW_MS, () => this.overview().catch(() => {}));
  }

  async open() {
    const path = runPath(this.name);
    this.data = await get(path, this.signal);
    this.pick = (step) => { this.groups.choose(step); this.groups.node.scrollIntoView({ block: "start" }); };
    this.groups = new Groups(this.name, this.data, this.signal, (step) => this.timing.choose(step));
    this.timing = new Timing(this.name, this.signal);
    const [failures, frontier, settings] = [failuresSection(this.name, this.data, this.signal, (step, kind) => this.groups.choose(step, kind)),
      frontierSection(this.name, this.signal), settingsSection(this.name, this.data, this.signal)];
    this.failures = failures;
    show(this.main, this.head, this.alerts, this.glance, this.latest, this.curves, this.groups.node, this.timing.node, failures.node, frontier, settings);
    this.top();
    await this.drawCurves(chartsOf(this.data));
    this.groups.choose(null);
    this.showLatest();
    follow(this.name, this.data.step, {
      rows: (rows) => this.rows(rows),
      groups: (newest) => { this.groups.arrived(newest); this.timing.recorded(newest.train); this.showLatest(newest); },
      changed: this.refresh,
      reload: () => { if (!this.signal.aborted) dispatchEvent(new HashChangeEvent("hashchange")); },
      connection: (state) => this.say(state === "connected" ? (this.data.live ? "Live" : "Up to date") : state === "reconnecting" ? "Reconnecting …" : ""),
    }, this.signal);
  }

  async overview() {
    this.data = await get(runPath(this.name), this.signal);
    this.top();
    this.groups.know(this.data.records);
    this.failures.update(this.data);
    const charts = chartsOf(this.data);
    if (charts.wanted.join() !== this.drawn) await this.drawCurves(charts); // metrics that were not there at first
  }

  rows(rows) {
    for (const row of rows) this.data.step = Math.max(this.data.step, row.step);
    this.extend(rows);
    this.meanwhile?.push(...rows);
    this.title();
    this.timing.newest(rows.at(-1).step);
    this.refresh();
  }

  extend(rows) {
    for (const row of rows) {
      for (const { chart, keys } of this.charts) {
        keys.forEach((key, place) => { if (key in row) chart.append(place, row.step, row[key], row[`ci95/${key}`]); });
      }
    }
  }

  top() {
    this.title();
    const { alerts } = this.data;
    show(this.alerts, alerts.length ? h("ul", { class: "alerts", "aria-label": "Alerts" }, alerts.map((one) =>
      h("li", { class: one.level }, h("strong", null, one.title), foreign(one.text), h("span", { class: "muted small" }, `  step ${number(one.step)}`)))) : null);
    show(this.glance, learning(this.data), hacking(this.data), slow(this.data), failed(this.data));
  }

  title() {
    const { data } = this;
    const share = data.num_steps ? Math.min(1, data.step / data.num_steps) : 0;
    show(this.head,
      h("div", { class: "title" }, h("h1", null, foreign(this.name)), h("span", { class: `chip ${data.status}` }, plainText(data.status))),
      h("p", { class: "sub" }, `step `, h("span", { id: "step-now" }, number(data.step)), data.num_steps ? ` of ${number(data.num_steps)}` : "",
        ` · ${seconds(data.seconds)} · ${plainText(data.algorithm)} · ${plainText(data.model)}`, data.origin ? ` · forked from step ${number(data.origin.step)}` : ""),
      h("div", { class: "progress", role: "progressbar", "aria-label": "Steps done", "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": Math.round(100 * share) },
        h("span", { style: { width: `${100 * share}%` } })),
      h("nav", { class: "jump", "aria-label": "Sections" }, [["curves", "Curves"], ["groups", "Groups"], ["timing", "Timing"], ["failures", "Failures"], ["settings", "Settings"]].map(([id, text]) =>
        h("a", { href: `#${id}`, onclick: (event) => { event.preventDefault(); document.getElementById(id)?.scrollIntoView(); } }, text))));
  }

  async drawCurves({ main, metrics, small, wanted }) {
    this.drawn = wanted.join();
    this.meanwhile = []; // rows that come while the curves do
    const { series } = await get(`${runPath(this.name)}/series?points=${POINTS}&keys=${wanted.map(encodeURIComponent).join(",")}`, this.signal);
    this.charts = [];
    const add = (title, keys, options = {}) => {
      const chart = new Chart({ title, pick: this.pick, ...options, series: keys.map((key, place) => ({
        label: naming(key), style: options.styles?.[place] ?? place, dots: key.startsWith("eval/"), curve: series[key] ?? emptyCurve() })) });
      this.charts.push({ chart, keys });
      return chart.node;
    };
    const wide = [add("Reward: in training and held out", main, { height: 260, styles: [1, 0, 2, 3] })];
    if (metrics.length) wide.push(add("Held-out metrics, not trained on", metrics, { height: 260 }));
    show(this.curves, h("header", null, h("h2", null, "Curves"), h("p", { class: "muted small" }, "Bands: 95 % interval of the mean, where a run recorded it; else the range of the steps a point stands for.")),
      h("div", { class: "grid wide" }, wide), h("div", { class: "grid", style: { marginTop: "1rem" } }, small.map(([title, keys, floor]) => add(title, keys, { height: 150, floor }))));
    this.extend(this.meanwhile);
    this.meanwhile = null;
    this.addAny();
  }

  addAny() {
    const select = h("select", { id: "any-metric", onchange: async () => {
      const key = select.value;
      if (!key) return;
      const { series } = await get(`${runPath(this.name)}/series?points=${POINTS}&keys=${encodeURIComponent(key)}`, this.signal);
      const chart = new Chart({ title: key, pick: this.pick, height: 200, series: [{ label: key, style: 0, dots: false, curve: series[key] ?? emptyCurve() }] });
      this.charts = this.charts.filter((one) => one.any !== true);
      this.charts.push({ chart, keys: [key], any: true });
      show(place, chart.node);
    } }, h("option", { value: "" }, "choose …"), this.data.keys.map((key) => h("option", { value: key }, key)));
    const place = h("div", { style: { marginTop: "1rem" } });
    this.curves.append(h("p", { class: "controls", style: { margin: "1rem 0 0" } }, h("label", { for: "any-metric" }, "Any other metric"), select), place);
  }

  async showLatest(newest) {
    const ranges = this.data.records.train;
    const step = newest?.train ?? ranges.at(-1)?.[1] ?? -1;
    if (step < 0) {
      show(this.latest, h("h2", null, "What it makes"), h("p", { class: "muted" }, "No groups are recorded yet."));
      return;
    }
    const record = await get(`${runPath(this.name)}/groups/train/${step}`, this.signal).catch(() => null);
    if (!record || !record.groups.length) return;
    // The first whose siblings were told apart: most is to be seen there.
    const group = record.groups.find(({ samples }) => new Set(samples.map((one) => one.total)).size > 1) ?? record.groups[0];
    const isText = group.samples.some((one) => "text" in one);
    const shown = [...group.samples].sort((a, b) => (b.total ?? -Infinity) - (a.total ?? -Infinity)).slice(0, isText ? 4 : 12);
    show(this.latest, h("header", { class: "title" }, h("h2", null, `What it makes at step ${number(step)}`), h("a", { href: "#groups", onclick: (event) => { event.preventDefault(); this.groups.choose(step); document.getElementById("groups").scrollIntoView(); } }, "all groups")),
      h("p", { class: "muted", style: { margin: ".1rem 0 .6rem" } }, foreign(group.prompt.text)),
      h("ul", { class: `samples${isText ? " texts" : ""}`, id: "latest" }, shown.map((one) => h("li", null, h("div", { class: "sample panel" }, sampleBody(this.name, "train", step, one))))));
  }
}

// Which charts there are, by the metrics that a run has so far.
function chartsOf(data) {
  const heldout = data.rewards.map((one) => `eval/${one}`);
  const metrics = data.held_out_metrics.map((one) => `eval/${one}`).slice(0, 4);
  const guard = data.keys.filter((key) => key.startsWith("guard/") && !GUARD_FACTS.test(key)).slice(0, 4);
  const small = [...SMALL, ["Hacking guard: 1 is the limit", guard, 0]]
    .map(([title, keys, floor]) => [title, keys.filter((key) => data.keys.includes(key)), floor]).filter(([, keys]) => keys.length);
  const main = ["reward/mean", ...heldout.slice(0, 3)];
  const wanted = [...new Set([...main, ...metrics, ...small.flatMap(([, keys]) => keys)])].slice(0, 40);
  return { main, metrics, small, wanted };
}

function naming(key) {
  if (["reward/mean", "nfe/mean", "gamma/mean"].includes(key)) return "training";
  if (key.startsWith("staleness/")) return key.slice(10);
  return key.startsWith("eval/") ? `held-out ${key.slice(5)}` : key;
}

function card(title, figure, kind, ...lines) {
  return h("div", { class: "panel" }, h("h2", null, title), h("p", { class: `figure ${kind}` }, figure), lines.map((line) => line && h("p", { class: "muted small" }, line)));
}

function learning(data) {
  const shown = data.heldout.find((one) => one.name === data.headline);
  const figure = ({ first, last }) => [reward(last), " ", first === null || last === null ? null
    : h("span", { class: `small ${last > first ? "good" : last < first ? "bad" : ""}` }, signed(last - first))];
  if (shown && shown.step > 0) {
    return card("Does it learn?", figure(shown), "", `held-out ${shown.name}, was ${reward(shown.first)}`,
      `training reward ${reward(data.reward.last)}, was ${reward(data.reward.first)}`);
  }
  // Until it is evaluated anew, training is all there is to go by.
  return card("Does it learn?", figure(data.reward), "", data.reward.first === null ? "no step yet" : `training reward, was ${reward(data.reward.first)}`,
    shown ? `held-out ${shown.name} ${reward(shown.last)} before training` : null);
}

function hacking(data) {
  const found = data.alerts.find((one) => one.kind === "hacking" || one.kind === "guard");
  const diversity = data.heldout.find((one) => one.name === "diversity");
  const collapse = data.alerts.some((one) => one.kind === "diversity");
  const told = diversity && diversity.last !== null ? `diversity ${reward(diversity.last)}, was ${reward(diversity.first)}` : "";
  const metrics = data.heldout.filter((one) => data.held_out_metrics.includes(one.name)).slice(0, 1).map((one) => `held-out ${one.name} ${reward(one.last)}, was ${reward(one.first)}`);
  if (found) return card("Does it hack its reward?", "Suspected", `text ${found.level}`, ...metrics, told);
  if (data.heldout.every((one) => one.step === null || one.step === 0)) return card("Does it hack its reward?", "Too early to say", "text", told);
  return card("Does it hack its reward?", collapse ? "Samples grow alike" : "No sign of it", `text ${collapse ? "warn" : ""}`, ...metrics, told);
}

function slow(data) {
  const [first, second] = data.slow;
  if (!first) return card("What is slow?", "No step yet", "text");
  const rest = second ? `then ${second.label}, ${percent(second.share)}` : "";
  return card("What is slow?", `${first.label[0].toUpperCase()}${first.label.slice(1)}`, "text", `${percent(first.share)} of a step, ${seconds(first.seconds)}`, rest);
}

function failed(data) {
  const kinds = Object.entries(data.failed);
  if (!kinds.length) return card("What failed?", "Nothing", "text", `in ${number(data.step)} steps of ${number(data.samples_per_step)} samples`);
  const total = kinds.reduce((sum, [, count]) => sum + count, 0);
  return card("What failed?", number(total), "", ...kinds.slice(0, 3).map(([kind, count]) => `${kind.replaceAll("_", " ")}: ${number(count)}`));
}

