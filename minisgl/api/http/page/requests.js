// The requests: who waits and why, who runs, who has ended; one click shows the life of one.
import { bar, card, el, legend, ms, num, percent, pieces, row, secs, svg, table } from "./dom.js";
import { ask, state } from "./live.js";

let list, queue, life, selected = null, loaded = null, asked = 0, stamp = "";
const WHY = { slot: "waits for a slot", pages: "waits for pages", prefix: "waits for a shared prefix", behind: "stands behind one that was overtaken", turn: "waits for its turn", queue: "waits in the queue" };

export function build(root) {
  const [queue_, queueBody] = card("Waiting");
  queue = el("div", { id: "waiting", class: "scroll tall" });
  queueBody.append(queue);
  const [list_, listBody] = card("Requests");
  list = el("div", { id: "list", class: "scroll tall" });
  listBody.append(list);
  const [life_, lifeBody] = card("The life of a request", legend(["idle", "waits"], ["prefill", "prompt"], ["decode", "tokens"], ["bad", "retracted"]));
  life = el("div", { id: "life" });
  lifeBody.append(life);
  root.append(queue_, list_, life_);
}

export const escape = () => select(null);

export function select(uid) {
  selected = uid;
  loaded = null;
  stamp = "";
  load();
  draw();
}

async function load() {
  const uid = selected, mine = ++asked;
  if (uid === null) return;
  try {
    const found = await ask({ life: uid });
    if (mine === asked) loaded = found;
  } catch (error) { if (mine === asked) loaded = { error: error.message }; }
  if (mine === asked) drawLife();
}

export function draw() {
  const waits = Object.entries(state.waiting).sort((a, b) => a[1][0] - b[1][0]), now = state.totals.now ?? 0;
  queue.replaceChildren(waits.length
    ? table([">place", "request", ">tokens", ">cached", ">since", "why it waits"], waits.map(([uid, [place, n, since, word, text, cached, resumed]]) => row([num(place + 1), button(uid), num(n), num(cached), secs(now - since), el("td", { class: "words" }, `${WHY[word] ?? word}: ${text}${resumed ? " (retracted before)" : ""}`)], [0, 2, 3, 4], { "data-uid": uid })), "Waiting requests")
    : el("p", { class: "nothing" }, "Nobody waits."));
  const more = (state.totals.waiting_requests ?? 0) - waits.length;
  if (more > 0) queue.append(el("p", { class: "nothing" }, state.everything ? `and ${num(more)} more` : `and ${num(more)} of others`));
  const order = { waits: 0, prefill: 1, decode: 2 };
  const all = Object.entries(state.requests).map(([uid, r]) => [Number(uid), ...r]).sort((a, b) => (order[a[1]] ?? 3) - (order[b[1]] ?? 3) || b[0] - a[0]);
  list.replaceChildren(all.length
    ? table(["request", "state", ">prompt", "cached", ">said", ">first token", ">took", ">retracted"], all.slice(0, 120).map(line), "Requests")
    : el("p", { class: "nothing" }, "No request has come since the page looks on. Ask something in the chat."));
  if (selected !== null && state.requests[selected]) {
    const mine = JSON.stringify([state.requests[selected], state.waiting[selected]?.[3]]);
    if (mine !== stamp) { stamp = mine; load(); }
  }
  drawLife();
}

const button = (uid) => el("button", { type: "button", onclick: () => select(Number(uid)), "aria-label": `Life of request ${uid}` }, "#" + uid);

function line([uid, what, arrived, prompt, cached, said, ttft, ended, retracted]) {
  const share = cached === null ? el("span", {}, "\u2013") : el("span", {}, bar([["cached", cached], ["free", Math.max(0, prompt - cached)]], "bar mini"), ` ${num(cached)}`);
  return row([button(uid), what, num(prompt), share, num(said), ms(ttft), secs((ended ?? state.totals.now) - arrived), retracted || ""], [2, 4, 5, 6, 7], { "data-uid": uid, class: uid === selected ? "on" : "" });
}

