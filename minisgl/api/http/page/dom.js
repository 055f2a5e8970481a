// Small helpers.  Text of models and users becomes text nodes, never HTML.
export const $ = (id) => document.getElementById(id);

export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "width%") node.style.width = value + "%";
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function svg(tag, props = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(props)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// A card with a title; returns [card, body].
export function card(title, ...beside) {
  const body = el("div");
  return [el("section", { class: "card" }, el("div", { class: "head" }, el("h2", {}, title), ...beside), body), body];
}

export const legend = (...parts) =>
  el("div", { class: "legend" }, ...parts.map(([kind, text]) => el("span", {}, el("i", { class: "bg-" + kind }), text)));

export const num = (n) => (n === null || n === undefined ? "\u2013" : Math.round(n).toLocaleString("en"));
export const ms = (x) => (x === null || x === undefined ? "\u2013" : x >= 10000 ? (x / 1000).toFixed(1) + " s" : x >= 1000 ? (x / 1000).toFixed(2) + " s" : x >= 100 ? x.toFixed(0) + " ms" : x >= 1 ? x.toFixed(1) + " ms" : x.toFixed(2) + " ms");
export const secs = (x) => (x === null || x === undefined ? "\u2013" : x < 1 ? ms(x * 1000) : x < 120 ? x.toFixed(1) + " s" : x < 7200 ? (x / 60).toFixed(0) + " min" : (x / 3600).toFixed(1) + " h");
export const percent = (x) => (x === null || x === undefined || Number.isNaN(x) ? "\u2013" : (100 * x).toFixed(x < 0.1 && x > 0 ? 1 : 0) + " %");
export const bytes = (n) => (n >= 1 << 30 ? (n / 2 ** 30).toFixed(1) + " GiB" : n >= 1 << 20 ? (n / 2 ** 20).toFixed(0) + " MiB" : (n / 1024).toFixed(0) + " KiB");
export const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

// A stacked bar of [kind, value, title].
export function bar(parts, cls = "bar") {
  const total = parts.reduce((sum, part) => sum + part[1], 0) || 1;
  return el("div", { class: cls }, ...parts.filter((p) => p[1] > 0).map(([kind, value, title]) => el("i", { class: "bg-" + kind, "width%": (100 * value) / total, title })));
}

export function table(heads, rows, label) {
  const head = el("tr", {}, ...heads.map((h) => el("th", { class: h.startsWith(">") ? "n" : "", scope: "col" }, h.replace(/^>/, ""))));
  return el("table", { "aria-label": label }, el("thead", {}, head), el("tbody", {}, ...rows));
}

// A row of cells; numbers of the columns that begin with ">" stand right.
export const row = (cells, right = [], props = {}) =>
  el("tr", props, ...cells.map((c, i) => (c instanceof Node && c.tagName === "TD" ? c : el("td", { class: right.includes(i) ? "n" : "" }, c instanceof Node ? c : String(c)))));

// The tokens of a text, the first `cached` of them coloured.
export function pieces(list, cached = 0, most = 1500) {
  const box = el("div", { class: "pieces", tabindex: 0, "aria-label": "Tokens" });
  const skip = list.length > most ? Math.min(Math.max(0, cached - most / 2), list.length - most) : 0;
  if (skip) box.append(el("span", { class: "more" }, `[${num(skip)} tokens] `));
  list.slice(skip, skip + most).forEach((piece, i) => box.append(el("span", { class: i + skip < cached ? "hit" : "", title: `token ${i + skip}` }, piece)));
  if (list.length > skip + most) box.append(el("span", { class: "more" }, ` [${num(list.length - skip - most)} tokens more]`));
  return box;
}
