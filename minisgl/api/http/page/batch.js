// The batch: what the last steps computed, slot by slot, when the device was busy, and how far ahead each step was launched.
import { bar, card, color, el, legend, ms, num, row, table } from "./dom.js";
import { steps } from "./live.js";

const LANE = 18, ROW = 11, LEFT = 52, AXIS = 16, ROWS = 40;
let canvas, said, pool, slots, list, keys, selected = null, window_ = [], open;

export function build(root, page) {
  open = page.open;
  const [steps_, stepsBody] = card("The last steps", legend(["launch", "launched, waits"], ["prefill", "prompt"], ["decode", "decode"], ["idle", "device idle"]));
  canvas = el("canvas", { id: "timeline", tabindex: 0, role: "img", "aria-label": "Timeline of the last steps; arrow keys choose a step" });
  said = el("div", { class: "said-of", id: "step-said", "aria-live": "polite" });
  stepsBody.append(canvas, said);
  const [pages, pagesBody] = card("Pages of the KV cache");
  pool = el("div", { id: "pool" });
  pagesBody.append(pool);
  const [slots_, slotsBody] = card("Slots");
  slots = el("div", { id: "slots", class: "scroll tall" });
  slotsBody.append(slots);
  const [list_, listBody] = card("Steps in numbers");
  list = el("div", { id: "steps", class: "scroll tall" });
  listBody.append(list, el("p", { class: "less" }, "Busy: the device computed; idle: it had waited before that; launch: the processor's time to launch the step; ahead: how long the plan lay ready before the device began."));
  root.append(steps_, pages, el("div", { class: "two" }, slots_, list_));
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || !window_.length) return;
    event.preventDefault();
    const at = window_.findIndex((s) => s.n === selected);
    selected = window_[Math.max(0, Math.min(window_.length - 1, at < 0 ? window_.length - 1 : at + move))].n;
    paint();
  });
  canvas.addEventListener("pointermove", (event) => {
    const x = event.offsetX, found = window_.filter((s) => x >= s.x0 && x <= s.x1).at(-1);
    if (found && found.n !== selected) { selected = found.n; paint(); }
  });
  canvas.addEventListener("pointerleave", () => { selected = null; paint(); });
  addEventListener("resize", () => canvas.offsetParent && paint());
}

export const escape = () => { selected = null; paint(); };

// The steps that follow each other without a long pause, and the pause before them.
function recent(all) {
  const done = all.filter((s) => s.done !== null || s === all.at(-1));
  const spans = done.map((s) => (s.done ?? s.at) - s.at).sort((a, b) => a - b), usual = spans[spans.length >> 1] || 1;
  const most = Math.max(12, Math.min(48, canvas.clientWidth / 14));
  let first = done.length - 1, pause = 0;
  while (first > 0 && done.length - first < most) {
    const gap = done[first].at - (done[first - 1].done ?? done[first].at);
    if (gap > Math.max(50, 4 * usual)) { pause = gap; break; }
    first--;
  }
  return [done.slice(Math.max(0, first)), pause];
}

export function poolBar(state) {
  const t = state.totals;
  if (t.total_pages === undefined) return [];
  const used = t.cached_pages - t.evictable_pages;
  return [
    bar([["decode", t.private_pages, "of running requests alone"], ["cached", used, "in the tree, used by running requests"], ["soft", t.evictable_pages, "in the tree, can be evicted"], ["free", t.free_pages, "free"]]),
    legend(["decode", `${num(t.private_pages)} of running requests alone`], ["cached", `${num(used)} cached, in use`], ["soft", `${num(t.evictable_pages)} cached, can be evicted`], ["free", `${num(t.free_pages)} free`]),
    el("div", { class: "less" }, `${num(t.total_pages)} pages of ${num(state.limits.page_size)} tokens; ${num(t.evicted_pages)} evicted so far, ${num(t.retractions)} retractions`),
  ];
}

