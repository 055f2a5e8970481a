// The radix tree: a map of it (width: pages), the same as a list for the keyboard, and what a node holds.
import { poolBar } from "./batch.js";
import { $, bar, card, el, legend, num, pieces, secs } from "./dom.js";
import { ask, choose, state, textShown } from "./live.js";

const LEVEL = 26;
let map, list, detail, pool, crumbs, zoom = null, selected = null, open, wanted = 0, focusIt = false;

export function build(root, page) {
  open = page.open;
  const [pages, pagesBody] = card("Pages of the KV cache");
  pool = el("div");
  pagesBody.append(pool);
  crumbs = el("span", { id: "crumbs" });
  const [map_, mapBody] = card("The radix tree", crumbs, legend(["cached", "used by running requests"], ["soft", "can be evicted"], ["free", "added up"]));
  map = el("div", { id: "icicle", role: "group", "aria-label": "Map of the radix tree: width is pages, each row is a level" });
  mapBody.append(map);
  const [list_, listBody] = card("Nodes");
  list = el("div", { id: "tree", role: "tree", "aria-label": "Nodes of the radix tree", class: "tall" });
  listBody.append(list);
  const [detail_, detailBody] = card("Node");
  detail = el("div", { id: "node" });
  detailBody.append(detail);
  root.append(pages, map_, el("div", { class: "two" }, list_, detail_));
  list.addEventListener("keydown", keys);
}

export function escape() {
  zoom = null;
  draw(state);
}

// Rows by name -> {name, parent, children (rows), rest}
function nodes() {
  const all = new Map(), roots = [];
  for (const [name, r] of Object.entries(state.tree)) {
    if (name.endsWith("+")) continue;
    const [parent, pages, refs, age, children, allPages, allNodes, users, opened, salted, preview] = r;
    all.set(Number(name), { name: Number(name), parent, pages, refs, age, n: children, allPages, allNodes, users, opened: !!opened, salted: !!salted, preview: preview ?? "", children: [] });
  }
  for (const node of all.values()) if (node.parent) all.get(node.parent)?.children.push(node); else roots.push(node);
  for (const [name, r] of Object.entries(state.tree)) if (name.endsWith("+") && all.has(r[0])) all.get(r[0]).rest = { pages: r[1], n: r[2], nodes: r[3] };
  for (const node of all.values()) node.children.sort((a, b) => b.allPages - a.allPages || a.name - b.name);
  roots.sort((a, b) => b.allPages - a.allPages || a.name - b.name);
  return [all, roots];
}

const size = () => state.limits.page_size ?? 1;
const opening = (node) => node.preview.replace(/\s+/g, " ").trim();
const label = (node) => (node.parent ? `${num(node.pages * size())} tokens` : node.salted ? "root of a salt" : "root");

export function draw() {
  pool.replaceChildren(...poolBar(state));
  const [all, roots] = nodes();
  if (zoom !== null && !all.has(zoom)) zoom = null;
  if (!all.size || !state.totals.tree_nodes) {
    map.replaceChildren(el("p", { class: "nothing" }, "The cache holds no prefix yet."));
    list.replaceChildren();
    crumbs.textContent = "";
    if (!all.size) return;
  } else drawMap(all, roots);
  drawList(roots);
  drawDetail(all);
}

