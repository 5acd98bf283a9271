// Elements from data. Text becomes text nodes, never markup: prompts, answers and judges' words are hostile.

const SVG = "http://www.w3.org/2000/svg";

export function h(tag, props, ...children) {
  return fill(document.createElement(tag), props, children);
}

export function svg(tag, props, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

function fill(node, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(node.style, value); // through the object model: the policy allows no attribute
    else node.setAttribute(name === "class" ? "class" : name, value === true ? "" : String(value));
  }
  node.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function show(node, ...children) {
  node.replaceChildren(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/gu;

/** Text of others, kept to its own direction, with what cannot be seen made visible. */
export function foreign(text) {
  const parts = [];
  let at = 0;
  for (const match of String(text).matchAll(HIDDEN)) {
    const code = match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    parts.push(text.slice(at, match.index), h("span", { class: "ctrl", title: "a character that cannot be seen" }, `U+${code}`));
    at = match.index + match[0].length;
  }
  return h("bdi", null, parts, String(text).slice(at));
}

export function plainText(text) {
  return String(text).replace(HIDDEN, "\ufffd");
}

export function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("-", "−").replace("e+", "e");
  if (Number.isInteger(value) && size < 1e6) return minus(value.toLocaleString("en"));
  return minus(size >= 100 ? value.toFixed(1) : value.toFixed(digits));
}

/** A reward or a mean of them: always so many digits, so that columns of them line up. */
export function reward(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return Math.abs(value) < 1000 && (value === 0 || Math.abs(value) >= 1e-3) ? minus(value.toFixed(3)) : number(value);
}

export function signed(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const shown = Math.abs(value) >= 1e-3 && Math.abs(value) < 1000 ? minus(value.toFixed(digits)) : number(value, digits);
  return value > 0 ? `+${shown}` : value === 0 ? "±0" : shown;
}

function minus(text) {
  return text.replace("-", "−");
}

export function percent(share) {
  return `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 100) return `${value < 10 ? value.toFixed(2) : value.toFixed(1)} s`;
  const minutes = Math.floor(value / 60);
  return minutes < 100 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function ago(stamp) {
  const past = Math.max(0, Date.now() / 1000 - stamp);
  if (past < 60) return "just now";
  if (past < 5400) return `${Math.round(past / 60)} min ago`;
  return past < 129600 ? `${Math.round(past / 3600)} h ago` : `${Math.round(past / 86400)} d ago`;
}

/** Calls at most once in so many milliseconds, and always once after the last time it was asked. */
export function throttled(wait, action) {
  let timer = null;
  let last = 0;
  return () => {
    if (timer !== null) return;
    timer = setTimeout(() => { timer = null; last = Date.now(); action(); }, Math.max(0, last + wait - Date.now()));
  };
}

export function table(heads, rows, caption) {
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    h("table", null, h("caption", { class: "visually-hidden" }, caption),
      h("thead", null, h("tr", null, heads.map((head, place) => h("th", { scope: "col", class: place ? "num" : null }, head)))),
      h("tbody", null, rows.map((row) => h("tr", null, row.map((cell, place) => h("td", { class: place ? "num" : null }, cell)))))));
}