let drawn = null;
function drawLife() {
  if (selected === null) { drawn = null; life.replaceChildren(el("p", { class: "nothing" }, "Choose a request.")); return; }
  if (loaded === drawn && loaded) return;
  drawn = loaded;
  if (!loaded) { life.replaceChildren(el("p", { class: "nothing" }, `Request ${selected}...`)); return; }
  if (loaded.error) { life.replaceChildren(el("p", { class: "error" }, loaded.error)); return; }
  const r = loaded, end = r.ended ?? r.now, from = r.arrived, span = Math.max(1e-6, end - from), at = (t) => (100 * (t - from)) / span;
  const line_ = el("div", { class: "life", role: "img", "aria-label": `From its arrival to ${r.ended ? "its end" : "now"}: ${secs(span)}` });
  const piece = (kind, a, b, title) => { const i = el("i", { class: "bg-" + kind, title }); Object.assign(i.style, { left: Math.max(0, at(a)) + "%", width: Math.max(0, at(b) - at(a)) + "%" }); line_.append(i); };
  const began = r.chunks[0]?.[1] ?? r.started ?? end;
  piece("idle", from, Math.max(from, began), `waited ${secs(began - from)}`);
  const marks = [...r.chunks.map((c) => ["prefill", c[1], c]), ...r.retracted.map((t) => ["bad", t])].sort((a, b) => a[1] - b[1]);
  marks.forEach(([kind, t, c], i) => {
    const stop = marks[i + 1]?.[1] ?? (kind === "prefill" ? r.first ?? end : end), until = kind === "prefill" ? Math.min(stop, r.first > t ? r.first : stop) : stop;
    piece(kind === "bad" ? "idle" : "prefill", t, until, kind === "bad" ? "retracted: waits again" : `step ${c[0]}: prompt tokens ${num(c[2])} to ${num(c[2] + c[3])}`);
    if (kind === "bad") { const m = el("i", { class: "mark bg-bad" }); m.style.left = at(t) + "%"; line_.append(m); }
  });
  if (r.first !== null) {
    let a = r.first;
    for (const t of [...r.retracted.filter((t) => t > r.first), end]) { if (t > a) piece("decode", a, t, "tokens"); a = r.chunks.find((c) => c[1] > t)?.[1] ?? end; }
  }
  const facts = [["state", r.state + (r.why ? `: ${r.why}` : "")], ["arrived", `${secs(r.now - r.arrived)} ago${r.known_from !== null ? ", before the page looked on" : ""}`]];
  const waited = Object.entries(r.waited).map(([why, s]) => `${WHY[why] ?? why} ${secs(s)}`);
  facts.push(["waited", r.chunks.length || r.started ? `${secs(began - from)}${waited.length ? " (" + waited.join(", ") + ")" : ""}` : waited.join(", ") || "not yet"]);
  if (r.cached !== null) facts.push(["cached", `${num(r.cached)} of ${num(r.prompt)} prompt tokens (${percent(r.cached / r.prompt)})${r.salted ? ", with a salt of its own" : ""}`]);
  if (r.chunks.length) facts.push(["prompt", r.chunks.length === 1 ? `one piece of ${num(r.chunks[0][3])} tokens in step ${num(r.chunks[0][0])}` : `${num(r.chunks.length)} pieces: ${r.chunks.slice(0, 12).map((c) => `${num(c[3])} (step ${num(c[0])})`).join(", ")}${r.chunks.length > 12 ? ", ..." : ""}`]);
  if (r.first !== null) facts.push(["first token", `${secs(r.first - from)} after its arrival`]);
  facts.push(["said", `${num(r.said)} token${r.said === 1 ? "" : "s"}, ${num(Math.max(0, r.limit - r.prompt - r.said))} more allowed`]);
  if (r.gaps_ms.length) { const sorted = [...r.gaps_ms].sort((a, b) => a - b); facts.push(["between tokens", `median ${ms(sorted[sorted.length >> 1])}, longest ${ms(sorted.at(-1))}`]); }
  if (r.retracted.length) facts.push(["retracted", `${r.retracted.length} time${r.retracted.length === 1 ? "" : "s"}, for want of pages or to make way`]);
  life.replaceChildren(el("div", { class: "head" }, el("b", {}, `Request ${r.uid}`)), line_, el("div", { class: "axis" }, el("span", {}, "arrival"), el("span", {}, secs(span))),
    el("dl", {}, ...facts.flatMap(([k, v]) => [el("dt", {}, k), el("dd", {}, v)])));
  if (r.gaps_ms.length > 1) life.append(el("h2", {}, "Time of each token after the one before"), gaps(r.gaps_ms));
  if (r.prompt_pieces) {
    life.append(el("h2", {}, "Prompt (what came from the cache is coloured)"), pieces(r.prompt_pieces, r.cached ?? 0));
    if (r.said_pieces.length) life.append(el("h2", {}, "Answer"), pieces(r.said_pieces));
  }
}

function gaps(values) {
  const most = Math.max(...values, 0.01), n = values.length, bars = svg("svg", { class: "plot", viewBox: `0 0 ${n} 100`, preserveAspectRatio: "none", role: "img", "aria-label": `${n} gaps, longest ${ms(most)}` });
  values.forEach((v, i) => bars.append(svg("rect", { x: i, y: 100 - (100 * v) / most, width: 0.85, height: Math.max(0.5, (100 * v) / most), fill: "var(--decode)" })));
  const box = el("div", {}, bars, el("div", { class: "axis" }, el("span", {}, "2nd token"), el("span", {}, `highest ${ms(most)}`), el("span", {}, `token ${num(n + 1)}`)));
  bars.style.height = "3.5rem";
  return box;
}
