// Two runs over each other: curves, what their configurations differ in, where they ended.

import { get, runPath } from "./api.js";
import { Chart, emptyCurve } from "./chart.js";
import { foreign, h, number, plainText, show, signed, table } from "./dom.js";

const FIRST = ["reward/mean", "eval/mean", "eval/diversity", "reward/std_within_group", "loss", "loss/kl", "grad/norm", "nfe/mean", "throughput/samples_per_s", "time/step_s"];

export async function compareView(a, b, { main, signal }) {
  const query = new URLSearchParams({ a, b });
  const data = await get(`compare?${query}`, signal);
  const keys = wanted(data.keys);
  const curves = await Promise.all([a, b].map((name) => get(`${runPath(name)}/series?points=400&keys=${keys.map(encodeURIComponent).join(",")}`, signal)));
  const charts = keys.map((key) => new Chart({
    title: key,
    series: [a, b].map((name, place) => ({ label: `${place ? "B" : "A"} ${plainText(name)}`, style: place ? 2 : 0, dots: key.startsWith("eval/"), curve: curves[place].series[key] ?? emptyCurve() })),
  }));
  show(main,
    h("h1", null, "Compare two runs"),
    h("p", { class: "sub" }, link(a, "A"), "  and  ", link(b, "B")),
    section("Curves", h("div", { class: "grid" }, charts.map((chart) => chart.node))),
    section("Where they are now", h("div", { class: "panel" }, table(["Metric", "A", "B", "B − A"],
      data.ends.map(({ name, a: one, b: other }) => [name, number(one), number(other), one === null || other === null ? "–" : signed(other - one)]), "Latest values of both runs"))),
    section("What their configurations differ in", h("div", { class: "panel" }, differences(data))));
  charts.forEach((chart) => chart.draw());
}

function differences(data) {
  if (!data.readable) return h("p", { class: "muted" }, "A configuration cannot be read.");
  if (!data.changed.length) return h("p", { class: "muted" }, "Nothing: both runs have one configuration.");
  return table(["Key", "A", "B"], data.changed.map(({ key, a, b }) => [h("code", null, key), foreign(told(a)), foreign(told(b))]), "Configuration keys that differ");
}

const told = (value) => (value === null || value === undefined ? "not set" : typeof value === "string" ? value : JSON.stringify(value));

function wanted(keys) {
  const evals = keys.filter((key) => key.startsWith("eval/") && key.split("/").length === 2 && !["eval/failed", "eval/std_within_group"].includes(key));
  return [...new Set([...FIRST.filter((key) => keys.includes(key)), ...evals])].slice(0, 12);
}

const link = (name, side) => h("span", null, h("b", null, `${side} `), h("a", { href: `#/run/${encodeURIComponent(name)}` }, foreign(name)));

const section = (title, ...children) => h("section", { "aria-label": title }, h("header", null, h("h2", null, title)), children);
