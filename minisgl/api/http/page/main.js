// Puts the page together: what runs, the tabs, where the engine's state comes from.
import { about, examples, stop } from "./chat.js";
import * as batch from "./batch.js";
import * as cache from "./cache.js";
import * as curves from "./curves.js";
import * as processes from "./processes.js";
import * as requests from "./requests.js";
import { $, el, ms, num, percent } from "./dom.js";
import * as live from "./live.js";
import { base, headers, key } from "./server.js";

const PANELS = { batch, cache, requests, curves, processes };
const wide = matchMedia("(min-width: 1100px)");
const tabs = [...document.querySelectorAll("[role=tab]")];
const state = live.state;
let shown = "chat";

// ---------------- what runs
async function refresh() {
  let wait = 0;
  try {
    const response = await fetch(base + "/", { headers: headers({ Accept: "application/json" }) });
    Object.assign(about, await response.json());
    $("model").textContent = about.model;
    $("runs").textContent = Object.entries(about.runs || {}).map(([k, v]) => k + " " + v.toLocaleString("en")).join(" \u00b7 ");
    $("keybox").hidden = about.api_key !== "required";
    const said = { ready: "Ask something:", starting: "The model is being loaded..." };
    $("state").textContent = said[about.state] || "The server is " + about.state + ".";
    if (about.state !== "ready") wait = 1000;
  } catch {
    $("state").textContent = "The server cannot be reached.";
    wait = 3000;
  }
  if (wait) setTimeout(refresh, wait);
  examples();
}

// ---------------- the tabs
export function show(name) {
  if (wide.matches && name === "chat") name = "batch";
  shown = name;
  for (const tab of tabs) {
    const on = tab.id === "tab-" + name;
    tab.setAttribute("aria-selected", on);
    tab.tabIndex = on ? 0 : -1;
  }
  $("chat").hidden = !wide.matches && name !== "chat";
  $("engine").hidden = !wide.matches && name === "chat";
  for (const id of Object.keys(PANELS)) $(id).hidden = id !== name;
  follow();
  draw();
}

// The stream is there while somebody can see what it brings.
function follow() { live.watch(!document.hidden && !$("engine").hidden); }

for (const tab of tabs) {
  tab.addEventListener("click", () => show(tab.id.slice(4)));
  tab.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key], usable = tabs.filter((t) => t.offsetParent);
    const next = event.key === "Home" ? usable[0] : event.key === "End" ? usable.at(-1) : move && usable[(usable.indexOf(tab) + move + usable.length) % usable.length];
    if (next) { event.preventDefault(); next.focus(); show(next.id.slice(4)); }
  });
}
wide.addEventListener("change", () => { $("settings").open = !wide.matches; show(shown); });
document.addEventListener("visibilitychange", follow);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  stop();
  PANELS[shown]?.escape?.();
});

// ---------------- live, or a journal
async function journals() {
  try {
    const response = await fetch(base + "/debug/journals", { headers: headers() });
    const found = response.ok ? (await response.json()).journals : [];
    $("journal").replaceChildren(el("option", { value: "" }, "live"), ...found.map((j) => el("option", { value: j.name }, "journal " + j.name)));
  } catch {}
  offer();
}
const trouble = (error) => live.note(error.message);
let file = "", opening = "", had = false;  // the journal of this computer that is shown, and the one on its way; whether one was shown
function offer() {  // what can be shown
  const mine = $("journal").querySelector("[value='/']");
  if (!file) mine?.remove();
  else if (!mine) $("journal").append(el("option", { value: "/" }, "file " + file));
  else mine.textContent = "file " + file;
  $("journal").value = file ? "/" : "";
  $("sourcebox").hidden = $("journal").options.length < 2;
}
async function openFiles(files) {
  if (!files.length || opening) return;
  opening = files[0].name.replace(/\.part\d+$/, "") + (files.length > 1 ? ` (${files.length} parts)` : "");
  live.note("");
  draw();
  try { await live.upload(files); file = opening; place = null; had = false; } catch (error) { file = ""; trouble(error); }
  opening = "";
  offer();
  draw();
}
$("openfile").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => { await openFiles([...$("file").files]); $("file").value = ""; });
const carries = (event) => state.everything && state.status === "live" && event.dataTransfer?.types.includes("Files");
addEventListener("dragover", (event) => { if (carries(event)) { event.preventDefault(); document.body.classList.add("drop"); } });
for (const kind of ["dragleave", "drop"]) addEventListener(kind, (event) => { if (kind === "drop" || !event.relatedTarget) document.body.classList.remove("drop"); });
addEventListener("drop", (event) => { if (carries(event)) { event.preventDefault(); if (shown === "chat") show("batch"); openFiles([...event.dataTransfer.files]); } });
$("journal").addEventListener("change", () => {
  if ($("journal").value === "/") return;
  file = "";
  const name = $("journal").value;
  live.note("");
  offer();
  $("journal").value = name;
  live.ask({ journal: name }).catch(trouble);
});
let place = null, asking = false;
async function seek(to) {  // the last place that was asked for; one request at a time
  place = Math.max(0, Math.min(to, Number($("slider").max)));
  $("slider").value = place;
  if (asking) return;
  asking = true;
  live.note("");
  try { while (place !== null) { const now = place; place = null; await live.ask({ place: now }); } } catch (error) { trouble(error); }
  asking = false;
}
$("slider").addEventListener("input", () => seek(Number($("slider").value)));
$("back").addEventListener("click", () => seek(Number($("slider").value) - 1));
$("on").addEventListener("click", () => seek(Number($("slider").value) + 1));