export function draw(state) {
  pool.replaceChildren(...poolBar(state));
  const all = steps();
  let pause;
  [window_, pause] = recent(all);
  window_.pause = pause;
  paint();
  const rows = Object.entries(state.slots).sort((a, b) => a[0] - b[0]);
  slots.replaceChildren(rows.length ? table(["slot", "request", "", "done", ">left", ">pages", ">shared"], rows.slice(0, 64).map(([slot, s]) => slotRow(slot, s)), "Slots") : el("p", { class: "nothing" }, "No request is running."));
  if (rows.length > 64) slots.append(el("p", { class: "nothing" }, `and ${num(rows.length - 64)} more`));
  const most = all.slice(-16).reverse();
  list.replaceChildren(most.length ? table(["step", ">prompt", ">decodes", ">busy", ">idle", ">launch", ">ahead"], most.map(stepRow), "Steps") : el("p", { class: "nothing" }, "No step has run since the page looks on. Ask something in the chat."));
}

function slotRow(slot, [uid, prefilling, prompt, length, planned, limit, pages, shared]) {
  const share = prefilling ? planned / prompt : (length - prompt) / Math.max(1, limit - prompt);
  const progress = bar([[prefilling ? "prefill" : "decode", share], ["free", 1 - share]], "bar mini");
  return row([slot, el("button", { type: "button", onclick: () => open(uid) }, "#" + uid), progress, prefilling ? `prompt ${num(planned)} of ${num(prompt)}` : `${num(length - prompt)} said`, prefilling ? num(limit - prompt) : num(limit - length), num(pages), num(shared)], [4, 5, 6], { "data-slot": slot });
}

const waited = (s) => (s.done === null || !s.us[0] ? null : (s.end ?? s.done) - s.us[0] / 1000 - s.at);

function stepRow(s) {
  const device = s.done === null ? ["runs", "", ""] : s.us[0] || s.us[1] ? [ms(s.us[0] / 1000), ms(s.us[1] / 1000), ms(s.us[2] / 1000)] : ["\u2013", "\u2013", "\u2013"];
  const w = waited(s);
  return row([num(s.n), num(s.tokens), num(s.rows), ...device, w === null ? `${s.ahead} plan${s.ahead === 1 ? "" : "s"}` : ms(Math.max(0, w))], [1, 2, 3, 4, 5, 6], { "data-step": s.n });
}

function words(s) {
  const w = waited(s), parts = [`Step ${num(s.n)}: ${s.chunks.length ? `${num(s.tokens)} prompt tokens of ${s.chunks.map((c) => "#" + c[1]).slice(0, 6).join(", ")}${s.chunks.length > 6 ? ", ..." : ""}; ` : ""}${num(s.rows)} decode${s.rows === 1 ? "" : "s"}`];
  if (s.done === null) parts.push("still running");
  else if (s.us[0]) parts.push(`device busy ${ms(s.us[0] / 1000)} after ${ms(s.us[1] / 1000)} idle`, `launched ${ms(Math.max(0, w))} before it began`);
  else parts.push(`${ms(s.done - s.at)} from plan to result`);
  parts.push(`${s.ahead} plan${s.ahead === 1 ? "" : "s"} in flight before it`);
  return parts.join("; ") + ".";
}

