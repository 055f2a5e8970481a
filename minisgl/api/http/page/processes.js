// The actors: processes with their load and signs of life, and what travels between them.
import { bytes, card, el, num, percent, row, secs, svg, table } from "./dom.js";
import { curve } from "./live.js";

const PLACES = { api: [10, 150], tokenizer: [290, 20], checker: [290, 280], scheduler: [570, 150], worker: [840, 150], detokenizer: [290, 150], viewer: [570, 280] };
const BOX = [150, 66], LATE = 5;
let graph, list, rings;

export function build(root) {
  const [graph_, graphBody] = card("Processes and what they send each other");
  graph_.classList.add("graphcard");
  graph = svg("svg", { id: "graph", viewBox: "0 0 1000 360", role: "img", "aria-label": "The processes of the server and their messages; the table below has the same numbers" });
  graphBody.append(graph);
  const [list_, listBody] = card("Processes");
  list = el("div", { id: "actors", class: "scroll" });
  listBody.append(list);
  const [rings_, ringsBody] = card("Rings in shared memory: what waits between two processes");
  rings = el("div", { id: "rings", class: "scroll" });
  ringsBody.append(rings);
  root.append(graph_, list_, rings_);
}

// Where a ring leads, and what is in it; rings of tokenizers have their names.
const WAYS = { requests: ["api", "scheduler", "requests"], plans: ["scheduler", "workers", "step plans"], results: ["worker0", "scheduler", "results of steps"] };
const way = (name) => WAYS[name] ?? [name, "api", "prompts, as token ids"];

function drawRings(facts) {
  const known = Object.entries(facts?.rings ?? {});
  rings.replaceChildren(known.length
    ? table(["from", "to", "what", ">waiting", ">bytes", ">of"], known.map(([name, [n, size, most]]) => row([...way(name), num(n) + (n >= 1000 ? " or more" : ""), num(size), bytes(most)], [3, 4, 5], { "data-ring": name })), "Rings")
    : el("p", { class: "nothing" }, "No ring is known."));
}

// What waits in the rings with these names.
function waiting(facts, names) {
  const found = names.map((name) => facts.rings?.[name]).filter(Boolean);
  return found.length ? `ring: ${num(found.reduce((sum, r) => sum + r[0], 0))} waiting` : "";
}

const write = (x, y, said, name) => { const t = svg("text", { class: "dim", x, y, "text-anchor": "middle", ...(name ? { "data-edge": name } : {}) }); t.textContent = said; return t; };

// [x of the right, y of the top] of a process's box; ranks and tokenizers stack up.
function place(name) {
  const kind = name.replace(/\d+$/, ""), k = Number(name.slice(kind.length) || 0), [x, y] = PLACES[kind] ?? [40, 30];
  return [x + (kind === "worker" ? 0 : 0) + 8 * k, y + (kind === "worker" ? 74 * k : 10 * k)];
}