function drawMap(all, roots) {
  const tops = zoom === null ? roots : [all.get(zoom)];
  crumbs.replaceChildren();
  if (zoom !== null) crumbs.append(el("button", { type: "button", onclick: () => { zoom = null; draw(); } }, "whole tree"), ` ${label(all.get(zoom))}, ${num(all.get(zoom).allNodes)} nodes`);
  else crumbs.append(el("span", { class: "less" }, `${num(state.totals.tree_nodes)} nodes, ${num(state.totals.cached_pages * size())} tokens`));
  const total = tops.reduce((sum, n) => sum + n.allPages, 0) || 1, width = map.clientWidth || 600, out = [];
  let depthMost = 0;
  const place = (node, x, depth) => {  // x in pages
    const w = (node.allPages / total) * width;
    if (w < 2) return;
    depthMost = Math.max(depthMost, depth);
    out.push([node, (x / total) * width, w, depth]);
    let at = x;
    for (const child of node.children) { place(child, at, depth + 1); at += child.allPages; }
    if (node.rest && (node.rest.pages / total) * width >= 3) { depthMost = Math.max(depthMost, depth + 1); out.push([{ rest: node.rest, of: node }, (at / total) * width, (node.rest.pages / total) * width, depth + 1]); }
  };
  let at = 0;
  for (const top of tops) { place(top, at, 0); at += top.allPages; }
  map.style.height = Math.min(13, depthMost + 1) * LEVEL + 4 + "px";
  map.style.overflowY = depthMost > 12 ? "auto" : "hidden";
  const focused = document.activeElement?.closest("#icicle") && document.activeElement.dataset.key;
  map.replaceChildren(...out.map(([node, x, w, depth]) => {
    const rest = node.rest && node.of, text = rest ? `+${num(node.rest.n)}` : w > 34 ? label(node) + (opening(node) && w > 150 ? " \u201c" + opening(node) + "\u2026\u201d" : "") + (node.users.length ? " " + node.users.map((u) => "#" + u).join(" ") : "") : "";
    const key = rest ? node.of.name + "+" : String(node.name);
    const b = el("button", { type: "button", tabindex: -1, "data-key": key, title: rest ? `${num(node.rest.n)} more children with ${num(node.rest.pages * size())} tokens: click to show them` : `${label(node)}; below and in it ${num(node.allPages * size())} tokens in ${num(node.allNodes)} nodes`, class: rest ? "rest" : (node.refs ? "used" : "") + (node.name === selected ? " on" : "") }, text);
    Object.assign(b.style, { left: x + "px", width: Math.max(2, w - 1) + "px", top: depth * LEVEL + 2 + "px" });
    b.addEventListener("click", () => { if (rest) { state.whole.add(node.of.name); choose(); } else { select(node.name); zoom = node.n && zoom !== node.name ? node.name : null; if (node.n && !node.opened) { state.opened.add(node.name); choose(); } draw(); } });
    if (!rest) b.addEventListener("pointerenter", () => select(node.name));
    return b;
  }));
  if (focused) map.querySelector(`[data-key="${focused}"]`)?.focus();
}

function drawList(roots) {
  const out = [];
  const visit = (node, level) => {
    out.push(item(node, level));
    if (!node.opened) return;
    for (const child of node.children) visit(child, level + 1);
    if (node.rest) {
      const text = `${num(node.rest.n)} more children, ${num(node.rest.nodes)} nodes, ${num(node.rest.pages * size())} tokens`;
      const more = el("div", { role: "treeitem", "aria-level": level + 2, "aria-selected": "false", tabindex: -1, "data-name": node.name + "+" }, el("span", { class: "twist" }, "+"), el("span", { class: "dim" }, text));
      more.style.paddingLeft = 0.3 + (level + 1) * 0.9 + "rem";
      more.addEventListener("click", () => { state.whole.add(node.name); choose(); });
      out.push(more);
    }
  };
  for (const root of roots) visit(root, 0);
  const held = document.activeElement?.closest("#tree") ? document.activeElement.dataset.name : null;
  list.replaceChildren(...out);
  const at = list.querySelector(`[data-name="${held ?? selected}"]`) ?? list.firstElementChild;
  if (at) at.tabIndex = 0;
  if (held || focusIt) { at?.focus(); focusIt = false; }
}

function item(node, level) {
  const div = el("div", { role: "treeitem", "aria-level": level + 1, "aria-expanded": node.n ? String(node.opened) : null, "aria-selected": String(node.name === selected), tabindex: -1, "data-name": node.name },
    el("span", { class: "twist" }, node.n ? (node.opened ? "\u25be" : "\u25b8") : "\u00b7"),
    bar([[node.refs ? "cached" : "soft", node.allPages], ["free", Math.max(0, state.totals.cached_pages - node.allPages)]], "bar mini"),
    el("span", {}, label(node)),
    opening(node) ? el("span", { class: "opening" }, opening(node) + "\u2026") : null,
    node.refs && node.parent ? el("span", { class: "dim" }, `${num(node.refs)} ref${node.refs === 1 ? "" : "s"}`) : null,
    node.users.length ? el("span", { class: "users" }, node.users.map((u) => "#" + u).join(" ")) : null,
    node.n ? el("span", { class: "dim" }, `${num(node.allNodes)} node${node.allNodes === 1 ? "" : "s"}, ${num(node.allPages * size())} tokens in all`) : null,
    node.age !== null && !node.refs ? el("span", { class: "dim" }, `unused ${secs(node.age)}`) : null);
  div.style.paddingLeft = 0.3 + level * 0.9 + "rem";
  div.addEventListener("click", () => { select(node.name); if (node.n) toggle(node); draw(); });
  return div;
}

