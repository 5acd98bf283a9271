// When the pieces of one step's work ran: a row per worker over one axis of seconds, which begin with the step.

import { h, number, percent, plainText, seconds, show, table } from "./dom.js";

const TICKS = 5;
const MANY = 400;
const MOST_BEFORE = 2; // steps' lengths to show of the time before the step

export function gantt(data, step) {
  const from = beginning(data, step);
  const span = data.seconds - from;
  const at = (second) => `${(100 * (second - from)) / span}%`;
  const ticks = ticksOf(from, data.seconds);
  const rows = data.rows.map((row) => h("div", { class: "lane" }, h("span", { title: plainText(row.who) }, row.label),
    h("span", { class: "tracks" }, ticks.map((tick) => h("span", { class: "tick", style: { left: at(tick) } })),
      from < 0 ? h("span", { class: "before", style: { width: at(0) } }) : null,
      row.tracks.map((track) => h("span", { class: row.tracks.length > 1 ? "track thin" : "track" }, track.map((piece) => bar(data, step, piece, from, at))))),
    h("span", { class: "num muted small" }, row.idle === null ? "" : `idle ${percent(row.idle)}`)));
  const axis = h("div", { class: "lane axis" }, h("span"), h("span", { class: "times" },
    ticks.map((tick) => h("span", { style: { left: at(tick) } }, `${number(tick)} s`.replace(".000", "")))), h("span"));
  return h("div", { class: "panel", id: "gantt", "data-step": step, style: { gridColumn: "1 / -1" } },
    h("h3", null, "When each worker did what"),
    h("div", { class: "lanes gantt", role: "img", "aria-label": told(data), style: { marginTop: ".8rem" } }, rows, axis),
    keys(data, step), notes(data, from).map((text) => h("p", { class: "muted small", style: { marginTop: ".3rem" } }, text)), asTable(data));
}

/** Where the axis begins: with the first drawing for the step, unless that is so long ago that the step would be small. */
function beginning(data, step) {
  const most = -MOST_BEFORE * data.seconds;
  if (data.begin >= most) return data.begin;
  return data.rows.some((row) => row.tracks.flat().some(([, start, taken, of]) => of === step && start < 0 && start + taken > most)) ? most : 0;
}

function bar(data, step, [phase, start, taken, of], from, at) {
  const [left, right] = [Math.max(start, from), Math.min(start + taken, data.seconds)];
  if (right < from) return null;
  const later = of === step ? "" : `, for step ${number(of)}`;
  return h("span", { class: `piece p-${phase}${of === step ? "" : " later"}`, "data-start": start, "data-seconds": taken,
    style: { left: at(left), width: at(from + Math.max(0, right - left)) },
    title: `${data.labels[phase]}: ${seconds(taken)} from ${number(start, 2)} s on${later}` });
}

/** Round numbers of seconds, zero among them. */
function ticksOf(from, to) {
  const rough = (to - from) / TICKS;
  const power = 10 ** Math.floor(Math.log10(rough));
  const stride = power * [1, 2, 5, 10].find((one) => one * power >= rough);
  const ticks = [];
  for (let place = Math.ceil(from / stride); place * stride <= to; place += 1) ticks.push(Number((place * stride).toPrecision(6)));
  return ticks;
}

function keys(data, step) {
  const pieces = data.rows.flatMap((row) => row.tracks.flat());
  const phases = Object.keys(data.labels).filter((phase) => pieces.some(([one]) => one === phase));
  const later = pieces.some(([, , , of]) => of !== step);
  return h("p", { class: "keys" }, phases.map((phase) => h("span", null, h("span", { class: `swatch p-${phase}` }), data.labels[phase])),
    later ? h("span", null, h("span", { class: "swatch p-sample later" }), "pale: for a later step") : null);
}

function notes(data, from) {
  const told = [];
  if (from < 0) told.push("The line marks where the step began; before it stands what was drawn and scored for this step, and nothing else.");
  if (data.begin < from) told.push(`Drawing for the step began ${seconds(-data.begin)} before it, which is ${from < 0 ? "shown in part" : "not shown"}.`);
  if (!data.whole) told.push("Idle time is not known: not all that was done meanwhile for later steps is recorded, or not yet.");
  if (data.num_resting) told.push(`${number(data.num_resting)} more rollout actors were in service and did nothing.`);
  if (data.left_out) told.push(`${number(data.left_out)} short pieces were not recorded.`);
  return told;
}

function sums(row) {
  const found = new Map();
  for (const [phase, , taken] of row.tracks.flat()) found.set(phase, (found.get(phase) ?? 0) + taken);
  return found;
}

const told = (data) => data.rows.map((row) =>
  `${row.label}: ${[...sums(row)].map(([phase, taken]) => `${data.labels[phase]} ${seconds(taken)}`).join(", ")}${row.idle === null ? "" : `, idle ${percent(row.idle)}`}`).join(". ");

/** Every piece as a row; made when it is opened, as there may be many. */
function asTable(data) {
  const summary = h("summary", null, "Table");
  const details = h("details", { ontoggle: () => {
    if (!details.open || details.children.length > 1) return;
    const pieces = data.rows.flatMap((row) => row.tracks.flat().map((piece) => [row.label, ...piece])).sort((a, b) => a[2] - b[2]);
    show(details, summary, table(["Piece", "Begins", "Seconds", "For step"], pieces.slice(0, MANY).map(([label, phase, start, taken, of]) =>
      [`${label}: ${data.labels[phase]}`, `${number(start, 2)} s`, seconds(taken), number(of)]), "When each worker did what, as numbers"),
      pieces.length > MANY ? h("p", { class: "muted small" }, `and ${number(pieces.length - MANY)} later ones`) : null);
  } }, summary);
  return details;
}