function paint() {
  const width = canvas.clientWidth || 600, rows = new Set();
  for (const s of window_) { for (const c of s.chunks) rows.add(c[0]); for (const [a, b] of s.decode) for (let i = a; i <= b; i++) rows.add(i); }
  const places = [...rows].sort((a, b) => a - b).slice(0, ROWS), top = AXIS + 2 * LANE + 6, height = top + Math.max(1, places.length) * ROW + 4;
  const scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = height + "px";
  }
  const g = canvas.getContext("2d"), paintOf = Object.fromEntries(["prefill", "decode", "idle", "free", "less", "ink", "soft", "line", "accent", "mine"].map((n) => [n, color(n)]));
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.clearRect(0, 0, width, height);
  g.font = "10px ui-monospace, monospace";
  g.textBaseline = "middle";
  if (!window_.length) {
    g.fillStyle = paintOf.less;
    g.fillText("no step yet", LEFT, AXIS + LANE);
    said.textContent = "";
    return;
  }
  const from = window_[0].at, latest = Math.max(...window_.map((s) => s.done ?? s.at)), span = Math.max(0.5, latest - from);
  const x = (t) => LEFT + ((t - from) / span) * (width - LEFT - 6);
  g.fillStyle = paintOf.less;
  g.fillText("launch", 0, AXIS + LANE / 2);
  g.fillText("device", 0, AXIS + LANE * 1.5);
  places.forEach((slot, i) => { if (places.length <= 20 || i % 2 === 0) g.fillText("slot " + slot, 0, top + i * ROW + ROW / 2); });
  const tick = [0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000].find((t) => (span / t) * 58 < width - LEFT) ?? 20000;
  for (let t = 0; t <= span; t += tick) {
    g.fillStyle = paintOf.line;
    g.fillRect(x(from + t), AXIS - 4, 1, height);
    g.fillStyle = paintOf.less;
    g.fillText(tick >= 1000 ? t / 1000 + " s" : +t.toFixed(1) + " ms", x(from + t) + 3, 6);
  }
  let before = null;
  const index = new Map(places.map((slot, i) => [slot, i]));
  for (const s of window_) {
    const end = s.end ?? s.done ?? latest, begin = s.us[0] ? Math.max(s.at, end - s.us[0] / 1000) : Math.max(s.at, before ?? s.at);
    s.x0 = x(begin);
    s.x1 = Math.max(s.x0 + 1, x(end));
    g.fillStyle = paintOf.less;
    g.globalAlpha = 0.5;
    g.fillRect(x(s.at), AXIS + 4 + (s.n % 2) * 6, Math.max(1, s.x0 - x(s.at)), 3);
    g.globalAlpha = 1;
    g.fillRect(x(s.at) - 0.5, AXIS + 2, 1.5, LANE - 3);
    if (before !== null && begin > before && s.us[1]) {
      g.fillStyle = paintOf.idle;
      g.fillRect(x(before), AXIS + LANE + 3, s.x0 - x(before), LANE - 6);
    }
    const wide = s.x1 - s.x0 - (s.x1 - s.x0 > 4 ? 1 : 0);
    g.fillStyle = s.chunks.length ? paintOf.prefill : paintOf.decode;
    g.globalAlpha = s.done === null ? 0.4 : 1;
    g.fillRect(s.x0, AXIS + LANE + 1, wide, LANE - 2);
    if (s.chunks.length && s.rows) {
      g.fillStyle = paintOf.decode;
      g.fillRect(s.x0, AXIS + LANE + 1 + LANE / 2, wide, LANE / 2 - 2);
    }
    for (const [a, b] of s.decode) for (let slot = a; slot <= b; slot++) if (index.has(slot)) {
      g.fillStyle = paintOf.decode;
      g.fillRect(s.x0, top + index.get(slot) * ROW + 1, wide, ROW - 2);
    }
    for (const [slot, , , n, draws] of s.chunks) if (index.has(slot)) {
      g.fillStyle = paintOf.prefill;
      const y = top + index.get(slot) * ROW + 1;
      g.fillRect(s.x0, y, wide, ROW - 2);
      if (draws && wide > 5) { g.fillStyle = paintOf.decode; g.fillRect(s.x0 + wide - 2, y, 2, ROW - 2); }
      g.fillStyle = "#fff";
      if (wide > 22) g.fillText(n, s.x0 + 3, y + ROW / 2 - 1);
    }
    g.globalAlpha = 1;
    if (s.n === selected) {
      g.strokeStyle = paintOf.accent;
      g.lineWidth = 1.5;
      g.strokeRect(s.x0 - 1, AXIS, s.x1 - s.x0 + 2, height - AXIS - 1);
    }
    before = end;
  }
  const chosen = window_.find((s) => s.n === selected) ?? window_.at(-1);
  said.textContent = words(chosen) + (window_.pause && selected === null ? ` The engine rested ${ms(window_.pause)} before these steps.` : "") + (rows.size > ROWS ? ` ${rows.size - ROWS} slots are not drawn.` : "");
  canvas.setAttribute("aria-label", `Timeline of ${window_.length} steps; arrow keys choose a step. ${said.textContent}`);
}