function toggle(node, on = !node.opened) {
  (on ? state.opened : state.closed).add(node.name);
  (on ? state.closed : state.opened).delete(node.name);
  choose();
}

function keys(event) {
  const at = document.activeElement, all = [...list.children], i = all.indexOf(at);
  if (i < 0) return;
  const name = at.dataset.name, [known] = nodes(), node = known.get(Number(name));
  const to = { ArrowDown: i + 1, ArrowUp: i - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to !== undefined) all[Math.max(0, Math.min(all.length - 1, to))].focus();
  else if (event.key === "ArrowRight" && node?.n) node.opened ? all[i + 1]?.focus() : toggle(node, true);
  else if (event.key === "ArrowLeft" && node) node.opened && node.n ? toggle(node, false) : list.querySelector(`[data-name="${node.parent}"]`)?.focus();
  else if (event.key === "Enter" || event.key === " ") name.endsWith("+") ? at.click() : (select(node.name), (zoom = node.n ? node.name : zoom), draw());
  else return;
  event.preventDefault();
  const now = document.activeElement?.dataset?.name;
  if (now && !now.endsWith("+")) select(Number(now));
}

let loaded = { name: null }, timer = 0;
function select(name) {
  if (selected === name) return;
  selected = name;
  for (const item_ of list.children) item_.setAttribute("aria-selected", String(item_.dataset.name === String(name)));
  for (const b of map.children) b.classList?.toggle("on", b.dataset?.key === String(name));
  clearTimeout(timer);
  timer = setTimeout(load, 120);
  drawDetail(nodes()[0]);
}

async function load() {
  const name = selected, mine = ++wanted;
  if (name === null) return;
  try {
    const found = await ask({ node: name });
    if (mine === wanted) loaded = found;
  } catch (error) { if (mine === wanted) loaded = { name, error: error.message }; }
  if (mine === wanted) drawDetail(nodes()[0]);
}

let drawn = "";
function drawDetail(all) {
  const node = all.get(selected);
  if (!node) { drawn = ""; detail.replaceChildren(el("p", { class: "nothing" }, "Point at a node, or choose one in the list with the arrow keys: its tokens are shown here.")); return; }
  const stamp = JSON.stringify([node.name, node.pages, node.refs, node.users, node.allNodes, node.allPages, Math.round(node.age ?? -1), loaded.name, loaded.tokens, loaded.error, textShown()]);
  if (stamp === drawn) return;
  drawn = stamp;
  const facts = el("dl", {},
    el("dt", {}, "tokens"), el("dd", {}, `${num(node.pages * size())} in ${num(node.pages)} page${node.pages === 1 ? "" : "s"}`),
    el("dt", {}, "below and in it"), el("dd", {}, `${num(node.allPages * size())} tokens in ${num(node.allNodes)} nodes`),
    el("dt", {}, "references"), el("dd", {}, `${num(node.refs)} running request${node.refs === 1 ? "" : "s"} read${node.refs === 1 ? "s" : ""} it`),
    el("dt", {}, "hang here"), el("dd", {}, ...(node.users.length ? node.users.map((u) => el("button", { type: "button", onclick: () => open(u) }, "#" + u)) : ["nobody"])),
    el("dt", {}, "last used"), el("dd", {}, node.age === null ? "before the page looked on" : node.refs ? "now" : secs(node.age) + " ago"));
  detail.replaceChildren(facts);
  if (loaded.name !== node.name) return;
  if (loaded.error) detail.append(el("p", { class: "error" }, loaded.error));
  else if (loaded.pieces) {
    const box = pieces(loaded.pieces, 0, 400);
    if (loaded.before) box.prepend(el("span", { class: "more" }, "..." + loaded.before));
    if (loaded.tokens > loaded.pieces.length) box.append(el("span", { class: "more" }, ` [${num(loaded.tokens - loaded.pieces.length)} tokens more]`));
    detail.append(box);
  } else if (!textShown()) detail.append(el("p", { class: "nothing" }, "There is no text here: it is for administrators, and journals keep it only with tokens."));
  void $;
}
