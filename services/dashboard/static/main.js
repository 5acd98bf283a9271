// Which view the address names, and the list of runs.

import { get } from "./api.js";
import { spark } from "./chart.js";
import { compareView } from "./compare.js";
import { ago, foreign, h, number, plainText, reward, show, signed } from "./dom.js";
import { runView } from "./run.js";

const main = document.getElementById("main");
const crumbs = document.getElementById("crumbs");
const connection = document.getElementById("connection");
let leaving = new AbortController();
const REFRESH_MS = 4000;

function route() {
  const parts = location.hash.replace(/^#\/?/, "").split("?")[0].split("/").map(decodeURIComponent);
  if (parts[0] === "main") return; // the skip link
  leaving.abort();
  leaving = new AbortController();
  connection.textContent = "";
  const { signal } = leaving;
  const context = { main, signal, say: (text) => { connection.textContent = text; } };
  const [view, trail] = parts[0] === "run" && parts[1] ? [runView(parts[1], context), [parts[1]]]
    : parts[0] === "compare" && parts[2] ? [compareView(parts[1], parts[2], context), ["Compare"]] : [listView(context), []];
  document.title = ["Raylign", ...trail.map(plainText)].join(" · ");
  show(crumbs, trail.map((one) => ["/ ", foreign(one)]));
  window.scrollTo(0, 0);
  view.catch((error) => { if (!signal.aborted) failed(error); });
}

function failed(error) {
  show(main, h("h1", null, error.status === 404 ? "Not found" : "This could not be loaded"),
    h("p", { class: "sub" }, plainText(error.message)), h("p", null, h("a", { href: "#/" }, "All runs")));
}

async function listView({ main: place, signal }) {
  const chosen = new Set();
  let sent = "";
  const draw = async () => {
    const answer = await get("runs", signal);
    const now = JSON.stringify(answer);
    if (now === sent) return;
    const before = document.activeElement?.dataset?.run;
    sent = now;
    show(place, listPage(answer.runs, chosen));
    if (before) place.querySelector(`input[data-run="${CSS.escape(before)}"]`)?.focus();
  };
  await draw();
  const timer = setInterval(() => { if (!document.hidden) draw().catch(() => {}); }, REFRESH_MS);
  signal.addEventListener("abort", () => clearInterval(timer));
}

function listPage(runs, chosen) {
  if (!runs.length) {
    return [h("h1", null, "Runs"), h("p", { class: "sub" }, "There is no run in this folder yet. ", h("code", null, "raylign train"), " makes one under runs/.")];
  }
  const compare = h("a", { class: "button", role: "link" }, "Compare");
  const update = () => {
    const [a, b] = [...chosen];
    const ready = chosen.size === 2;
    compare.textContent = ready ? "Compare the two" : "Choose two to compare";
    compare.toggleAttribute("aria-disabled", !ready);
    compare.classList.toggle("primary", ready);
    if (ready) compare.setAttribute("href", `#/compare/${encodeURIComponent(a)}/${encodeURIComponent(b)}`);
    else compare.removeAttribute("href");
  };
  const pick = (run) => (event) => {
    if (event.target.checked) chosen.add(run.name); else chosen.delete(run.name);
    while (chosen.size > 2) {
      const [oldest] = chosen;
      chosen.delete(oldest);
      for (const box of document.querySelectorAll("input[data-run]")) if (box.dataset.run === oldest) box.checked = false;
    }
    update();
  };
  update();
  return [
    h("div", { class: "title" }, h("h1", null, runs.length === 1 ? "1 run" : `${runs.length} runs`), runs.length > 1 ? compare : null),
    h("div", { class: "panel", style: { marginTop: "1rem" } }, h("table", { class: "runs" },
      h("thead", null, h("tr", null, ["", "Run", "Status", "Step", "Training reward", "", "Held-out", "Written"].map((head, place) =>
        h("th", { scope: "col", class: [3, 4, 6].includes(place) ? "num" : null }, head || h("span", { class: "visually-hidden" }, place ? "Curve" : "Compare"))))),
      h("tbody", null, runs.map((run) => runRow(run, chosen, pick(run)))))),
  ];
}

function runRow(run, chosen, onchange) {
  const heldout = run.heldout && run.heldout.last !== null ? [`${run.heldout.name} `, h("b", null, reward(run.heldout.last)),
    run.heldout.first === null ? null : h("span", { class: "muted" }, ` (${signed(run.heldout.last - run.heldout.first)})`)] : "–";
  return h("tr", null,
    h("td", null, h("input", { type: "checkbox", "data-run": run.name, "aria-label": `Compare ${plainText(run.name)}`, checked: chosen.has(run.name), onchange })),
    h("td", { class: "name" }, h("a", { href: `#/run/${encodeURIComponent(run.name)}` }, foreign(run.name)), h("br"),
      h("span", { class: "muted small" }, `${plainText(run.algorithm)} · ${plainText(run.model)}`)),
    h("td", null, h("span", { class: `chip ${run.status}` }, plainText(run.status))),
    h("td", { class: "num wide", "data-label": "Step" }, h("span", null, number(run.step), h("span", { class: "muted" }, run.num_steps ? ` / ${number(run.num_steps)}` : ""))),
    h("td", { class: "num wide", "data-label": "Training reward" }, h("span", null, h("b", null, reward(run.reward.last)), run.reward.first === null ? null : h("span", { class: "muted" }, ` (${signed(run.reward.last - run.reward.first)})`))),
    h("td", { class: "hide" }, spark(run.spark)),
    h("td", { class: "num wide", "data-label": "Held-out" }, h("span", null, heldout)),
    h("td", { class: "muted hide" }, ago(run.updated_s)));
}

addEventListener("hashchange", route);
route();
