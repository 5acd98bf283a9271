// Failures, the frontier of text runs, pictures that the run left, and its settings.

import { get, runPath } from "./api.js";
import { Chart } from "./chart.js";
import { foreign, h, number, show, table, throttled } from "./dom.js";

const FIRST_FAILURES = 12;

export function failuresSection(name, data, signal, pick) {
  const body = h("div");
  const node = h("section", { id: "failures", "aria-label": "Failures" }, h("header", null, h("h2", null, "Failures")), body);
  let seen = "";
  const draw = async (now) => {
    const counts = JSON.stringify(now.failed);
    if (counts === seen) return;
    seen = counts;
    const { kinds, rows } = await get(`${runPath(name)}/failures`, signal);
    const steps = Object.entries(now.failed).map(([kind, count]) => [kind.replaceAll("_", " "), number(count)]);
    show(body, !kinds.length && !steps.length ? h("p", { class: "muted" }, "No sample failed, and no update was refused.") : h("div", { class: "grid" },
      steps.length ? h("div", { class: "panel" }, h("h3", null, "Over the whole run"), table(["What", "Count"], steps, "Failures counted by the run")) : null,
      kinds.length ? h("div", { class: "panel" }, h("h3", null, "Recorded samples by cause"), table(["Cause", "Reward", "Samples"], kinds.map((one) => [foreign(one.kind), foreign(one.reward || "–"), number(one.count)]), "Recorded failures by cause")) : null),
    rows.length ? h("div", { class: "panel", style: { marginTop: "1rem" } }, h("h3", null, "Samples that failed, the latest first"), list(rows, FIRST_FAILURES)) : null);
  };
  const list = (rows, most) => {
    const place = h("div");
    show(place, h("div", { class: "scroll" }, h("table", null, h("thead", null, h("tr", null, ["Step", "Cause", "Sample", "What it said"].map((head) => h("th", { scope: "col" }, head)))),
      h("tbody", null, rows.slice(0, most).map((row) => h("tr", null,
        h("td", null, h("a", { href: "#groups", onclick: (event) => { event.preventDefault(); pick(row.step, row.record); document.getElementById("groups").scrollIntoView(); } }, number(row.step))),
        h("td", null, foreign(row.reward ? `${row.kind} · ${row.reward}` : row.kind)),
        h("td", null, foreign(row.prompt), h("span", { class: "muted" }, `  sample ${row.sample}`)),
        h("td", { class: "muted" }, foreign(row.message || "–"))))))),
    rows.length > most ? h("button", { type: "button", onclick: () => place.replaceWith(list(rows, rows.length)) }, `Show all ${rows.length}`) : null);
    return place;
  };
  let latest = data;
  const update = throttled(1000, () => draw(latest).catch(() => {}));
  update();
  return { node, update: (now) => { latest = now; update(); } };
}

export function frontierSection(name, signal) {
  const node = h("section", { id: "frontier", "aria-label": "Frontier", hidden: true });
  get(`${runPath(name)}/frontier`, signal).then(({ frontier }) => {
    const series = frontier ? Object.entries(frontier.series ?? {}) : [];
    if (!series.length) return;
    const lines = series.map(([label, one], place) => {
      const points = [...one.points].sort((a, b) => a.nfe - b.nfe);
      const errors = points.every((point) => point.error !== null && point.error !== undefined);
      return { label: label === "before" ? "before training" : `after step ${one.step}`, style: place ? 0 : 1, dots: true, curve: {
        x: points.map((point) => point.nfe), y: points.map((point) => point.accuracy), band: errors ? "ci95" : "",
        low: errors ? points.map((point) => point.accuracy - 1.96 * point.error) : [], high: errors ? points.map((point) => point.accuracy + 1.96 * point.error) : [] } };
    });
    const own = series.filter(([, one]) => one.own).map(([label, one]) => [label === "before" ? "before training" : `after step ${one.step}`, number(one.own.accuracy), number(one.own.nfe, 2)]);
    const chart = new Chart({ title: `${frontier.quality === "exact" ? "Share solved exactly" : "Mean reward"} against calls of the network`, series: lines, height: 260, xLabel: "calls" });
    node.hidden = false;
    show(node, h("header", null, h("h2", null, "Frontier"), h("p", { class: "muted small" }, "Sweeping the entropy budget: what is solved, for how many calls.")),
      h("div", { class: "grid wide" }, chart.node, own.length ? h("div", { class: "panel" }, h("h3", null, "As the run draws"), table(["Weights", "Quality", "Calls"], own, "Operating points")) : null));
    chart.draw();
  }).catch(() => {});
  return node;
}

export function settingsSection(name, data, signal) {
  const pre = h("pre", { tabindex: "0", "aria-label": "Configuration" });
  const config = h("details", { ontoggle: async () => {
    if (config.open && !pre.textContent) pre.textContent = (await get(`${runPath(name)}/config`, signal)).toml;
  } }, h("summary", null, "Configuration"), pre);
  const pictures = data.samples.map((file) => h("details", null, h("summary", null, foreign(file)), h("img", { class: "shot", loading: "lazy", alt: `${file} of this run`, src: `api/${runPath(name)}/samples/${encodeURIComponent(file)}` })));
  return h("section", { id: "settings", "aria-label": "Settings and files" }, h("header", null, h("h2", null, "Settings and files")), h("div", { class: "panel" }, config, pictures));
}