export function draw(state) {
  if (state.journal.steps !== undefined) {
    graph.replaceChildren();
    rings.replaceChildren();
    list.replaceChildren(el("p", { class: "nothing" }, "A journal is of the scheduler alone: it knows no other process. Choose live above to see those of this server."));
    return;
  }
  const facts = state.actors, known = Object.keys(facts?.processes ?? {});
  drawRings(facts);
  if (!facts) {
    graph.replaceChildren();
    list.replaceChildren(el("p", { class: "nothing" }, state.status === "live" && !state.everything ? "The processes are shown to administrators." : "No process is known yet."));
    return;
  }
  const rows = curve(), last = rows.at(-1)?.[0] ?? 0, over = rows.filter((r) => r[0] < last && r[0] >= last - 5), n = over.length || 1;
  const rate = (i) => over.reduce((sum, r) => sum + r[i], 0) / n, per = (x, what) => `${x >= 10 ? num(x) : x.toFixed(1)} ${what}/s`;
  const t = state.totals, names = [...new Set([...known, ...(facts.down ?? [])])];
  const shown = names.filter((name) => !/^(tokenizer|worker)\d+$/.test(name) || name === "worker0" || Number(name.match(/\d+$/)[0]) < 3);
  const ends = [
    ["api", "tokenizer", ""], ["tokenizer", "api", ""],
    ["api", "scheduler", ""], ["scheduler", "worker0", per(rate(13), "plans")],
    ["worker0", "scheduler", per(rate(13), "results")], ["scheduler", "detokenizer", per(rate(1), "tokens")], ["detokenizer", "api", per(rate(1), "tokens")], ["api", "checker", ""], ["scheduler", "viewer", "journal"],
  ];
  const marker = svg("marker", { id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 6, markerHeight: 6, orient: "auto-start-reverse" }, svg("path", { d: "M0 0L8 4L0 8z" }));
  const parts = [svg("defs", {}, marker)];
  const seen = new Set(shown);
  for (const [a, b, text] of ends) {
    if (!seen.has(a) || !seen.has(b) || (a === "api" && b === "scheduler")) continue;
    const [ax, ay] = place(a), [bx, by] = place(b), back = a === "worker0", shift = back ? 14 : -14;
    if (b === "viewer") {
      parts.push(svg("line", { x1: ax + 75, y1: ay + BOX[1], x2: bx + 75, y2: by, "stroke-dasharray": "4 4", "marker-end": "url(#tip)" }), write(bx + 112, (ay + BOX[1] + by) / 2 + 4, text));
      continue;
    }
    if (a === "api" || a === "tokenizer") {  // an elbow above or below the way of the answers
      const there = b === "tokenizer" || a === "tokenizer", x = place("api")[0] + (a === "tokenizer" ? 36 : there ? 60 : 60), y = there ? place("tokenizer")[1] + (a === "tokenizer" ? 24 : 44) : by + BOX[1] / 2, edge = there ? place("api")[1] : ay + BOX[1], far = there ? place("tokenizer")[0] : bx;
      const tip = { "marker-end": "url(#tip)" };
      parts.push(svg("line", { x1: x, y1: y, x2: x, y2: edge, ...(a === "tokenizer" ? tip : {}) }), svg("line", { x1: x, y1: y, x2: far, y2: y, ...(a === "tokenizer" ? {} : tip) }));
      if (a === "tokenizer") parts.push(write((x + far) / 2, y - 6, ["prompts", waiting(facts, Object.keys(facts.rings ?? {}).filter((k) => k.startsWith("tokenizer")))].filter(Boolean).join(", "), "prompts"));
      continue;
    }
    const right = bx > ax, x1 = right ? ax + BOX[0] : ax, x2 = right ? bx : bx + BOX[0], y1 = ay + BOX[1] / 2 + (Math.abs(ay - by) < 5 || back ? shift : 0), y2 = by + BOX[1] / 2 + (Math.abs(ay - by) < 5 || back ? shift : 0);
    parts.push(svg("line", { x1, y1, x2, y2, "marker-end": "url(#tip)" }));
    const ring = { worker0: "results", scheduler: b === "worker0" ? "plans" : "" }[a], depth = ring ? waiting(facts, [ring]) : "", x = (x1 + x2) / 2, y = (y1 + y2) / 2;
    parts.push(write(x, y + (back ? 16 : depth ? -21 : -7), text));
    if (depth) parts.push(write(x, y + (back ? 30 : -7), depth, ring));
  }
  if (seen.has("scheduler")) {  // straight from the gateway, around the detokenizer
    const [ax, ay] = place("api"), [bx, by] = place("scheduler");
    const y = 122;
    for (const [x1, y1, x2, y2, tip] of [[ax + 100, ay, ax + 100, y, 0], [ax + 100, y, bx + 40, y, 0], [bx + 40, y, bx + 40, by, 1]]) parts.push(svg("line", { x1, y1, x2, y2, ...(tip ? { "marker-end": "url(#tip)" } : {}) }));
    parts.push(write((ax + 110 + bx + 40) / 2, y - 6, [per(rate(14), "requests"), waiting(facts, ["requests"])].filter(Boolean).join(", "), "requests"));
  }
  for (const name of shown) {
    const [x, y] = place(name), p = facts.processes[name], down = !p || facts.down?.includes(name), late = p && p[1] !== null && p[1] > LATE;
    const g = svg("g", { class: down ? "down" : "" }, svg("rect", { x, y, width: BOX[0], height: BOX[1], rx: 8 }));
    const title = svg("text", { x: x + 12, y: y + 22 }), about = svg("text", { class: "dim", x: x + 12, y: y + 41 });
    title.textContent = name;
    about.textContent = down ? "being started" : `${p[2] === null ? "" : percent(p[2]) + " CPU, "}${bytes(p[3])}`;
    const queue = { api: `${num(facts.open)} open requests`, scheduler: `${num(t.waiting_requests ?? 0)} wait, ${num(t.running_requests ?? 0)} run`, worker0: `${num(t.in_flight ?? 0)} plans in flight` }[name];
    if (queue) { const more = svg("text", { class: "dim", x: x + 12, y: y + 58 }); more.textContent = queue; g.append(more); }
    g.append(title, about, svg("circle", { class: "beat" + (late || down ? " late" : ""), cx: x + BOX[0] - 14, cy: y + 17, r: 4 }));
    parts.push(g);
  }
  const ranks = names.filter((name) => name.startsWith("worker")).length;
  graph.setAttribute("viewBox", `0 0 1000 ${Math.max(360, 150 + 74 * Math.min(3, ranks) + 10)}`);
  graph.replaceChildren(...parts);
  list.replaceChildren(table(["process", ">pid", ">sign of life", ">CPU", ">memory", ">started again"], names.map((name) => {
    const p = facts.processes[name];
    return row([name, p ? p[0] : "\u2013", p ? (p[1] === null ? "\u2013" : secs(p[1]) + " ago") : "being started", p ? percent(p[2]) : "\u2013", p ? bytes(p[3]) : "\u2013", facts.restarts?.[name] || ""], [1, 2, 3, 4, 5], { "data-process": name });
  }), "Processes"));
}