function drawSource() {
  const j = state.journal, said = { off: "not connected", connecting: "connecting...", live: "live", refused: "not shown", lost: "connection lost, trying again..." };
  const opened = j.steps !== undefined;
  if (opened && !had) {
    had = true;
    $("player").hidden = false;
    $("slider").max = j.steps - 1;
    $("slider").value = j.at;
    if (file) $("slider").focus();  // the arrow keys walk through its steps
  }
  if (!opened && had) { had = false; file = ""; offer(); }  // it has gone: with the connection, or with its viewer
  $("openfile").hidden = !state.everything || state.status !== "live";
  $("openfile").disabled = Boolean(opening);
  $("status").textContent = opening ? `reading ${opening}...` : opened ? "journal" : state.status === "live" && !Object.keys(state.totals).length ? "live, waiting for the first view..." : said[state.status];
  $("status").className = state.status === "live" ? "live" : state.status === "lost" ? "lost" : "";
  $("player").hidden = !opened;
  if (opened) {
    $("slider").max = j.steps - 1;
    if (place === null && !asking && document.activeElement !== $("slider")) $("slider").value = j.at;
    $("where").textContent = `step ${num(j.step)} (${num(j.at + 1)} of ${num(j.steps)})`;
  }
  const notes = [];
  if (state.said) notes.push(state.said);
  if (opened && j.text === false && j.hashed === false) notes.push(`This journal is of another model (${j.model}), whose tokenizer is not here: there is no text.`);
  if (j.hashed === true && opened) notes.push("This journal has hashes instead of tokens (it was kept without --journal-tokens): there is no text.");
  if (state.status === "live" && !state.everything) notes.push("With this API key you see its own requests alone.");
  if (state.actors?.down?.length) notes.push(`Being started again: ${state.actors.down.join(", ")}.`);
  $("banner").hidden = !notes.length;
  $("banner").className = state.status === "lost" || state.status === "refused" ? "bad" : "";
  $("banner").textContent = notes.join(" ");
}

// ---------------- the numbers above all panels
const tile = (id, value, text, title) => el("div", { class: "tile", id: "tile-" + id, title }, el("b", {}, value), el("span", {}, text));

function drawTiles() {
  const t = state.totals, over = live.curve().filter((row) => row[0] < Math.floor(t.now ?? 0)).slice(-5);
  if (t.now === undefined) { $("tiles").replaceChildren(); return; }
  const sum = (i) => over.reduce((total, row) => total + row[i], 0), n = over.length || 1;
  const last = over.filter((row) => row[5] !== null).at(-1), device = sum(11) + sum(12);
  $("tiles").replaceChildren(
    tile("running", num(t.running_requests), `running of ${num(state.limits.slots)} slots`),
    tile("waiting", num(t.waiting_requests), "waiting"),
    tile("rate", over.length || !t.running_requests ? num(sum(1) / n) : "\u2013", "tokens a second", "over the last five seconds of the engine's clock"),
    tile("hits", percent(t.prompt_tokens ? t.cached_tokens / t.prompt_tokens : null), "of prompts cached", `${num(t.cached_tokens)} of ${num(t.prompt_tokens)} tokens`),
    tile("ttft", ms(last ? last[5] : null), "first token (p50)"),
    tile("busy", device ? percent(sum(11) / device) : "\u2013", "device busy", "of the time between the first and the last step: busy / (busy + idle)"),
    tile("free", percent(t.total_pages ? t.free_pages / t.total_pages : null), "pages free"),
    tile("steps", num(t.steps), "steps"),
  );
}

function draw() {
  if ($("engine").hidden) return;
  drawSource();
  drawTiles();
  PANELS[shown]?.draw(state);
}
live.onchange(draw);

// ---------------- the start
for (const [name, panel] of Object.entries(PANELS)) panel.build($(name), { show, open: (uid) => { show("requests"); requests.select(uid); } });
$("key").addEventListener("change", () => { try { sessionStorage.setItem("key", key()); } catch {} refresh(); journals(); live.again(); });
for (const name of ["docs", "metrics"]) $(name).href = base + "/" + name;
try { $("key").value = sessionStorage.getItem("key") ?? ""; } catch {}
$("settings").open = !wide.matches;
const hash = location.hash.slice(1);
show(PANELS[hash] ? hash : "chat");
refresh();
journals();
